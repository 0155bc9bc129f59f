"""Rank Flow Embedding: a graph in, its lists ranked anew and a vector for each row and query out."""

from typing import Any

import numpy as np
from scipy import sparse

from .graph import KNNGraph, rows_to
from .graph_checks import require_neighbours, require_room_for_queries, warn_if_degenerate
from .lists import check_lists, rank_in_blocks, unit_queries
from .rank_steps import (
    components,
    confidences,
    hyperedge_weights,
    hyperedges,
    pairs_of_components,
    ranked_both_ways,
    sorted_by_hyperedges,
    start_lists,
    widened,
)
from .sparse_rows import narrow, unit_rows

_NOT_FITTED = "RankFlow knows no gallery yet: call fit(graph) first"


class RankFlow:
    """Re-ranking and embedding by the lists of the gallery (RFE; Valem, Pedronette and Latecki, IEEE TIP 2023).

    Each row has a list of `depth` rows, itself first, pos_q(i) is the place of i in the list of q, and L + 2 if it has
    none in a list of L. Sorting is stable, and the row itself stays first.

    1. Lists are sorted by `sig(pos_q(i))^2 sig(pos_i(q))`, `sig(1) = 1`, `sig(x) = 1 / (1 + exp((x - k // 2) / 10))`.
    2. `iterations` times: hyperedges `W_q(i) = 1 - ln pos_q(i) / ln k` of the first k, `E = W + W W`, of which
       `E * E^T` is left, element by element; lists are sorted by `<E_q, E_i> / pos_q(i)`.
    3. The confidence c_q is the sum of the k largest entries of E_q, divided by the largest such sum. Lists, with all
       rows of `C = E^T diag(c) E` taken in, are sorted by C.
    4. Edges from rows to the first k of their lists are ranked by `<E_q, E_i> c_q c_i`, and the best
       `ceil(edges mean(c) / 2)` tie rows into components; of those with more than one row, `e_r` is the sum of E over
       the rows. The embedding is `Z_q = [<E_q, e_r>]_r`.
    5. The k strongest entries of e_r, at places i and j, add `(1 + sqrt(i j) <Z_a, Z_b>) / pos_a(b)` to the pair of
       rows (a, b); lists are sorted by it.

    A query is `W_q Z` of the first k rows of its list, and the gallery is ranked by the cosine of Z: rows that are not
    in the list come in, and rows whose Z has nothing in common with that of the query follow in the order of the list.

    Rows that share their code make it worse than no re-ranking (`fit` warns), and so did the photographs that it was
    measured on (docs/benchmarks/reranking.md); digits gained .16 of mAP. Z is held sparse; with n / 15 components
    `embeddings()` of 50,000 rows takes 0.7 GB and of 100,000 rows 2.7 GB (digits have n / 18).

    Args:
        k: Rows of a neighbourhood, the row itself counted.
        iterations: Rounds of step 2.
        depth: Length of lists, the row itself counted; a graph of fewer neighbours makes them shorter.
        components: Take steps 4 and 5. Without them there is no embedding, only `ranked()`.
        transductive: Put all queries of a call into the graph, as papers on manifolds do, and rank by the cosine of
            their own rows of Z. What a query gets then depends on the others: report such figures as transductive.

    Raises:
        ValueError: If a number is out of range, or queries are to be ranked without components.
    """

    def __init__(
        self,
        k: int = 20,
        iterations: int = 2,
        depth: int = 400,
        components: bool = True,
        transductive: bool = False,
    ) -> None:
        if k < 2 or iterations < 1 or depth < k:
            raise ValueError(
                "k counts the row itself and must be at least 2, iterations at least 1 and depth at least k, got "
                f"k={k}, iterations={iterations} and depth={depth}"
            )
        if transductive and not components:
            raise ValueError("transductive=True ranks by the embedding, which needs components=True")
        self.k, self.iterations, self.depth = k, iterations, depth
        self.components, self.transductive = components, transductive
        self._graph: KNNGraph | None = None
        self._ranked: tuple[np.ndarray, np.ndarray] | None = None
        self._embedding: sparse.csr_array | None = None
        self._columns: sparse.csr_array | None = None

    def fit(self, graph: KNNGraph, *more: KNNGraph) -> "RankFlow":
        """Let ranks flow through the gallery; if transductive, that waits for the queries.

        Args:
            graph: Graph of the gallery with at least k - 1 neighbours a row, or all other rows; `depth - 1` make lists
                of `depth` rows.
            more: Graphs of the same rows by other models, to be fused: a pair of rows has the sum of its scores of step
                1, plus one for each graph that lists it.

        Raises:
            ValueError: If a graph holds fewer neighbours or other rows than the first, or for a transductive re-ranker
                has no vectors, too few rows or company.
        """
        for each in (graph, *more):
            require_neighbours(each, self.k - 1, f"k={self.k} counts the row itself and")
            if len(each) != len(graph):
                raise ValueError(f"all graphs must be of the same rows, got graphs of {len(graph)} and {len(each)}")
            warn_if_degenerate(each, self.k)
        if self.transductive and more:
            raise ValueError("transductive=True puts queries into the graph, which must be one")
        if self.transductive:
            require_room_for_queries(graph, self.k - 1, f"k={self.k}")
        if not self.transductive:
            self._ranked, self._embedding = self._flow(graph, *more)
            self._columns = None if self._embedding is None else unit_rows(self._embedding).T.tocsr()
        self._graph = graph
        return self

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """The lists of the gallery in their last order.

        Returns:
            Scores of the last step, float32 `[n, L]`, of the row itself the largest of its list, 0 for rows that the
            step says nothing of; and ids int64 `[n, L]`, the row itself first. -inf and -1 where a list is shorter.

        Raises:
            RuntimeError: Before fit.
            ValueError: If transductive.
        """
        self._check("ranked")
        return self._ranked

    def embeddings(self) -> np.ndarray:
        """Z of each row of the gallery, float32 `[n, C]` of unit norm, for FAISS or a dataset column.

        Rows that share nothing with a component are zeros, so that an index of them must be one of inner products: by
        distance zeros would stand before all that is less than half alike.

        Raises:
            RuntimeError: Before fit.
            ValueError: If transductive, or without components.
        """
        self._check("embeddings")
        return unit_rows(self._embedding).toarray()

    def embed_queries(self, scores: Any, ids: Any) -> np.ndarray:
        """Z of queries, float32 `[Q, C]` of unit norm, to search an index of `embeddings()` with, by inner product.

        Args:
            scores: Numbers `[Q, k]` of their lists, checked but not used.
            ids: Integers `[Q, k]`; the first `self.k` of them stand for the query, or what there is.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists are impossible; if transductive, or without components.
        """
        self._check("embed_queries")
        return self._embedded(check_lists(scores, ids, len(self._graph))[1]).toarray()

    @property
    def num_rows(self) -> int:
        """Rows of the gallery; RuntimeError before fit."""
        if self._graph is None:
            raise RuntimeError(_NOT_FITTED)
        return len(self._graph)

    def __call__(self, queries: np.ndarray | None, scores: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the gallery whose embeddings are most like that of each query.

        Args:
            queries: Float `[Q, D]`, of any length; looked at only if transductive.
            scores: Numbers `[Q, k]`, as of `index.search`, checked but not used.
            ids: Integers `[Q, k]`; the first `self.k` of them stand for the query, or what there is.

        Returns:
            Cosines of Z, float32 `[Q, k]`, 0 for rows of the list that have nothing in common with the query; and ids
            int64 `[Q, k]`. -inf and -1 stay behind.

        Raises:
            RuntimeError: Before fit.
            TypeError: If scores or ids are of another type.
            ValueError: If lists or queries are impossible, without components, or if a transductive re-ranker gets no
                queries.
        """
        if not self.transductive:
            self._check("ranking")
        elif self._graph is None:
            raise RuntimeError(_NOT_FITTED)
        scores, ids = check_lists(scores, ids, len(self._graph))
        if not self.transductive:
            return rank_in_blocks(lambda block: self._embedded(ids[block]) @ self._columns, scores, ids)
        if not len(ids):
            return scores, ids
        points, columns = self._with_queries(queries, len(ids))
        return rank_in_blocks(lambda block: points[block] @ columns, scores, ids)

    def _check(self, what: str) -> None:
        if self._graph is None:
            raise RuntimeError(_NOT_FITTED)
        if self.transductive:
            raise ValueError(f"{what} needs a gallery of its own, transductive=False: this one is mixed with queries")
        if what != "ranked" and not self.components:
            raise ValueError(f"{what} needs the embedding of steps 4 and 5, components=True")

    def _embedded(self, ids: np.ndarray) -> sparse.csr_array:
        """Z of queries at unit norm, float32 `[Q, C]`."""
        near = ids[:, : self.k]
        weights = np.tile(hyperedge_weights(self.k)[: near.shape[1]], (len(near), 1))
        return unit_rows(narrow(rows_to(near, weights, len(self._graph))) @ self._embedding)

    def _with_queries(self, queries: np.ndarray | None, count: int) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Z of queries `[Q, C]` in one graph with the gallery, and that of the gallery, transposed `[C, n]`."""
        if queries is None:
            raise ValueError("transductive=True needs queries, got None")
        n, width = self._graph.vectors.shape
        embedding = unit_rows(self._flow(self._graph.append(unit_queries(queries, count, width)))[1])
        return embedding[n:], embedding[:n].T.tocsr()

    def _flow(self, *graphs: KNNGraph) -> tuple[tuple[np.ndarray, np.ndarray], sparse.csr_array | None]:
        """Lists of all rows, scores and ids `[n, L]`, and Z, float32 `[n, C]`."""
        depth = min(self.depth, *(graph.neighbours.shape[1] + 1 for graph in graphs))
        lists = ranked_both_ways([start_lists(graph, depth) for graph in graphs], self.k)
        for _ in range(self.iterations):
            lists = sorted_by_hyperedges(lists, hyperedges(lists, self.k))
        edges = hyperedges(lists, self.k)
        weighted = edges.multiply(confidences(edges, self.k)[:, None]).tocsr()
        lists, scores = widened(lists, lambda rows: edges[rows] @ weighted)
        if not self.components:
            return (scores, lists.astype(np.int64)), None
        edges = hyperedges(lists, self.k)
        strengths = (components(lists, edges, confidences(edges, self.k), self.k) @ edges).tocsr()
        embedding = (edges @ strengths.T).tocsr()
        pairs = pairs_of_components(strengths, embedding, self.k)
        lists, scores = widened(lists, lambda rows: pairs[rows], by_place=True)
        return (scores, lists.astype(np.int64)), embedding
