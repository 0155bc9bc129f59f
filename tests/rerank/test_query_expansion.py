"""query_expansion: new queries against a loop and by hand, the new search against FAISS, what may not be given."""

import faiss
import numpy as np
import pytest
from drawn_vectors import search, unit

from tcq_hf.rerank import query_expansion as module
from tcq_hf.rerank.graph import KNNGraph
from tcq_hf.rerank.query_expansion import QueryExpansion


def vectors_of(rows=60, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def expanded_by_loop(point, rows, vectors, alpha):
    """One point of unit norm moved by the rows that are there."""
    total = point.astype(np.float64)
    for row in rows:
        if row >= 0:
            total = total + max(0.0, float(point @ vectors[row])) ** alpha * vectors[row].astype(np.float64)
    return total / np.linalg.norm(total)


def assert_best(found, cosines, atol=3e-6):
    """Lists hold the largest of the cosines `[Q, n]`, best first; what is nearer than rounding may change places."""
    scores, ids = found
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, : ids.shape[1]], atol=atol)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, ids, axis=1), atol=atol)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("alpha", [0, 1.5, 3.0])
@pytest.mark.parametrize("numbers", [1, 150, 2**24])
def test_new_queries_and_rows_are_those_of_a_loop(monkeypatch, database, alpha, numbers):
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", numbers)
    vectors, queries = vectors_of(), vectors_of(9, seed=1)
    graph, (scores, ids) = KNNGraph.build(vectors, 8), search(queries, vectors, 12)
    ids[3, 4:] = -1
    reranker = QueryExpansion(5, alpha, database).fit(graph)
    rows = unit(vectors)
    if database:
        rows = np.stack([expanded_by_loop(rows[i], graph.neighbours[i, :5], rows, alpha) for i in range(60)])
    # A sum of six vectors of length one and six products in float32; the loop goes on in double precision.
    np.testing.assert_allclose(reranker.embeddings(), rows, atol=1e-6)
    expected = [expanded_by_loop(q, ids[i, :5], rows, alpha) for i, q in enumerate(unit(queries))]
    found = reranker.expanded(queries, scores, ids)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert_best(reranker(queries, scores, ids), np.array(expected) @ rows.T)


def test_an_example_by_hand():
    graph = KNNGraph.build(np.array([[1.0, 0], [0, 1], [1, 1]]), 2)
    scores, ids = np.array([[1.0, 0.7, 0]]), np.array([[0, 2, 1]])
    query = np.array([[3.0, 0]], np.float32)
    # (1, 0) + 1 (1, 0) + sqrt(1/2) (sqrt(1/2), sqrt(1/2)) = (2.5, 0.5).
    found = QueryExpansion(2, alpha=1).fit(graph).expanded(query, scores, ids)
    np.testing.assert_allclose(found, unit(np.array([[2.5, 0.5]])), atol=1e-6)
    # The plain sum has weights of 1, also for rows of cosine 0: 2 (1, 0) + (0, 1) + sqrt(1/2) (1, 1).
    found = QueryExpansion(3, alpha=0).fit(graph).expanded(query, scores, ids)
    np.testing.assert_allclose(found, unit(np.array([[2 + 0.5**0.5, 1 + 0.5**0.5]])), atol=1e-6)
    # Of the gallery, (1, 0) becomes (1, 0) + sqrt(1/2) (sqrt(1/2), sqrt(1/2)) and (1, 1) stays between the axes.
    rows = QueryExpansion(2, alpha=1, database=True).fit(graph).embeddings()
    np.testing.assert_allclose(rows, unit(np.array([[1.5, 0.5], [0.5, 1.5], [1, 1]])), atol=1e-6)


def test_rows_that_point_away_count_in_the_plain_sum_only():
    graph = KNNGraph.build(np.array([[-0.6, 0.8], [0, 1]]), 1)
    given = np.array([[1.0, 0]]), np.array([[-0.6, 0.0]]), np.array([[0, 1]])
    np.testing.assert_allclose(QueryExpansion(1, alpha=2).fit(graph).expanded(*given), [[1, 0]], atol=1e-6)
    expected = unit(np.array([[0.4, 0.8]]))
    np.testing.assert_allclose(QueryExpansion(1, alpha=0).fit(graph).expanded(*given), expected, atol=1e-6)


