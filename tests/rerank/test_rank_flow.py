"""rank_flow: a graph of six rows by hand, the steps in loops, two cliques and a bridge, graphs that say little."""

import numpy as np
import pytest
from drawn_vectors import clusters, search, unit

from tcq_hf.rerank import lists, rank_steps
from tcq_hf.rerank.graph import KNNGraph
from tcq_hf.rerank.rank_flow import RankFlow
from tcq_hf.rerank.rank_steps import components, confidences, hyperedge_weights, hyperedges, place_scores, start_lists


def drawn(rows=90, seed=0):
    return clusters(rows, 10, count=6, spread=0.5, seed=seed)


def graph_of(lists):
    """A graph of lists that begin with the row itself."""
    neighbours = np.array(lists)[:, 1:]
    return KNNGraph(neighbours, np.tile(np.linspace(0.9, 0.1, neighbours.shape[1], dtype=np.float32), (len(lists), 1)))


# --- The steps in loops -----------------------------------------------------------------------------------------------


class Loop:
    """Rank Flow Embedding, step by step, in lists of Python numbers and float64."""

    def __init__(self, lists, k, iterations, ranked=False):
        self.lists, self.k, self.n, self.depth = lists.tolist(), k, len(lists), len(lists[0])
        if not ranked:
            self.sort(self.by_places)
        for _ in range(iterations):
            self.edges = self.hyperedges()
            self.sort(lambda q, i: self.edges[q] @ self.edges[i] / self.place(q, i))
        self.edges = self.hyperedges()
        self.scores = self.edges.T @ np.diag(self.confidence()) @ self.edges
        self.widen(lambda q, i: self.scores[q, i])
        self.third = [list(row) for row in self.lists]
        self.edges = self.hyperedges()
        self.groups = self.components()
        self.strengths = [sum(self.edges[o] for o in group) for group in self.groups]
        self.embedding = np.array([[row @ each for each in self.strengths] for row in self.edges])
        pairs = self.pairs()
        self.widen(lambda q, i: pairs.get((q, i), 0) / self.place(q, i))

    def place(self, q, i):
        return self.lists[q].index(i) + 1 if i in self.lists[q] else self.depth + 2

    def sigmoid(self, x):
        return 1 if x == 1 else 1 - 1 / (1 + np.exp(-0.1 * (x - self.k // 2)))

    def by_places(self, q, i):
        return self.sigmoid(self.place(q, i)) ** 2 * self.sigmoid(self.place(i, q))

    def sort(self, score):
        new = []
        for q, row in enumerate(self.lists):
            scores = {i: score(q, i) for i in row if i >= 0}
            found = sorted(scores, key=lambda i: -scores[i])
            own = found.index(q)
            found[0], found[own] = found[own], found[0]
            new.append(found + [-1] * (self.depth - len(found)))
        self.lists = new

    def widen(self, score):
        new = []
        for q, row in enumerate(self.lists):
            listed = [i for i in row if i >= 0]
            more = [i for i in range(self.n) if i not in listed and score(q, i) > 0]
            scores = {i: np.inf if i == q else score(q, i) for i in listed + more}
            found = sorted(scores, key=lambda i: -scores[i])[: self.depth]
            new.append(found + [-1] * (self.depth - len(found)))
        self.lists = new

    def hyperedges(self):
        first = np.zeros((self.n, self.n))
        for q, row in enumerate(self.lists):
            for p, i in enumerate(row[: self.k]):
                if i >= 0:
                    first[q, i] = 1 - np.log(p + 1) / np.log(self.k)
        reached = first + first @ first
        return reached * reached.T

    def confidence(self):
        sums = np.array([np.sort(row)[::-1][: self.k].sum() for row in self.edges])
        return sums / sums.max()

    def components(self):
        c = self.confidence()
        edges = [(q, i) for q, row in enumerate(self.lists) for i in row[1 : self.k] if i >= 0]
        scores = {(q, i): self.edges[q] @ self.edges[i] * c[q] * c[i] for q, i in edges}
        best = sorted(edges, key=lambda edge: -scores[edge])[: int(np.ceil(len(edges) * c.mean() / 2))]
        labels = list(range(self.n))
        for q, i in best:
            if scores[q, i] > 0:
                labels = [labels[q] if label == labels[i] else label for label in labels]
        groups = [[q for q in range(self.n) if labels[q] == label] for label in dict.fromkeys(labels)]
        return [group for group in groups if len(group) > 1]

    def pairs(self):
        found = {}
        for strength in self.strengths:
            best = [i for i in np.argsort(-strength, kind="stable")[: self.k].tolist() if strength[i] > 0]
            for i, a in enumerate(best, 1):
                for j, b in enumerate(best, 1):
                    shared = self.embedding[a] @ self.embedding[b]
                    found[a, b] = found.get((a, b), 0) + 1 + np.sqrt(i * j) * shared
        return found


def cosines(embedding):
    rows = unit(embedding)
    return rows @ rows.T


# Rows whose scores are equal but for rounding may change places; in these sets none does.
@pytest.mark.parametrize(("k", "depth", "seed"), [(6, 20, 0), (6, 90, 1), (5, 12, 4), (8, 40, 3)])
@pytest.mark.parametrize("block", [900, 2**22])
def test_all_steps_are_those_of_a_loop(monkeypatch, k, depth, seed, block):
    monkeypatch.setattr(rank_steps, "_NUMBERS_AT_ONCE", block)
    graph = KNNGraph.build(drawn(seed=seed)[0], depth - 1)
    loop = Loop(start_lists(graph, depth), k, 2)
    fitted = RankFlow(k, 2, depth).fit(graph)
    assert RankFlow(k, 2, depth, components=False).fit(graph).ranked()[1].tolist() == loop.third
    assert fitted.ranked()[1].tolist() == loop.lists
    assert fitted.embeddings().shape == loop.embedding.shape
    # Cosines of sums of some hundred products in float32.
    np.testing.assert_allclose(fitted.embeddings() @ fitted.embeddings().T, cosines(loop.embedding), atol=1e-5)


def test_missing_neighbours_are_stepped_over():
    full = KNNGraph.build(drawn()[0], 11)
    cut = np.random.default_rng(1).integers(0, 12, size=(90, 1))
    graph = KNNGraph(np.where(np.arange(11) < cut, full.neighbours, -1), full.scores)
    loop = Loop(start_lists(graph, 12), 5, 2)
    scores, ids = RankFlow(5, 2, components=False).fit(graph).ranked()
    assert ids.tolist() == loop.third
    assert ((ids == -1) == (scores == -np.inf)).all()
    fitted = RankFlow(5, 2).fit(graph)
    np.testing.assert_allclose(fitted.embeddings() @ fitted.embeddings().T, cosines(loop.embedding), atol=1e-5)


def test_the_order_of_rows_plays_no_part():
    gallery, queries = drawn()
    order = np.random.default_rng(1).permutation(90)
    results = []
    for vectors in (gallery, gallery[order]):
        fitted = RankFlow(6, depth=30).fit(KNNGraph.build(vectors, 29))
        results.append((fitted.embeddings(), fitted(queries, *search(queries, vectors, 20))))
    (embedding, (scores, _)), (permuted, (permuted_scores, _)) = results
    np.testing.assert_allclose(permuted @ permuted.T, (embedding @ embedding.T)[order][:, order], atol=1e-5)
    # Rows whose Z points the same way tie, so that only scores compare.
    np.testing.assert_allclose(permuted_scores, scores, atol=1e-5)


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_six_rows_by_hand():
    # Two triangles; place 4, the other triangle, has the weight 0.
    lists = [[0, 1, 2, 3], [1, 0, 2, 4], [2, 0, 1, 5], [3, 4, 5, 0], [4, 3, 5, 1], [5, 3, 4, 2]]
    fitted = RankFlow(k=4, iterations=1, depth=4).fit(graph_of(lists))
    u, v = 0.5, 1 - np.log(3) / np.log(4)
    np.testing.assert_allclose(hyperedge_weights(4), [1, u, v, 0], atol=1e-7)
    edges = hyperedges(np.array(lists, np.int32), 4).toarray()
    # W is [1, u, v], [u, 1, v], [u, v, 1], and so W + W W of one triangle:
    reached = [
        [2 + u * u + u * v, 3 * u + v * v, 3 * v + u * v],
        [3 * u + u * v, 2 + u * u + v * v, 3 * v + u * v],
        [3 * u + u * v, u * u + 3 * v, 2 + v * v + u * v],
    ]
    triangle = np.array([[reached[i][j] * reached[j][i] for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(edges, np.kron(np.eye(2), triangle), atol=1e-5)
    sums = triangle.sum(axis=1)
    np.testing.assert_allclose(confidences(hyperedges(np.array(lists), 4), 4), np.tile(sums / sums.max(), 2), atol=1e-6)
    cartesian = sum(sums[i] / sums.max() * np.outer(triangle[i], triangle[i]) for i in range(3))
    scores, ids = RankFlow(k=4, iterations=1, depth=4, components=False).fit(graph_of(lists)).ranked()
    assert ids.tolist() == lists
    for row, listed in enumerate(lists):
        expected = [cartesian[row % 3, other % 3] for other in listed[:3]]
        np.testing.assert_allclose(scores[row], [max(expected), *expected[1:], 0], rtol=1e-5)
    # Each triangle is a component, of which e is the sum of its rows of E; Z points along its own.
    strength = triangle.sum(axis=0)
    np.testing.assert_allclose(
        fitted._embedding.toarray(), np.kron(np.eye(2), (triangle @ strength)[:, None]), rtol=1e-5
    )
    np.testing.assert_allclose(fitted.embeddings(), np.repeat(np.eye(2), 3, axis=0), atol=1e-6)
    assert fitted.ranked()[1][:, 0].tolist() == list(range(6))
    assert [set(row) for row in fitted.ranked()[1][:, :3].tolist()] == [{0, 1, 2}] * 3 + [{3, 4, 5}] * 3
    # A query among the first three, whose second row is of the other triangle: W_q is 1 and u.
    query = fitted.embed_queries([[0.9, 0.8]], [[1, 4]])
    z = (triangle @ strength)[1]
    np.testing.assert_allclose(query, unit(np.array([[z, u * z]])), atol=1e-6)


def test_two_cliques_are_two_components_and_the_bridge_is_dropped():
    # Place 6 has the weight 0. At place 5, rows 0 and 5 name each other instead of one of their own.
    lists = np.array([[q, *((q + step) % 5 for step in range(1, 5)), 9 - q] for q in range(5)])
    lists[0, 4:] = [5, 4]
    lists = np.concatenate([lists, (lists + 5) % 10]).astype(np.int32)
    edges = hyperedges(lists, 6)
    assert edges[0, 5] > 0
    support = (edges @ edges).toarray()
    assert support[0, 5] > 0
    members = components(lists, edges, confidences(edges, 6), 6).toarray()
    assert members.tolist() == [[1] * 5 + [0] * 5, [0] * 5 + [1] * 5]
    embedding = RankFlow(k=6, depth=6).fit(graph_of(lists)).embeddings()
    assert embedding.argmax(axis=1).tolist() == [0] * 5 + [1] * 5


def test_scores_of_places_fall_with_both_places():
    lists = np.array([[0, 1, 2], [1, 2, 0], [2, 1, 3], [3, 2, 1]], np.int32)
    sig = {1: 1, **{x: 1 / (1 + np.exp(0.1 * (x - 2))) for x in range(2, 6)}}
    # Row 3 is in the list of 2 and 2 in its own; 0 is in no list but that of 1; absent is place 5.
    expected = [[1, sig[2] ** 2 * sig[3], sig[3] ** 2 * sig[5]], [1, sig[2] ** 2 * sig[2], sig[3] ** 2 * sig[2]]]
    expected += [[1, sig[2] ** 2 * sig[2], sig[3] ** 2 * sig[2]], [1, sig[2] ** 2 * sig[3], sig[3] ** 2 * sig[5]]]
    np.testing.assert_allclose(place_scores(lists, 4), expected, rtol=1e-12)


# --- Several rankers --------------------------------------------------------------------------------------------------


def test_a_graph_fused_with_itself_is_that_graph():
    graph = KNNGraph.build(drawn()[0], 29)
    alone, twice = RankFlow(6, depth=30).fit(graph), RankFlow(6, depth=30).fit(graph, graph)
    np.testing.assert_array_equal(twice.ranked()[1], alone.ranked()[1])
    np.testing.assert_array_equal(twice.embeddings(), alone.embeddings())


def test_fused_lists_are_sorted_by_the_sum_of_scores():
    first, second = (KNNGraph.build(drawn(seed=seed)[0], 9) for seed in (0, 1))
    lists = [start_lists(graph, 10) for graph in (first, second)]
    fused = rank_steps.ranked_both_ways(lists, 4)
    for q in range(90):
        sums = dict.fromkeys([*lists[0][q].tolist(), *sorted(lists[1][q].tolist())], 0)
        for each in lists:
            for i, score in zip(each[q].tolist(), place_scores(each, 4)[q], strict=True):
                sums[i] += score + 1
        assert fused[q].tolist() == sorted(sums, key=lambda i: -sums[i])[:10]
    embedding = RankFlow(4, 2, depth=10).fit(first, second).embeddings()
    loop = Loop(fused, 4, 2, ranked=True)
    np.testing.assert_allclose(embedding @ embedding.T, cosines(loop.embedding), atol=1e-5)


# --- Queries ----------------------------------------------------------------------------------------------------------


def test_queries_are_ranked_by_the_cosine_of_their_embedding(monkeypatch):
    monkeypatch.setattr(lists, "_QUERIES_AT_ONCE", 4)
    gallery, queries = drawn()
    graph = KNNGraph.build(gallery, 29)
    loop, fitted = Loop(start_lists(graph, 30), 6, 2), RankFlow(6, depth=30).fit(graph)
    scores, ids = search(queries, gallery, 15)
    weights = np.zeros((10, 90))
    for q, row in enumerate(ids.tolist()):
        for p, i in enumerate(row[:6], 1):
            weights[q, i] = 1 - np.log(p) / np.log(6)
    expected = unit(weights @ loop.embedding) @ unit(loop.embedding).T
    found, places = fitted(queries, scores, ids)
    np.testing.assert_allclose(fitted.embed_queries(scores, ids) @ fitted.embeddings().T, expected, atol=1e-5)
    np.testing.assert_allclose(found, np.take_along_axis(expected, places, axis=1), atol=1e-5)
    np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :15], atol=1e-5)
    assert (found.dtype, places.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(fitted(None, scores, ids)[1], places)


def test_a_short_list_stands_for_its_query_and_its_empty_places_stay_behind():
    gallery, queries = drawn()
    fitted = RankFlow(6, depth=30).fit(KNNGraph.build(gallery, 29))
    scores, ids = search(queries, gallery, 5)
    short = np.where(np.arange(5) < 2, ids, -1)
    np.testing.assert_array_equal(fitted.embed_queries(scores, short), fitted.embed_queries(scores[:, :2], ids[:, :2]))
    found, rows = fitted(None, np.full((1, 3), np.nan), [[-1, -1, -1]])
    assert rows.tolist() == [[-1] * 3]
    assert found.tolist() == [[-np.inf] * 3]
    assert not fitted.embed_queries([[0.0]], [[-1]]).any()
    assert fitted.embed_queries(np.zeros((0, 3)), np.zeros((0, 3), int)).shape == (0, fitted.embeddings().shape[1])


def test_transductive_ranks_by_one_graph_of_gallery_and_queries():
    gallery, queries = drawn()
    scores, ids = search(queries, gallery, 15)
    found, rows = RankFlow(6, depth=30, transductive=True).fit(KNNGraph.build(gallery, 29))(2 * queries, scores, ids)
    union = RankFlow(6, depth=30).fit(KNNGraph.build(np.concatenate([gallery, queries]), 29)).embeddings()
    expected = union[90:] @ union[:90].T
    np.testing.assert_allclose(found, np.take_along_axis(expected, rows, axis=1), atol=1e-5)
    np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :15], atol=1e-5)


# --- Graphs that say little -------------------------------------------------------------------------------------------


def test_rows_that_no_one_names_are_zeros_and_keep_their_list():
    fitted = RankFlow(k=2, depth=3).fit(KNNGraph(np.full((4, 2), -1), np.zeros((4, 2), np.float32)))
    assert fitted.embeddings().shape == (4, 0)
    assert fitted.ranked()[1].tolist() == [[row, -1, -1] for row in range(4)]
    found, rows = fitted(None, [[0.9, 0.8]], [[2, 1]])
    assert (found.tolist(), rows.tolist()) == ([[0, 0]], [[2, 1]])


def test_copies_are_warned_of():
    graph = KNNGraph.build(np.repeat(np.eye(4, dtype=np.float32), 10, axis=0), 12)
    with pytest.warns(UserWarning, match="100% of the 5 nearest neighbours of rows are copies of them"):
        fitted = RankFlow(k=6).fit(graph)
    assert np.isfinite(fitted.embeddings()).all()


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"k": 1}, {"iterations": 0}, {"depth": 19}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="at least 2, iterations at least 1 and depth at least k, got k="):
        RankFlow(**options)


def test_impossible_graphs_are_refused():
    graph, fewer = KNNGraph.build(drawn()[0], 9), KNNGraph.build(drawn(80)[0], 9)
    with pytest.raises(ValueError, match="k=11 counts the row itself and needs 10 neighbours a row, the graph holds 9"):
        RankFlow(11).fit(graph)
    with pytest.raises(ValueError, match="all graphs must be of the same rows, got graphs of 90 and 80"):
        RankFlow(5).fit(graph, fewer)
    with pytest.raises(ValueError, match="transductive=True puts queries into the graph, which must be one"):
        RankFlow(5, transductive=True).fit(graph, graph)
    with pytest.raises(ValueError, match="and this one has no vectors"):
        RankFlow(5, transductive=True).fit(KNNGraph(graph.neighbours, graph.scores))
    with pytest.raises(ValueError, match="transductive=True with k=5 needs a gallery of at least 5 rows, got 4"):
        RankFlow(5, transductive=True).fit(KNNGraph.build(drawn()[0][:4], 3))


def test_what_a_flow_cannot_give_is_refused():
    graph = KNNGraph.build(drawn()[0], 9)
    with pytest.raises(ValueError, match="needs components=True"):
        RankFlow(5, components=False, transductive=True)
    bare, mixed = RankFlow(5, components=False).fit(graph), RankFlow(5, transductive=True).fit(graph)
    for ask in (bare.embeddings, lambda: bare.embed_queries([[1.0]], [[0]]), lambda: bare(None, [[1.0]], [[0]])):
        with pytest.raises(ValueError, match="needs the embedding of steps 4 and 5, components=True"):
            ask()
    for ask in (mixed.embeddings, mixed.ranked, lambda: mixed.embed_queries([[1.0]], [[0]])):
        with pytest.raises(ValueError, match="needs a gallery of its own, transductive=False"):
            ask()
    with pytest.raises(ValueError, match="transductive=True needs queries, got None"):
        mixed(None, [[1.0]], [[0]])


@pytest.mark.parametrize("transductive", [False, True])
def test_before_fit_there_is_nothing(transductive):
    new = RankFlow(transductive=transductive)
    for ask in (new.embeddings, new.ranked, lambda: new(None, [[1.0]], [[0]])):
        with pytest.raises(RuntimeError, match=r"call fit\(graph\) first"):
            ask()


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        ([[1.0]], [[90]], "the list of query 0 has an id that is no row from 0 to 89"),
        ([[1.0], [np.nan]], [[0], [1]], "the list of query 1 has a score that is NaN"),
        ([[1.0, 1.0]], [[0, 0]], "the list of query 0 has one id twice"),
    ],
)
def test_impossible_lists_are_refused(scores, ids, message):
    fitted = RankFlow(5).fit(KNNGraph.build(drawn()[0], 9))
    for ask in (fitted.embed_queries, lambda *lists: fitted(None, *lists)):
        with pytest.raises(ValueError, match=message):
            ask(scores, ids)
