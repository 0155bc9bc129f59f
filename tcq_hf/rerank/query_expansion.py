"""Queries and their lists in, a new search with each query moved towards the rows that it found out."""

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .graph import KNNGraph
from .graph_checks import require_neighbours
from .lists import check_lists, unit_queries, unit_vectors

# One block of scores or of gathered vectors: 64 MiB of float32.
_NUMBERS_AT_ONCE = 2**24


class QueryExpansion:
    """Alpha query expansion: the query plus its k best rows, and the whole gallery searched anew with the sum.

    `q' = norm(q + sum_i max(cos(q, x_i), 0)^alpha x_i)` over the first k rows of the list of q (Radenović et al., TPAMI
    2019). The k best are those of the list as it is given: a query that is a row of the gallery and stands in its own
    list is one of them. With `database` every row of the gallery is expanded first, by its k neighbours without itself
    (alpha-DBA), and queries are moved towards, and compared with, these rows. `alpha=0` gives the plain sums of PyRetri
    (Hu et al., ACM MM 2020), in which every row of the k has the weight 1.

    Cosines are taken of the vectors, so that neither the length of a query nor the scale of scores plays a part. Where
    16 bits a row leave many rows with one code, this does less harm than methods that trust the graph.

    Args:
        k: Rows that a query, and with `database` a row, is expanded by.
        alpha: Power of a cosine that weighs a row.
        database: Expand the gallery too.

    Raises:
        ValueError: If k is below 1 or alpha is negative or not finite.
    """

    def __init__(self, k: int = 10, alpha: float = 3.0, database: bool = False) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha must be a number from 0, got {alpha}")
        self.k, self.alpha, self.database = k, alpha, database
        self._vectors: np.ndarray | None = None

    def fit(self, graph: KNNGraph) -> "QueryExpansion":
        """Take over the gallery; with `database`, expand it.

        Args:
            graph: Graph of the gallery, with vectors; its neighbours are looked at with `database` only.

        Raises:
            ValueError: If the graph has no vectors, or with `database` fewer than k neighbours a row.
        """
        if graph.vectors is None:
            raise ValueError("query expansion adds vectors and this graph has none; make it with KNNGraph.build")
        if self.database:
            require_neighbours(graph, self.k, f"database=True with k={self.k}")
        self._vectors = self._moved(graph.vectors, graph.neighbours, graph.vectors) if self.database else graph.vectors
        return self

    @property
    def num_rows(self) -> int:
        """Rows of the gallery; RuntimeError before fit."""
        return len(self.embeddings())

    def embeddings(self) -> np.ndarray:
        """The vectors that queries are compared with, float32 `[n, D]` of unit norm, for FAISS or a dataset column.

        Raises:
            RuntimeError: Before fit.
        """
        if self._vectors is None:
            raise RuntimeError("QueryExpansion knows no gallery yet: call fit(graph) first")
        return self._vectors

    def expanded(self, queries: np.ndarray, scores: Any, ids: Any) -> np.ndarray:
        """The new queries, with which any index of `embeddings()` can be searched by inner product.

        Args:
            queries: Float `[Q, D]`, of any length; zeros have cosine 0 with all rows.
            scores: Numbers `[Q, L]` of their lists, checked but not used.
            ids: Integers `[Q, L]`, at least k places or all rows; of a list with -1 behind, what there is counts.

        Returns:
            float32 `[Q, D]` of unit norm; zeros where the sum is.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists or queries are impossible, or the lists are too narrow.
        """
        vectors = self.embeddings()
        if queries is None:
            raise ValueError("query expansion moves queries and needs them, got None")
        _, ids = check_lists(scores, ids, len(vectors))
        if ids.shape[1] < min(self.k, len(vectors)):
            raise ValueError(f"k={self.k} needs lists of as many places, got {ids.shape[1]}; search for more rows")
        return self._moved(unit_queries(queries, len(ids), vectors.shape[1]), ids, vectors)

    def __call__(self, queries: np.ndarray, scores: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The best rows of the whole gallery, by cosine with the expanded query: exact, and as many as were given.

        Rows of equal cosine stand by number, so that a shorter list is the beginning of a longer one.

        Args:
            queries: Float `[Q, D]`, of any length.
            scores: Numbers `[Q, L]`, as of `index.search`.
            ids: Integers `[Q, L]`, as for `expanded`.

        Returns:
            Cosines float32 `[Q, L]` and ids int64 `[Q, L]`; -inf and -1 behind where the gallery has fewer rows.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists or queries are impossible, or the lists are too narrow.
        """
        return _search(self.expanded(queries, scores, ids), self.embeddings(), np.shape(ids)[1])

    def _moved(self, points: np.ndarray, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Points `[m, D]` of unit norm moved towards the first k of the rows `ids` `[m, L]`, float32 of unit norm."""
        ids, result = ids[:, : self.k], np.empty_like(points)
        step = max(1, _NUMBERS_AT_ONCE // (self.k * vectors.shape[1]))
        for start in tqdm(range(0, len(points), step), desc="Expanding", unit="block", delay=2):
            block = slice(start, start + step)
            rows = vectors[ids[block]]
            cosines = np.einsum("qd,qkd->qk", points[block], rows)
            weights = np.where(ids[block] < 0, 0, np.maximum(cosines, 0) ** self.alpha)
            result[block] = unit_vectors(points[block] + np.einsum("qk,qkd->qd", weights, rows))
        return result


def _search(queries: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest inner products float32 `[Q, count]` with rows of `vectors` `[n, D]`, and ids int64."""
    scores = np.full((len(queries), count), -np.inf, np.float32)
    ids, found = np.full((len(queries), count), -1, np.int64), min(count, len(vectors))
    base, step = torch.from_numpy(vectors).T, max(1, _NUMBERS_AT_ONCE // len(vectors))
    for start in tqdm(range(0, len(queries), step), desc="Searching anew", unit="block", delay=2):
        cosines = torch.from_numpy(queries[start : start + step]) @ base
        least = cosines.topk(found, dim=1).values[:, -1].numpy()
        for query, (own, limit) in enumerate(zip(cosines.numpy(), least, strict=True), start):
            # All that tie with the last, of which topk keeps any.
            there = np.flatnonzero(own >= limit)
            best = there[np.argsort(-own[there], kind="stable")[:found]]
            scores[query, :found], ids[query, :found] = own[best], best
    return scores, ids