def test_a_query_that_is_a_row_counts_itself_when_its_list_does():
    vectors = unit(vectors_of(20, 4))
    scores, ids = search(vectors, vectors, 3)
    assert (ids[:, 0] == np.arange(20)).all()
    found = QueryExpansion(1, 3.0).fit(KNNGraph.build(vectors, 3)).expanded(vectors, scores, ids)
    np.testing.assert_allclose(found, vectors, atol=1e-6)


@pytest.mark.parametrize("database", [False, True])
def test_an_index_of_the_embeddings_finds_the_same(database):
    vectors, queries = vectors_of(300, 16), vectors_of(20, 16, seed=1)
    lists = search(queries, vectors, 10)
    reranker = QueryExpansion(database=database).fit(KNNGraph.build(vectors, 10))
    index = faiss.IndexFlatIP(16)
    index.add(reranker.embeddings())
    scores, ids = index.search(reranker.expanded(queries, *lists), 300)
    cosines = np.empty((20, 300))
    np.put_along_axis(cosines, ids, scores, axis=1)
    assert_best(reranker(queries, *lists), cosines)


@pytest.mark.parametrize("database", [False, True])
def test_lengths_scores_and_the_order_of_rows_play_no_part(database):
    vectors, queries = vectors_of(), vectors_of(9, seed=1)
    scores, ids = search(queries, vectors, 12)
    reranker = QueryExpansion(database=database).fit(KNNGraph.build(vectors, 10))
    cosines = reranker.expanded(queries, scores, ids) @ reranker.embeddings().T
    assert_best(reranker(queries * 7.3, 8 * scores + 3, ids), cosines)
    order = np.random.default_rng(2).permutation(60)
    moved = QueryExpansion(database=database).fit(KNNGraph.build(vectors[order], 10))
    assert_best(moved(queries, scores, np.argsort(order)[ids]), cosines[:, order])


def test_copies_of_one_vector_stay_what_they_are():
    vectors = np.ones((30, 4), np.float32)
    reranker = QueryExpansion(database=True).fit(KNNGraph.build(vectors, 10))
    np.testing.assert_allclose(reranker.embeddings(), 0.5, atol=1e-6)
    scores, ids = reranker(vectors[:2], *search(vectors[:2], vectors, 10))
    np.testing.assert_allclose(scores, 1, atol=1e-6)
    assert [len(set(row)) for row in ids.tolist()] == [10, 10]


def test_rows_of_equal_cosine_stand_by_number_in_lists_of_any_length():
    vectors = np.repeat(vectors_of(8), 25, axis=0)[np.random.default_rng(2).permutation(200)]
    queries = vectors_of(3, seed=1)
    reranker = QueryExpansion(k=3).fit(KNNGraph.build(vectors, 3))
    lists = search(queries, vectors, 200)
    scores, whole = reranker(queries, *lists)
    for own, ids in zip(scores, whole, strict=True):
        assert (np.diff(ids)[np.diff(own) == 0] > 0).all()
    for length in (3, 10, 40, 199):
        np.testing.assert_array_equal(reranker(queries, *(each[:, :length] for each in lists))[1], whole[:, :length])


def test_a_small_gallery_and_empty_lists():
    vectors = vectors_of(4)
    reranker = QueryExpansion(database=True).fit(KNNGraph.build(vectors, 3))
    query = vectors_of(1, seed=1)
    scores, ids = reranker(query, np.zeros((1, 6)), np.array([[2, 0, 1, 3, -1, -1]]))
    assert sorted(ids[0, :4].tolist()) == [0, 1, 2, 3]
    assert ids[0, 4:].tolist() == [-1, -1]
    assert np.isneginf(scores[0, 4:]).all()
    # As wide as the gallery is enough, whatever k is.
    assert sorted(reranker(query, np.zeros((1, 4)), ids[:, :4])[1][0].tolist()) == [0, 1, 2, 3]
    # A list without a row leaves the query where it is.
    found = reranker.expanded(query, np.zeros((1, 10)), np.full((1, 10), -1))
    np.testing.assert_allclose(found, unit(query), atol=1e-6)
    assert reranker(query[:0], np.zeros((0, 10)), np.zeros((0, 10), int))[1].shape == (0, 10)


