"""Vectors or an index in, the graph of their nearest neighbours and how well it hangs together out."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from tqdm.auto import tqdm

from tcq_hf.index.tensor_files import load_tensors, save_tensors

from .nearest import TIE, checked_vectors, nearest

# Paths of two edges that are held at a time: some 200 MB.
_PATHS_AT_ONCE = 2**22
# No cosine is above this, however it was rounded.
_LARGEST_COSINE = 1.001
# Up to so many rows all pairs are compared; rows that ask an index at a time.
EXACT_ROWS, _ASKED_AT_ONCE = 100_000, 1000
_KIND = "graph"


@dataclass(frozen=True, eq=False)
class KNNGraph:
    """The k nearest neighbours of each of n rows; no row is its own neighbour.

    Args:
        neighbours: int64 `[n, k]`, best first; -1 where a row has fewer, behind all others.
        scores: float32 `[n, k]`, cosines; not looked at where the neighbour is -1.
        vectors: float32 `[n, D]` of unit norm or zeros, which append and query expansion need, or None.

    Raises:
        TypeError: If neighbours are no integers, or scores or vectors not float32.
        ValueError: If the shapes differ, a neighbour is no row, twice the same or the row itself, a score is no cosine
            or larger than the one before it, or a vector not of unit norm.
    """

    neighbours: np.ndarray
    scores: np.ndarray
    vectors: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape, rows = self.neighbours.shape, np.arange(len(self.neighbours))
        for name, kind in (("neighbours", "iu"), ("scores", "f"), ("vectors", "f")):
            values = getattr(self, name)
            if values is not None and (values.dtype.kind not in kind or (kind == "f" and values.dtype != np.float32)):
                raise TypeError(f"{name} must be {'float32' if kind == 'f' else 'integers'}, got {values.dtype}")
        if len(shape) != 2 or shape != self.scores.shape:
            raise ValueError(f"neighbours and scores must have one shape [n, k], got {shape} and {self.scores.shape}")
        missing = self.neighbours == -1
        wrong = (self.neighbours < -1) | (self.neighbours >= shape[0]) | (self.neighbours == rows[:, None])
        wrong[:, 1:] |= missing[:, :-1] & ~missing[:, 1:]
        if wrong.any():
            raise ValueError(
                f"neighbours must be other rows, from 0 to {shape[0] - 1}, with -1 behind them where there are fewer; "
                f"those of row {wrong.any(axis=1).argmax()} are not"
            )
        ordered = np.sort(self.neighbours, axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
        if twice.any():
            raise ValueError(f"row {twice.argmax()} names one neighbour twice")
        unfit = ~((np.abs(self.scores) <= _LARGEST_COSINE) | missing).all(axis=1)
        if unfit.any():
            raise ValueError(
                f"scores must be cosines, one of row {unfit.argmax()} is not; divide those of an index of codes by M"
            )
        # Ties of up to 1e-6 stand in a drawn order.
        rising = (np.diff(self.scores, axis=1) > 2 * TIE) & ~missing[:, 1:]
        if rising.any():
            raise ValueError(f"scores must fall along a row, those of row {rising.any(axis=1).argmax()} do not")
        if self.vectors is not None:
            self._check_vectors(self.vectors)
        object.__setattr__(self, "neighbours", self.neighbours.astype(np.int64, copy=False))

    def _check_vectors(self, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or len(vectors) != len(self):
            raise ValueError(f"vectors must be [{len(self)}, D], got {list(vectors.shape)}")
        norms = np.linalg.norm(vectors, axis=1)
        unfit = ~((np.abs(norms - 1) < _LARGEST_COSINE - 1) | (norms == 0))
        if unfit.any():
            raise ValueError(f"vectors must have unit norm or be zeros, row {unfit.argmax()} has {norms[unfit][0]:.4g}")

    def __len__(self) -> int:
        return len(self.neighbours)

    @classmethod
    def build(cls, vectors: np.ndarray, k: int, seed: int = 0) -> "KNNGraph":
        """Exact nearest neighbours by cosine, the inner product of rows scaled to unit norm.

        Scores within 1e-6 are a tie, and each row draws the order of its ties. Were it the order of the rows, equal
        vectors would all name the same neighbours, and vectors that are all equal would make the best graph of all.

        Args:
            vectors: Float `[n, D]`, compared in float32; a row of zeros has score 0 with all others.
            k: Neighbours of a row, from 1 to n - 1.
            seed: Seed of the order of ties.

        Raises:
            ValueError: If shape, type or k is impossible, or a row is not finite or too long for float32.
        """
        rows = F.normalize(checked_vectors(vectors), dim=1)
        _check_k(k, len(rows))
        return cls(*nearest(rows, rows, k, torch.arange(len(rows)), seed), rows.numpy())

    @classmethod
    def from_index(cls, index: Any, k: int, seed: int = 0) -> "KNNGraph":
        """Nearest neighbours of the rows of an index from `build_index`, by cosine of what their codes restore.

        Up to 100,000 rows they are exact. Of more, each row asks the index: a fast or ivf one answers a million in
        minutes and misses some; rows of equal codes then name each other in the order in which the index has them.

        Args:
            index: `CodeIndex`, `FastIndex` or `IVFIndex` on the CPU.
            k: Neighbours of a row, from 1 to n - 1.
            seed: Seed of the order of ties, up to 100,000 rows.

        Raises:
            TypeError: For another index, or one that FAISS or `datasets` has read: read it with `load_index`, or give
                the vectors to `build`.
            ValueError: If k is impossible.
        """
        if not hasattr(index, "codebooks") or not hasattr(index, "reconstruct_n"):
            raise TypeError(
                f"index must come from build_index or load_index, got {type(index).__name__}; of one in a folder give "
                "its in_memory(), of vectors make the graph with KNNGraph.build(vectors, k)"
            )
        _check_k(k, index.ntotal)
        vectors = index.reconstruct_n(0, index.ntotal)
        if len(vectors) <= EXACT_ROWS:
            return cls.build(vectors, k, seed)
        neighbours, scores = np.empty((len(vectors), k), np.int64), np.empty((len(vectors), k), np.float32)
        blocks = tqdm(range(0, len(vectors), _ASKED_AT_ONCE), desc="Finding neighbours", unit="block", delay=2)
        for start in blocks:
            block = slice(start, start + _ASKED_AT_ONCE)
            found, ids = index.search(vectors[block], k + 1)
            neighbours[block], scores[block] = _without(ids, found, np.arange(start, start + len(ids)))
        # A restored vector consists of M sub-vectors of unit norm.
        num_codebooks = len(index.codebooks())
        vectors /= np.float32(np.sqrt(num_codebooks))
        return cls(neighbours, scores / np.float32(num_codebooks), vectors)

    def append(self, vectors: np.ndarray, seed: int = 0) -> "KNNGraph":
        """The graph of these rows and of more: if this one is exact, that of all from anew, with other draws of ties.

        Rows that find new ones as near as some that they have are searched anew among all, so that new rows have the
        chance of old ones: among many copies this takes as long as `build`.

        Args:
            vectors: Float `[m, D]` of the rows that come behind.
            seed: Seed of the order of ties.

        Raises:
            ValueError: If the graph has no vectors, or these are of another width or not finite.
        """
        if self.vectors is None:
            raise ValueError("a graph without vectors cannot grow; make it with KNNGraph.build")
        new, old = F.normalize(checked_vectors(vectors), dim=1), torch.from_numpy(self.vectors)
        if new.shape[1] != old.shape[1]:
            raise ValueError(f"vectors must be {old.shape[1]} wide, as those of the graph, got {new.shape[1]}")
        neighbours, scores, tied = self._merged(*nearest(old, new, min(self.neighbours.shape[1], len(new)), None, seed))
        rows, k = torch.cat([old, new]), self.neighbours.shape[1]
        again = np.concatenate([np.flatnonzero(tied), np.arange(len(old), len(rows))])
        found = nearest(rows[again], rows, min(k, len(rows) - 1), torch.from_numpy(again), seed)
        neighbours, scores = (
            np.pad(each, ((0, len(new)), (0, 0)), constant_values=empty)
            for each, empty in ((neighbours, -1), (scores, 0))
        )
        neighbours[again, : found[0].shape[1]], scores[again, : found[1].shape[1]] = found
        return KNNGraph(neighbours, scores, rows.numpy())

    def _merged(self, nearer: np.ndarray, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Neighbours and scores `[n, k]` among old and new rows, and which rows `[n]` have a tie between both.

        Args:
            nearer: Numbers of the nearest new rows, counted from 0, int64 `[n, l]`, best first.
            cosines: Their scores float32 `[n, l]`.
        """
        n, k = self.neighbours.shape
        # Where there is no neighbour, what is below any cosine.
        kept = np.where(self.neighbours < 0, np.float32(-2), self.scores)
        scores = np.concatenate([kept, cosines], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, both = np.take_along_axis(scores, order, axis=1), np.concatenate([self.neighbours, nearer + n], axis=1)
        new = order >= k
        ties = (new[:, 1:] != new[:, :-1]) & (scores[:, :-1] - scores[:, 1:] <= TIE)
        tied = (ties & (scores[:, :-1] >= scores[:, k - 1 : k] - TIE)).any(axis=1)
        return np.take_along_axis(both, order[:, :k], axis=1), scores[:, :k], tied

    def save(self, path: str | os.PathLike) -> None:
        """Write the graph as one safetensors file, whole or not at all."""
        tensors = {"neighbours": self.neighbours, "scores": self.scores}
        if self.vectors is not None:
            tensors["vectors"] = self.vectors
        save_tensors(path, _KIND, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KNNGraph":
        """Read a graph that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        tensors, _ = load_tensors(path, _KIND)
        try:
            return cls(**tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_KIND} file {path} is damaged: {error}") from error

    def adjacency(self, mutual: bool = False) -> sparse.csr_array:
        """Edges between rows that name each other, symmetric float32 `[n, n]`: scores, negative ones as 0.

        An edge of score 0 keeps the smallest normal number as its weight: sparse arithmetic would drop a zero, and with
        it the edge, while so small a number changes no sum.

        Args:
            mutual: Only where both name the other; by default where one does.
        """
        directed = rows_to(self.neighbours, np.maximum(self.scores, np.finfo(np.float32).tiny))
        return directed.minimum(directed.T).tocsr() if mutual else directed.maximum(directed.T).tocsr()


def quality(graph: KNNGraph, kind: Literal["authority", "reciprocal"] = "authority") -> float:
    """How well neighbourhoods agree with those of their members: the effectiveness of a search, without labels.

    N_q is q itself followed by its neighbours, so k, its size, is one more than the neighbours that the graph holds:
    the usual k = 20 is a graph of 19. Authority is `1 / (n k^2) sum_q sum_{i in N_q} |N_i n N_q|`, at most 1.
    Reciprocal counts each j of the intersection as one over its position in N_q, so that it is at most
    `(1 + 1/2 + ... + 1/k) / k` (Valem and Pedronette, PRL 2020). Only figures of one k on one set of rows compare, and
    of graphs whose ties were drawn: above 100,000 rows `KNNGraph.from_index` leaves those of equal codes in one order,
    which raises the figure of short codes.

    Args:
        graph: Neighbours of each row.
        kind: Which of both.

    Raises:
        ValueError: For another kind.
    """
    if kind not in ("authority", "reciprocal"):
        raise ValueError(f"kind must be 'authority' or 'reciprocal', got {kind!r}")
    n = len(graph)
    ranked = np.concatenate([np.arange(n)[:, None], graph.neighbours], axis=1)
    k = ranked.shape[1]
    weights = np.ones(k) if kind == "authority" else 1 / np.arange(1, k + 1)
    members, weighted = rows_to(ranked, np.ones((n, k))), rows_to(ranked, np.tile(weights, (n, 1)))
    total, step = 0.0, max(1, _PATHS_AT_ONCE // k**2)
    for start in range(0, n, step):
        block = slice(start, start + step)
        # Entry (q, j) of the product counts the i in N_q that have j in N_i.
        total += weighted[block].multiply(members[block] @ members).sum()
    return float(total / (n * k * k))


def rows_to(columns: np.ndarray, values: np.ndarray, width: int | None = None) -> sparse.csr_array:
    """Sparse `[n, width]` with `values` `[n, k]` at `columns` `[n, k]` of each row, none where a column is -1.

    Args:
        columns: int64 `[n, k]`.
        values: `[n, k]`.
        width: Columns of the result; n by default.
    """
    n, there = len(columns), columns >= 0
    starts = np.concatenate([[0], there.sum(axis=1).cumsum()])
    return sparse.csr_array((values[there], columns[there], starts), shape=(n, n if width is None else width))


def _check_k(k: int, rows: int) -> None:
    if rows < 2:
        raise ValueError(f"a graph needs at least two rows, got {rows}")
    if not 1 <= k < rows:
        raise ValueError(f"k must be from 1 to {rows - 1}, the other rows, got {k}")


def _without(ids: np.ndarray, scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists `[n, k + 1]` without the row's own number, or, where copies have crowded it out, without the last."""
    mine = (ids == own[:, None]) & (ids >= 0)
    mine[~mine.any(axis=1), -1] = True
    return ids[~mine].reshape(len(ids), -1), scores[~mine].reshape(len(ids), -1)
