"""diffusion: its formulas in loops, closed forms of small graphs, symmetries, graphs that hardly hold together."""

import numpy as np
import pytest
from drawn_vectors import clusters, search
from scipy import sparse

from tcq_hf.rerank import diffusion as module
from tcq_hf.rerank import lists as lists_module
from tcq_hf.rerank.diffusion import Diffusion, diffuse, transitions
from tcq_hf.rerank.graph import KNNGraph


def drawn():
    return clusters(80, 12, count=4, spread=0.6)


def step_by_loop(graph, k, gamma):
    """S of the definition, dense float64."""
    n = len(graph)
    near = graph.neighbours[:, : k - 1].tolist()
    edges = np.zeros((n, n))
    for i in range(n):
        for place, j in enumerate(near[i]):
            if j >= 0 and i in near[j]:
                edges[i, j] = max(float(graph.scores[i, place]), 0) ** gamma
    sums = edges.sum(axis=1)
    for i in range(n):
        for j in range(n):
            if edges[i, j]:
                edges[i, j] /= np.sqrt(sums[i] * sums[j])
    return edges


def flow_by_loop(step, alpha, steps, keep):
    """F, of each row the largest entries after each step, dense float64."""
    rows = []
    for i in range(len(step)):
        row = np.eye(len(step))[i]
        for _ in range(steps):
            row = alpha * row @ step + np.eye(len(step))[i]
            row[np.argsort(-row, kind="stable")[keep:]] = 0
        rows.append(row)
    return np.array(rows)


def cosines_by_loop(flow, gallery, queries, ids, query_k, gamma):
    """Cosines of the rows of F of queries and gallery, dense float64 `[Q, n]`."""
    found = []
    for query, listed in zip(queries.astype(float), ids.tolist(), strict=True):
        mixed = sum(max(query @ gallery[row].astype(float), 0) ** gamma * flow[row] for row in listed[:query_k])
        found.append(flow @ mixed / np.linalg.norm(flow, axis=1) / np.linalg.norm(mixed))
    return np.array(found)