def test_isolated_rows_stay_where_they_are_and_a_query_of_zeros_gets_zeros():
    vectors = np.eye(3, dtype=np.float32)
    graph = KNNGraph(np.array([[1, -1], [0, -1], [-1, -1]]), np.zeros((3, 2), np.float32), vectors)
    reranker = QueryExpansion(2, 0, database=True).fit(graph)
    np.testing.assert_allclose(reranker.embeddings(), unit(np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])), atol=1e-6)
    reranker = QueryExpansion(2).fit(graph)
    assert reranker.expanded(np.zeros((1, 3), np.float32), [[0.0, 0]], [[0, 1]]).tolist() == [[0, 0, 0]]
    # Of any length that float32 holds.
    found = reranker.expanded(
        np.array([[3e38, 3e38, 0], [1e-38, 0, 0]], np.float32), np.zeros((2, 2)), [[2, 1], [2, 1]]
    )
    assert found[1].tolist() == [1, 0, 0]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"alpha": -1}, "alpha must be a number from 0, got -1"),
        ({"alpha": float("nan")}, "alpha must be a number from 0, got nan"),
        ({"alpha": float("inf")}, "alpha must be a number from 0, got inf"),
    ],
)
def test_impossible_parameters_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QueryExpansion(**given)


def test_a_graph_without_vectors_or_with_few_neighbours_is_refused():
    graph = KNNGraph.build(vectors_of(), 9)
    with pytest.raises(ValueError, match=r"adds vectors and this graph has none; make it with KNNGraph.build"):
        QueryExpansion().fit(KNNGraph(graph.neighbours, graph.scores))
    with pytest.raises(ValueError, match="k=10 needs 10 neighbours a row, the graph holds 9"):
        QueryExpansion(database=True).fit(graph)
    QueryExpansion().fit(graph)


def test_nothing_is_known_before_fit():
    for ask in (QueryExpansion().embeddings, lambda: QueryExpansion()(vectors_of(1), [[1.0]], [[0]])):
        with pytest.raises(RuntimeError, match=r"call fit\(graph\) first"):
            ask()


@pytest.mark.parametrize(
    ("queries", "scores", "ids", "error", "message"),
    [
        (vectors_of(2), [[1.0], [1.0]], [[0], [1]], ValueError, "k=2 needs lists of as many places, got 1"),
        (vectors_of(1), [[1.0, 1.0]], [[0, 60]], ValueError, "an id that is no row from 0 to 59"),
        (vectors_of(1), [[1.0, np.nan]], [[0, 1]], ValueError, "a score that is NaN"),
        (vectors_of(1), [[1.0, 1.0]], [[0.0, 1.0]], TypeError, "ids integers"),
        (vectors_of(1, 5), [[1.0, 1.0]], [[0, 1]], ValueError, r"float \[1, 6\], .* got float32 \[1, 5\]"),
        (vectors_of(2), [[1.0, 1.0]], [[0, 1]], ValueError, r"float \[1, 6\], .* got float32 \[2, 6\]"),
        (np.ones((1, 6), int), [[1.0, 1.0]], [[0, 1]], ValueError, r"got int64 \[1, 6\]"),
        (None, [[1.0, 1.0]], [[0, 1]], ValueError, "moves queries and needs them, got None"),
        (np.full((1, 6), np.nan), [[1.0, 1.0]], [[0, 1]], ValueError, "queries must be finite, query 0 is not"),
        (np.full((1, 6), np.inf), [[1.0, 1.0]], [[0, 1]], ValueError, "queries must be finite, query 0 is not"),
    ],
)
def test_impossible_queries_and_lists_are_refused(queries, scores, ids, error, message):
    reranker = QueryExpansion(2).fit(KNNGraph.build(vectors_of(), 3))
    with pytest.raises(error, match=message):
        reranker(queries, np.array(scores), np.array(ids))
