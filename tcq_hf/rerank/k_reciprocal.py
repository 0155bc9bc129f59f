"""Lists in, the same rows ordered by how much of their k-reciprocal neighbourhoods they share with the query out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from tqdm.auto import tqdm

from .graph import KNNGraph, rows_to
from .graph_checks import require_neighbours, require_room_for_queries
from .lists import check_lists, unit_queries
from .nearest import TIE

# Rows whose sets are extended at a time, pairs of vectors that are gathered, and one block of scores: 64 MiB, the pairs
# at a width of 128.
_ROWS_AT_ONCE, _PAIRS_AT_ONCE, _SCORES_AT_ONCE = 8192, 2**16, 2**24
# A distance is divided by the largest one to so many rows, taken evenly; of a gallery that has no more, to all.
_FAR_ROWS = 10_000
# Above the rounding of a cosine in float32, as in graphs; and of distances that are nothing but rounding.
_NO_DISTANCE = 1e-5
# A score above this is no cosine, however it was rounded.
_NO_COSINE = 1.001
# The distance of orthogonal vectors, where no vector says how far rows can be.
_ORTHOGONAL = 2.0


class KReciprocal:
    """Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017); every list keeps its rows.

    With `d = 2 - 2 cos`, divided by the largest distance of its row, N_k(q) the row itself and its k nearest, and
    `R(q, k) = {i in N_k(q): q in N_k(i)}`: R(q, k1) takes in `R(c, k1 / 2)` of each member c of which more than two
    thirds are in it already. V_q is `exp(-d)` on that set, scaled to the sum 1, and then the mean of its own and of
    those of the k2 - 1 nearest. The new distance is `(1 - weight) (1 - m / (2 - m)) + weight d` with
    `m = sum_i min(V_q, V_i)`; scores are 1 minus it, larger is closer. The gallery is encoded once, sparse.

    A query is no row of the gallery: N_k(q) are the first rows of its list, q is in N_k(i) if its cosine with i reaches
    that of the k-th neighbour of i, and the sets of rows do not hold it. The largest distance is that to 10,000 rows of
    the gallery, taken evenly, or to all where there are no more.

    Where queries or the vectors of the graph are missing, scores are taken as cosines, rows that are not listed as if
    they were as far as the last one that is, and the largest distance is 2.

    Args:
        k1: Neighbours that sets are made of.
        k2: Rows that V is averaged over, the row itself counted.
        weight: Share of the first distance in the new one.
        transductive: Put all queries of a call into the graph, as published figures of person re-identification do.
            What a query gets then depends on the others: report such figures as transductive.

    Raises:
        ValueError: If k1 is below 1, k2 not from 1 to k1, or weight not from 0 to 1.
    """

    def __init__(self, k1: int = 20, k2: int = 6, weight: float = 0.3, transductive: bool = False) -> None:
        if not 1 <= k2 <= k1:
            raise ValueError(f"k1 must be at least 1 and k2 from 1 to k1, got k1={k1} and k2={k2}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {weight}")
        self.k1, self.k2, self.weight, self.transductive = k1, k2, weight, transductive
        self._graph: KNNGraph | None = None
        self._encoding: Encoding | None = None

    def fit(self, graph: KNNGraph) -> "KReciprocal":
        """Encode the gallery; if transductive, that waits for the queries.

        Args:
            graph: Graph of the gallery with at least k1 neighbours a row, or all other rows.

        Raises:
            ValueError: If it holds fewer, or for a transductive re-ranker no vectors or too few rows.
        """
        require_neighbours(graph, self.k1, f"k1={self.k1}")
        if self.transductive:
            require_room_for_queries(graph, self.k1, f"k1={self.k1}")
        self._encoding = None if self.transductive else encode(graph, self.k1, self.k2)
        self._graph = graph
        return self

    @property
    def num_rows(self) -> int:
        """Rows of the gallery; RuntimeError before fit."""
        if self._graph is None:
            raise RuntimeError("KReciprocal knows no gallery yet: call fit(graph) first")
        return len(self._graph)

    def __call__(self, queries: np.ndarray | None, scores: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows of each list in their new order.

        Args:
            queries: Float `[Q, D]`, of any length; with None scores are taken as cosines.
            scores: Numbers `[Q, k]`, as of `index.search`.
            ids: Integers `[Q, k]`. Unless transductive, at least k1 places or all rows; of a list with -1 behind, what
                there is counts.

        Returns:
            One minus the new distance, float32 `[Q, k]`, at most 1; and ids int64 `[Q, k]`. -inf and -1 stay behind.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists or queries are impossible, lists too narrow, scores that have to be cosines are none,
                or a transductive re-ranker gets no queries.
        """
        scores, ids = check_lists(scores, ids, self.num_rows)
        if queries is None and self.transductive:
            raise ValueError("transductive=True needs queries, got None")
        if ids.shape[1] < min(self.k1, len(self._graph)) and not self.transductive:
            raise ValueError(f"k1={self.k1} needs lists of as many places, got {ids.shape[1]}; search for more rows")
        if not len(ids):
            return scores, ids
        points, cosines = self._compared(queries, scores, ids)
        encoding, count = self._encoding, len(self._graph)
        if self.transductive:
            encoding = encode(self._graph.append(points), self.k1, self.k2)
        largest = _largest(points, encoding.far, len(ids))
        if self.transductive:
            encoded, columns = encoding.columns.T.tocsr()[count:], encoding.columns[:, :count].tocsr()
        else:
            encoded, columns = self._encoded(points, cosines, ids, largest), encoding.columns
        distances = _distances(cosines) / largest[:, None]
        new = self.weight * (1 - distances) + (1 - self.weight) * _overlaps(encoded, columns, ids)
        new = np.where(ids < 0, -np.inf, new).astype(np.float32)
        order = np.argsort(-new, axis=1, kind="stable")
        return np.take_along_axis(new, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def _compared(
        self, queries: np.ndarray | None, scores: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Queries of unit norm, if there are vectors to compare them with, and cosines `[Q, k]`, 0 of empty places."""
        vectors, there = self._graph.vectors, ids >= 0
        if queries is None or vectors is None:
            cosines = np.where(there, scores, 0)
            if (wrong := np.abs(cosines) > _NO_COSINE).any():
                raise ValueError(
                    "without queries or vectors of the graph scores must be cosines, from -1 to 1, got "
                    f"{cosines[wrong][0]:.4g}; give both, or divide the scores of an index of codes by M"
                )
            return None, cosines
        points, cosines = unit_queries(queries, len(ids), vectors.shape[1]), np.zeros(ids.shape, np.float32)
        listed = np.nonzero(there)
        cosines[there] = _cosines(points, listed[0], vectors, ids[there])
        return points, cosines

    def _encoded(
        self, points: np.ndarray | None, cosines: np.ndarray, ids: np.ndarray, largest: np.ndarray
    ) -> sparse.csr_array:
        """V of queries over the gallery, float32 `[Q, n]`; what is missing to the sum 1 is the query's own entry."""
        n, near = len(self._graph), ids[:, : self.k1]
        mutual = cosines[:, : self.k1] >= self._encoding.limits[near] - TIE
        sets = rows_to(np.where(mutual, near, -1), np.ones(near.shape, np.float32), n)
        sets = _extended(sets, self._encoding.halves)
        if points is None:
            found = _listed_cosines(sets, ids, cosines)
        else:
            found = _cosines(points, _row_numbers(sets), self._graph.vectors, sets.indices)
        weights = _weighted(sets, found, largest, own=1)
        others = ids[:, : self.k2 - 1]
        share = (1 / (1 + (others >= 0).sum(axis=1))).astype(np.float32)
        mean = rows_to(others, np.repeat(share[:, None], others.shape[1], axis=1), n) @ self._encoding.single
        return (_scaled(weights, share) + mean).tocsr()


@dataclass(frozen=True, eq=False)
class Encoding:
    """What k-reciprocal encoding knows of n rows.

    Args:
        halves: R(i, k1 / 2) as ones, symmetric float32 `[n, n]`.
        single: V before it is averaged, float32 `[n, n]`, a row of the gallery in each row.
        columns: V, transposed: float32 `[n, n]`, a row of the gallery in each column.
        limits: float32 `[n]`, what a cosine with row i must reach for a place among its k1 nearest.
        far: The rows that largest distances are taken to, float32 `[r, D]`, or None.
    """

    halves: sparse.csr_array
    single: sparse.csr_array
    columns: sparse.csr_array
    limits: np.ndarray
    far: np.ndarray | None


def encode(graph: KNNGraph, k1: int, k2: int) -> Encoding:
    """Encode every row of a graph by its k-reciprocal neighbours; formulas and arguments as of `KReciprocal`."""
    n, vectors = len(graph), None if graph.vectors is None else graph.vectors.astype(np.float32, copy=False)
    rows, near = np.arange(n)[:, None], graph.neighbours
    halves, blocks = _mutual(graph, round(k1 / 2)), []
    sets = _mutual(graph, k1)
    far = None if vectors is None else np.ascontiguousarray(vectors[:: -(-n // _FAR_ROWS)])
    largest = _largest(vectors, far, n)
    for start in tqdm(range(0, n, _ROWS_AT_ONCE), desc="Encoding neighbourhoods", unit="block", delay=2):
        block = slice(start, start + _ROWS_AT_ONCE)
        part = _extended(sets[block], halves)
        if vectors is None:
            ids = np.concatenate([rows[block], near[block]], axis=1)
            own = np.ones((len(ids), 1), np.float32)
            cosines = _listed_cosines(part, ids, np.concatenate([own, graph.scores[block]], axis=1))
        else:
            cosines = _cosines(vectors, start + _row_numbers(part), vectors, part.indices)
        blocks.append(_weighted(part, cosines, largest[block], own=0))
    single = sparse.vstack(blocks, format="csr")
    averaged = np.concatenate([rows, near[:, : k2 - 1]], axis=1)
    share = (1 / (averaged >= 0).sum(axis=1, keepdims=True)).astype(np.float32)
    mean = rows_to(averaged, np.repeat(share, averaged.shape[1], axis=1)) @ single
    limits = np.full(n, -np.inf, np.float32)
    if near.shape[1] >= k1:
        limits = np.where(near[:, k1 - 1] < 0, limits, graph.scores[:, k1 - 1])
    return Encoding(halves, single, mean.T.tocsr(), limits, far)


def _mutual(graph: KNNGraph, k: int) -> sparse.csr_array:
    """R(i, k) of each row, itself in it, as ones: float32 `[n, n]`."""
    near = np.concatenate([np.arange(len(graph))[:, None], graph.neighbours[:, :k]], axis=1)
    members = rows_to(near, np.ones(near.shape, np.float32))
    return members.multiply(members.T).tocsr()


def _extended(sets: sparse.csr_array, halves: sparse.csr_array) -> sparse.csr_array:
    """Sets `[m, n]` as ones, with R(c, k1 / 2) of each member that has more than two thirds of it inside."""
    # The relation is mutual, so that row c of the halves is also column c.
    inside = sets.multiply(sets @ halves).tocsr()
    sizes = np.diff(halves.indptr)[inside.indices]
    inside.data = (3 * inside.data > 2 * sizes).astype(np.float32)
    result = (sets + inside @ halves).tocsr()
    result.eliminate_zeros()
    result.sort_indices()
    result.data[:] = 1
    return result


def _weighted(sets: sparse.csr_array, cosines: np.ndarray, largest: np.ndarray, own: int) -> sparse.csr_array:
    """`exp(-d)` on sets `[m, n]`, each row and, if not in its set, its own entry `own` scaled to the sum 1."""
    distances = _distances(cosines) / np.repeat(largest, np.diff(sets.indptr))
    weights = sparse.csr_array((np.exp(-distances), sets.indices, sets.indptr), shape=sets.shape)
    return _scaled(weights, 1 / (own + weights.sum(axis=1)))


def _overlaps(encoded: sparse.csr_array, columns: sparse.csr_array, ids: np.ndarray) -> np.ndarray:
    """Jaccard similarity `m / (2 - m)` of V of queries `[Q, w]` with V `[w, n]` of their listed rows, `[Q, k]`."""
    shared = np.empty(ids.shape)
    for query in tqdm(range(len(ids)), desc="Comparing neighbourhoods", unit="query", delay=2):
        part = slice(*encoded.indptr[query : query + 2])
        rows = columns[encoded.indices[part]]
        least = np.minimum(rows.data, np.repeat(encoded.data[part], np.diff(rows.indptr)))
        shared[query] = np.bincount(rows.indices, least, minlength=columns.shape[1])[ids[query]]
    return shared / (2 - shared)


def _largest(points: np.ndarray | None, far: np.ndarray | None, count: int) -> np.ndarray:
    """The largest distance of each of `count` points `[count, D]` to rows `[r, D]`, float32 `[count]`."""
    if points is None or far is None:
        return np.full(count, _ORTHOGONAL, np.float32)
    base, least, step = torch.from_numpy(far).T, np.empty(count, np.float32), max(1, _SCORES_AT_ONCE // len(far))
    for start in tqdm(range(0, count, step), desc="Finding the farthest rows", unit="block", delay=2):
        least[start : start + step] = (torch.from_numpy(points[start : start + step]) @ base).amin(dim=1)
    return np.maximum(_distances(least), _NO_DISTANCE)


def _cosines(points: np.ndarray, which: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Inner products float32 `[p]` of `points[which]` with `vectors[rows]`."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        pairs = slice(start, start + _PAIRS_AT_ONCE)
        found[pairs] = np.einsum("pd,pd->p", points[which[pairs]], vectors[rows[pairs]])
    return found


def _listed_cosines(sets: sparse.csr_array, ids: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Cosines of the entries of sets `[m, n]` in lists `[m, L]`; of what is not listed, that of the last one listed."""
    last = np.where(ids < 0, np.inf, cosines).min(axis=1)
    # From 1 to 5, so that no cosine is lost as a zero; an entry without one is 1 in the sum with the sets.
    known = rows_to(ids, cosines.astype(np.float64) + 3, sets.shape[1])
    found = (sets + sets.multiply(known)).tocsr()
    found.sort_indices()
    return np.where(found.data > 1, found.data - 4, np.repeat(last, np.diff(sets.indptr))).astype(np.float32)


def _distances(cosines: np.ndarray) -> np.ndarray:
    return np.maximum(2 - 2 * cosines, 0)


def _row_numbers(matrix: sparse.csr_array) -> np.ndarray:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _scaled(matrix: sparse.csr_array, factors: np.ndarray) -> sparse.csr_array:
    """Each row of `[m, n]` times its factor."""
    data = matrix.data * np.repeat(factors, np.diff(matrix.indptr))
    return sparse.csr_array((data.astype(np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)
