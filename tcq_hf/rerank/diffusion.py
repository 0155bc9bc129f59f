"""A graph in; lists in, the rows that similarity reaches from the query along mutual neighbours out."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee
from tqdm.auto import tqdm

from .graph import KNNGraph, rows_to
from .graph_checks import require_neighbours, require_room_for_queries, warn_if_degenerate
from .lists import check_lists, rank_in_blocks, unit_queries
from .sparse_rows import largest_entries, narrow, unit_rows

# Rows that are multiplied at a time.
_ROWS_AT_ONCE = 512


class Diffusion:
    """Re-ranking by diffusion on the graph of mutual neighbours (Zhou et al., NIPS 2003; Iscen et al., CVPR 2017).

    `A_ij = max(cos, 0)^gamma` between rows of which each is among the k nearest of the other, `S = D^-1/2 A D^-1/2`
    with D the sums of the rows of A, and `F = sum_{t=0}^{steps} (alpha S)^t`, of whose rows only the largest entries
    are kept after each step. A query is `f_q = sum_i max(cos(q, i), 0)^gamma F_i` over the best rows of its list, and
    the gallery is ranked by the cosine of f_q and F_i: rows that are not in the list come in, and rows that nothing
    flows to follow in the order of the list. A row without mutual neighbours keeps itself alone.

    Cosines are taken of the queries and the vectors of the graph; where either is missing, scores stand for them, which
    have to be inner products: only their proportions play a part. The gallery is held twice, in 16 `keep` bytes a row
    at most: 160 MB for 50,000 rows.

    Args:
        k: Nearest rows of a row, itself counted, so that the graph needs k - 1 neighbours.
        query_k: Rows of its list that stand for a query.
        gamma: Power of a cosine that weighs an edge.
        alpha: Share that flows on in a step.
        steps: Steps, each along one more edge.
        keep: Largest entries of a row of F that are kept.
        transductive: Put all queries of a call into the graph, as papers on manifolds do, and rank by the cosine of
            their own rows of F. What a query gets then depends on the others: report such figures as transductive.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        k: int = 50,
        query_k: int = 10,
        gamma: float = 3.0,
        alpha: float = 0.99,
        steps: int = 20,
        keep: int = 200,
        transductive: bool = False,
    ) -> None:
        if k < 2:
            raise ValueError(f"k counts the row itself and must be at least 2, got {k}")
        if min(query_k, steps, keep) < 1:
            raise ValueError(
                f"query_k, steps and keep must be at least 1, got query_k={query_k}, steps={steps} and keep={keep}"
            )
        if not 0 < gamma < np.inf or not 0 < alpha < 1:
            raise ValueError(f"gamma must be above 0 and alpha between 0 and 1, got gamma={gamma} and alpha={alpha}")
        self.k, self.query_k, self.gamma, self.alpha = k, query_k, gamma, alpha
        self.steps, self.keep, self.transductive = steps, keep, transductive
        self._graph: KNNGraph | None = None
        self._flow: sparse.csr_array | None = None
        self._columns: sparse.csr_array | None = None

    def fit(self, graph: KNNGraph) -> "Diffusion":
        """Diffuse from every row of the gallery; if transductive, that waits for the queries.

        Args:
            graph: Graph of the gallery with at least k - 1 neighbours a row, or all other rows.

        Raises:
            ValueError: If it holds fewer, or for a transductive re-ranker no vectors or too few rows.
        """
        require_neighbours(graph, self.k - 1, f"k={self.k} counts the row itself and")
        if self.transductive:
            require_room_for_queries(graph, self.k - 1, f"k={self.k}")
        warn_if_degenerate(graph, self.k)
        if not self.transductive:
            self._flow = self._diffused(graph)
            self._columns = unit_rows(self._flow).T.tocsr()
        self._graph = graph
        return self

    @property
    def num_rows(self) -> int:
        """Rows of the gallery; RuntimeError before fit."""
        if self._graph is None:
            raise RuntimeError("Diffusion knows no gallery yet: call fit(graph) first")
        return len(self._graph)

    def __call__(self, queries: np.ndarray | None, scores: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the gallery that most flows to from each query.

        Args:
            queries: Float `[Q, D]`, of any length; with None scores stand for cosines.
            scores: Numbers `[Q, k]`, as of `index.search`.
            ids: Integers `[Q, k]`; the first `query_k` of them stand for the query, or what there is.

        Returns:
            Cosines of rows of F, float32 `[Q, k]`, 0 for rows of the list that nothing flows to; and ids int64
            `[Q, k]`. -inf and -1 stay behind.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists or queries are impossible, scores that stand for cosines are not finite, or a
                transductive re-ranker gets no queries.
        """
        scores, ids = check_lists(scores, ids, self.num_rows)
        vectors = self._graph.vectors
        if queries is None and self.transductive:
            raise ValueError("transductive=True needs queries, got None")
        points = None if queries is None or vectors is None else unit_queries(queries, len(ids), vectors.shape[1])
        if not self.transductive:
            return rank_in_blocks(lambda block: self._similar(points, scores, ids, block), scores, ids)
        if not len(ids):
            return scores, ids
        starts, columns = self._with_queries(points)
        return rank_in_blocks(lambda block: unit_rows(starts[block]) @ columns, scores, ids)

    def _similar(
        self, points: np.ndarray | None, scores: np.ndarray, ids: np.ndarray, block: slice
    ) -> sparse.csr_array:
        """Cosines of the rows of F of some queries with those of the gallery, float32 `[q, n]`."""
        weights = self._weights(None if points is None else points[block], scores[block], ids[block])
        return unit_rows(narrow(weights) @ self._flow) @ self._columns

    def _weights(self, points: np.ndarray | None, scores: np.ndarray, ids: np.ndarray) -> sparse.csr_array:
        """`max(cos, 0)^gamma` of the first `query_k` rows of each list, float32 `[Q, n]`."""
        near, cosines = ids[:, : self.query_k], scores[:, : self.query_k]
        if points is not None:
            cosines = np.einsum("qd,qkd->qk", points, self._graph.vectors[near])
        weights = np.maximum(np.where(near < 0, 0, cosines), 0) ** np.float32(self.gamma)
        unfit = ~np.isfinite(weights).all(axis=1)
        if unfit.any():
            raise ValueError(
                "without queries or vectors of the graph scores stand for cosines and must be finite, one of query "
                f"{unfit.argmax()} is not"
            )
        return rows_to(near, weights, len(self._graph))

    def _with_queries(self, points: np.ndarray) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Rows of F of the queries `[Q, n]`, and those of the gallery at unit norm, transposed `[n, n]`."""
        count = len(self._graph)
        flow = self._diffused(self._graph.append(points))
        return flow[count:], unit_rows(flow).T.tocsr()[:, :count]

    def _diffused(self, graph: KNNGraph) -> sparse.csr_array:
        """F of a graph, float32 `[n, n]`."""
        near = KNNGraph(graph.neighbours[:, : self.k - 1], graph.scores[:, : self.k - 1])
        return diffuse(transitions(near, self.gamma), self.alpha, self.steps, self.keep)


def transitions(graph: KNNGraph, gamma: float) -> sparse.csr_array:
    """S of the mutual neighbours of a graph, float32 `[n, n]`, symmetric; rows without any are empty."""
    edges = graph.adjacency(mutual=True)
    # An edge of cosine 0 or below has the smallest normal number for its weight there.
    edges.data = np.where(edges.data > np.finfo(np.float32).tiny, edges.data, 0) ** np.float32(gamma)
    edges.eliminate_zeros()
    degrees = edges.sum(axis=1)
    scale = sparse.diags_array(1 / np.sqrt(np.where(degrees > 0, degrees, 1)))
    return narrow(scale @ edges @ scale)


def diffuse(step: sparse.csr_array, alpha: float, steps: int, keep: int) -> sparse.csr_array:
    """`sum_{t=0}^{steps} (alpha step)^t`, of each row the `keep` largest entries after each step, float32 `[n, n]`.

    `F <- I + alpha F S` leaves rows apart, so that a few at a time are taken through all steps: what is held beside the
    result are these few, and threads share them out. With `I + alpha S F` every row would need all others.

    Args:
        step: S, symmetric float32 `[n, n]`, no entry below 0.
        alpha: Share that flows on.
        steps: How often.
        keep: Entries of a row.
    """
    n = step.shape[0]
    # Rows that flow into each other stand together, and in the cache: five times as fast for 200,000 rows.
    order = reverse_cuthill_mckee(step, symmetric_mode=True)
    flowing = narrow(step[order][:, order] * alpha)
    identity = narrow(sparse.eye_array(n, format="csr"))

    def rows_of(start: int) -> sparse.csr_array:
        own = identity[start : start + _ROWS_AT_ONCE]
        rows = own
        for _ in range(steps):
            rows = largest_entries((rows @ flowing + own).tocsr(), keep)
        return rows

    starts = range(0, n, _ROWS_AT_ONCE)
    # SciPy and NumPy let go of the interpreter while they multiply and select.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        blocks = list(tqdm(pool.map(rows_of, starts), total=len(starts), desc="Diffusing", unit="block", delay=2))
    flow = sparse.vstack(blocks, format="csr")
    flow.indices = order[flow.indices]
    return flow[np.argsort(order)]