# --- The formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_transitions_are_those_of_a_loop(gamma):
    # Half of all other rows, so that some have a negative cosine.
    graph = KNNGraph.build(np.random.default_rng(0).standard_normal((30, 5)), 15)
    assert (graph.scores < 0).any()
    found = transitions(graph, gamma)
    # Quotients of sums of 15 numbers in float32.
    np.testing.assert_allclose(found.toarray(), step_by_loop(graph, 16, gamma), atol=1e-6)
    assert (found.dtype, found.indices.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("keep", [3, 10, 80])
@pytest.mark.parametrize("block", [7, 512])
def test_the_flow_is_that_of_a_loop(monkeypatch, keep, block):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", block)
    step = transitions(KNNGraph.build(drawn()[0], 9), 3.0)
    expected = flow_by_loop(step.toarray().astype(float), 0.99, 20, keep)
    # 20 steps of sums of 10 products, entries below 20, in float32.
    np.testing.assert_allclose(diffuse(step, 0.99, 20, keep).toarray(), expected, atol=1e-4)


def test_two_rows_that_name_each_other_pass_everything_back_and_forth():
    graph = KNNGraph.build(np.array([[1, 0.1], [1, -0.1]]), 1)
    step = transitions(graph, 3.0)
    np.testing.assert_allclose(step.toarray(), [[0, 1], [1, 0]], atol=1e-6)
    even, odd = sum(0.9**t for t in range(0, 21, 2)), sum(0.9**t for t in range(1, 21, 2))
    # 21 additions of numbers below 6 in float32.
    np.testing.assert_allclose(diffuse(step, 0.9, 20, 2).toarray(), [[even, odd], [odd, even]], atol=1e-5)


def test_many_steps_are_the_inverse():
    step = transitions(KNNGraph.build(drawn()[0], 9), 3.0)
    inverse = np.linalg.inv(np.eye(80) - 0.5 * step.toarray().astype(float))
    # What 40 steps leave out is below 2^-40.
    np.testing.assert_allclose(diffuse(step, 0.5, 40, 80).toarray(), inverse, atol=1e-5)


@pytest.mark.parametrize("keep", [10, 80])
def test_the_new_ranking_is_that_of_a_loop(keep):
    gallery, queries = drawn()
    graph = KNNGraph.build(gallery, 9)
    scores, ids = search(queries, gallery, 15)
    found, rows = Diffusion(k=8, query_k=4, gamma=2.0, alpha=0.9, steps=6, keep=keep).fit(graph)(queries, scores, ids)
    flow = flow_by_loop(step_by_loop(graph, 8, 2.0), 0.9, 6, keep)
    cosines = cosines_by_loop(flow, gallery, queries, ids, 4, 2.0)
    for query in range(len(queries)):
        outside = [row for row in np.argsort(-cosines[query]) if cosines[query, row] > 0]
        expected = outside + [row for row in ids[query] if row not in outside]
        assert rows[query].tolist() == expected[:15]
    # Cosines of sums of 80 products in float32.
    np.testing.assert_allclose(found, np.take_along_axis(cosines, rows, axis=1), atol=1e-5)
    assert (found.dtype, rows.dtype) == (np.float32, np.int64)
    # Rows that the search had not found come in.
    assert any(set(new) - set(old) for new, old in zip(rows, ids, strict=True))


def test_the_order_of_rows_plays_no_part():
    gallery, queries = drawn()
    order = np.random.default_rng(1).permutation(80)
    results = []
    for vectors in (gallery, gallery[order]):
        reranker = Diffusion(k=8, query_k=3).fit(KNNGraph.build(vectors, 7))
        results.append(reranker(queries, *search(queries, vectors, 20)))
    (scores, rows), (permuted_scores, permuted) = results
    np.testing.assert_array_equal(order[permuted], rows)
    # Sums in another order, of numbers at most 1.
    np.testing.assert_allclose(permuted_scores, scores, atol=1e-5)


def test_queries_ranked_apart_are_ranked_as_together(monkeypatch):
    gallery, queries = drawn()
    reranker, lists = Diffusion(k=8).fit(KNNGraph.build(gallery, 7)), search(queries, gallery, 20)
    scores, rows = reranker(queries, *lists)
    monkeypatch.setattr(lists_module, "_QUERIES_AT_ONCE", 5)
    parts = [
        reranker(queries, *lists),
        [
            np.concatenate(each)
            for each in zip(
                *(reranker(queries[q : q + 1], lists[0][q : q + 1], lists[1][q : q + 1]) for q in range(len(queries))),
                strict=True,
            )
        ],
    ]
    for some_scores, some_rows in parts:
        np.testing.assert_array_equal(some_rows, rows)
        np.testing.assert_allclose(some_scores, scores, atol=1e-6)
    empty_scores, empty_rows = reranker(queries[:0], np.zeros((0, 3)), np.zeros((0, 3), int))
    assert (empty_scores.shape, empty_rows.shape) == ((0, 3), (0, 3))


# --- What stands for a query ------------------------------------------------------------------------------------------


def test_the_length_of_queries_and_the_scale_of_scores_play_no_part():
    gallery, queries = drawn()
    graph = KNNGraph.build(gallery, 7)
    bare = KNNGraph(graph.neighbours, graph.scores)
    scores, ids = search(queries, gallery, 20)
    expected = Diffusion(k=8).fit(graph)(queries, scores, ids)
    others = (
        Diffusion(k=8).fit(graph)(3 * queries, np.zeros_like(scores), ids),
        Diffusion(k=8).fit(graph)(None, scores, ids),
        Diffusion(k=8).fit(graph)(None, 8 * scores, ids),
        Diffusion(k=8).fit(bare)(queries, scores, ids),
    )
    for found in others:
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


def test_a_short_list_stands_for_its_query_and_its_empty_places_stay_behind():
    gallery, queries = drawn()
    reranker = Diffusion(k=8, query_k=5, steps=1).fit(KNNGraph.build(gallery, 7))
    scores, ids = search(queries, gallery, 2)
    ids = np.concatenate([ids, np.full((12, 78), -1)], axis=1)
    scores = np.concatenate([scores, np.full((12, 78), np.nan, np.float32)], axis=1)
    found, rows = reranker(queries, scores, ids)
    reached = (rows >= 0).sum(axis=1)
    assert ((reached >= 2) & (reached < 80)).all()
    for query in range(12):
        assert (rows[query, reached[query] :] == -1).all()
        assert (found[query, reached[query] :] == -np.inf).all()
        assert set(ids[query, :2]) <= set(rows[query])


def test_a_query_that_nothing_flows_from_keeps_its_list():
    gallery, _ = drawn()
    reranker = Diffusion(k=8).fit(KNNGraph.build(gallery, 7))
    ids = np.array([[5, 3, 70, -1], [1, 2, 4, 8]])
    for queries in (np.zeros((2, 6), np.float32), None):
        found, rows = reranker(queries, np.zeros((2, 4)), ids)
        assert rows.tolist() == ids.tolist()
        assert found.tolist() == [[0, 0, 0, -np.inf], [0, 0, 0, 0]]


# --- Graphs that hardly hold together ---------------------------------------------------------------------------------


def test_a_row_without_mutual_neighbours_keeps_itself_alone():
    neighbours = np.array([[1, 2], [0, 2], [1, 0], [0, 1], [-1, -1]])
    scores = np.array([[0.9, 0.8], [0.9, 0.8], [0.8, 0.8], [0.3, 0.2], [0, 0]], np.float32)
    graph = KNNGraph(neighbours, scores)
    flow = diffuse(transitions(graph, 3.0), 0.99, 20, 5).toarray()
    np.testing.assert_array_equal(flow[3:], np.eye(5)[3:])
    assert (flow[:3, :3] > 0).all()
    found, rows = Diffusion(k=3, query_k=1).fit(graph)(None, [[0.5, 0.4, 0.3]], [[3, 4, 0]])
    assert rows.tolist() == [[3, 4, 0]]
    assert found.tolist() == [[1, 0, 0]]


def test_copies_are_warned_of_and_rank_alike():
    vectors = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0)
    graph = KNNGraph.build(vectors, 9)
    with pytest.warns(UserWarning, match="100% of the 9 nearest neighbours of rows are copies of them"):
        reranker = Diffusion(k=10, query_k=2).fit(graph)
    found, rows = reranker(np.eye(4, dtype=np.float32), *search(np.eye(4, dtype=np.float32), vectors, 10))
    assert [set(each // 10) for each in rows] == [{0}, {1}, {2}, {3}]
    # Each clique is whole, so that flow reaches all its rows alike.
    assert (found > 0.9).all()


# --- Queries in the graph ---------------------------------------------------------------------------------------------


def test_transductive_ranks_by_one_graph_of_gallery_and_queries():
    gallery, queries = drawn()
    lists = search(queries, gallery, 15)
    found, rows = Diffusion(k=8, transductive=True).fit(KNNGraph.build(gallery, 9))(2 * queries, *lists)
    union = KNNGraph.build(np.concatenate([gallery, queries]), 9)
    flow = flow_by_loop(step_by_loop(union, 8, 3.0), 0.99, 20, 200)
    norms = np.linalg.norm(flow, axis=1)
    cosines = (flow @ flow.T / norms[:, None] / norms)[80:, :80]
    for query in range(len(queries)):
        reached = [row for row in np.argsort(-cosines[query]) if cosines[query, row] > 0]
        expected = reached + [row for row in lists[1][query] if row not in reached]
        assert rows[query].tolist() == expected[:15]
    np.testing.assert_allclose(found, np.take_along_axis(cosines, rows, axis=1), atol=1e-5)


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k counts the row itself and must be at least 2, got 1"),
        ({"query_k": 0}, "query_k, steps and keep must be at least 1, got query_k=0, steps=20 and keep=200"),
        ({"steps": 0}, "steps=0"),
        ({"keep": 0}, "keep=0"),
        ({"gamma": 0.0}, "gamma must be above 0 and alpha between 0 and 1, got gamma=0.0 and alpha=0.99"),
        ({"gamma": np.inf}, "gamma=inf"),
        ({"gamma": np.nan}, "gamma=nan"),
        ({"alpha": 1.0}, "alpha=1.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


def test_impossible_graphs_are_refused():
    graph = KNNGraph.build(drawn()[0], 7)
    with pytest.raises(ValueError, match="k=9 counts the row itself and needs 8 neighbours a row, the graph holds 7"):
        Diffusion(k=9).fit(graph)
    with pytest.raises(ValueError, match="transductive=True puts queries into the graph, and this one has no vectors"):
        Diffusion(k=8, transductive=True).fit(KNNGraph(graph.neighbours, graph.scores))
    with pytest.raises(ValueError, match="transductive=True with k=8 needs a gallery of at least 8 rows, got 7"):
        Diffusion(k=8, transductive=True).fit(KNNGraph.build(drawn()[0][:7], 6))
    with pytest.raises(RuntimeError, match=r"call fit\(graph\) first"):
        Diffusion(k=8)(None, [[1.0]], [[0]])


@pytest.mark.parametrize(
    ("queries", "scores", "ids", "message"),
    [
        (np.ones((2, 6)), [[1.0]], [[0]], r"queries must be float \[1, 6\]"),
        (np.ones((1, 5)), [[1.0]], [[0]], r"queries must be float \[1, 6\]"),
        (np.full((1, 6), np.nan), [[1.0]], [[0]], "query 0 is not"),
        (None, [[1.0]], [[80]], "the list of query 0 has an id that is no row from 0 to 79"),
        (None, [[1.0], [np.nan]], [[0], [1]], "the list of query 1 has a score that is NaN"),
        (None, [[1.0], [np.inf]], [[0], [1]], "must be finite, one of query 1 is not"),
    ],
)
def test_impossible_lists_are_refused(queries, scores, ids, message):
    reranker = Diffusion(k=8).fit(KNNGraph.build(drawn()[0], 7))
    with pytest.raises(ValueError, match=message):
        reranker(queries, scores, ids)


def test_transductive_needs_queries():
    reranker = Diffusion(k=8, transductive=True).fit(KNNGraph.build(drawn()[0], 7))
    with pytest.raises(ValueError, match="transductive=True needs queries, got None"):
        reranker(None, [[1.0]], [[0]])


def test_the_flow_of_a_graph_without_edges_is_the_identity():
    step = sparse.csr_array((4, 4), dtype=np.float32)
    np.testing.assert_array_equal(diffuse(step, 0.99, 20, 200).toarray(), np.eye(4))
