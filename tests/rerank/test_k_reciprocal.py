"""k_reciprocal: new distances against loops over sets, in and out of sample, by hand, and what may not be given."""

import numpy as np
import pytest
from drawn_vectors import search, unit

from tcq_hf.rerank import k_reciprocal as module
from tcq_hf.rerank.graph import KNNGraph
from tcq_hf.rerank.k_reciprocal import KReciprocal


def clustered(rows=60, seed=0, width=6):
    generator = np.random.default_rng(seed)
    drawn = 2 * np.eye(width)[generator.integers(4, size=rows)] + generator.standard_normal((rows, width))
    return unit(drawn).astype(np.float32)


class Rows:
    """The formulas for all rows of a matrix of cosines, over Python's sets; lists of neighbours are looked up in it."""

    def __init__(self, cosines, near, k1, k2):
        self.near, self.k1, self.k2 = near, k1, k2
        self.distances = 2 - 2 * cosines
        self.largest = self.distances.max(axis=1)

    def nearest(self, row, k):
        return {row, *self.near[row][:k]}

    def reciprocal(self, row, k):
        return {other for other in self.nearest(row, k) if row in self.nearest(other, k)}

    def extended(self, found):
        result = set(found)
        for member in found:
            half = self.reciprocal(member, round(self.k1 / 2))
            if len(half & found) > 2 / 3 * len(half) + 1e-9:
                result |= half
        return result

    def single(self, row):
        weights = {
            other: np.exp(-self.distances[row, other] / self.largest[row])
            for other in self.extended(self.reciprocal(row, self.k1))
        }
        return {other: weight / sum(weights.values()) for other, weight in weights.items()}

    def averaged(self, row):
        return mean_of([self.single(each) for each in [row, *self.near[row][: self.k2 - 1]]])


def mean_of(encodings):
    keys = {key for each in encodings for key in each}
    return {key: sum(each.get(key, 0) for each in encodings) / len(encodings) for key in keys}


def jaccard(one, other):
    shared = sum(min(value, other.get(key, 0)) for key, value in one.items())
    return 1 - shared / (2 - shared)


def outside(rows, cosines, listed, limits, largest):
    """V of a query that is no row: key -1 is the query itself. `cosines` says how near it is to each row."""
    mutual = {row for row in listed[: rows.k1] if cosines[row] >= limits[row]}
    weights = {row: np.exp(-(2 - 2 * cosines[row]) / largest) for row in rows.extended(mutual)} | {-1: 1.0}
    single = {row: weight / sum(weights.values()) for row, weight in weights.items()}
    return mean_of([single] + [rows.single(row) for row in listed[: rows.k2 - 1]])


def assert_ordered(found, ids, expected, atol=2e-5):
    """Each list has its rows by descending expected score `[Q, n]`; what is nearer than rounding may change places."""
    scores, again = found
    assert (scores.dtype, again.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(np.sort(again, axis=1), np.sort(ids, axis=1))
    np.testing.assert_allclose(
        scores, np.where(again < 0, -np.inf, np.take_along_axis(expected, again, axis=1)), atol=atol
    )
    assert (scores[:, 1:] <= scores[:, :-1]).all()


SETTINGS = [(8, 3, 0.3), (7, 1, 0.0), (5, 5, 0.5), (2, 2, 0.9), (1, 1, 0.3)]


def of_loops(vectors, queries, ids, graph, k1, k2, weight):
    """The expected score `[Q, n]` of queries that are no rows."""
    rows = Rows(vectors.astype(float) @ vectors.T, graph.neighbours.tolist(), k1, k2)
    encodings, cosines = [rows.averaged(row) for row in range(len(vectors))], queries.astype(float) @ vectors.T
    limits = graph.scores[:, k1 - 1] - 1e-6
    scores = np.empty(cosines.shape)
    for query, own in enumerate(cosines):
        largest, listed = (2 - 2 * own).max(), [row for row in ids[query].tolist() if row >= 0]
        encoded = outside(rows, own, listed, limits, largest)
        shared = np.array([jaccard(encoded, each) for each in encodings])
        scores[query] = 1 - (1 - weight) * shared - weight * (2 - 2 * own) / largest
    return scores


@pytest.mark.parametrize(("k1", "k2", "weight"), SETTINGS)
@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_new_distances_are_those_of_a_loop(monkeypatch, k1, k2, weight, at_once):
    for name in ("_ROWS_AT_ONCE", "_PAIRS_AT_ONCE", "_SCORES_AT_ONCE"):
        monkeypatch.setattr(module, name, at_once)
    vectors, queries = clustered(), clustered(9, seed=1)
    graph, (scores, ids) = KNNGraph.build(vectors, 10), search(queries, vectors, 20)
    expected = of_loops(vectors, queries, ids, graph, k1, k2, weight)
    assert_ordered(KReciprocal(k1, k2, weight).fit(graph)(queries, scores, ids), ids, expected)


@pytest.mark.parametrize(("k1", "k2", "weight"), SETTINGS)
def test_transductive_distances_are_those_of_a_loop_over_all_rows(k1, k2, weight):
    vectors, queries = clustered(), clustered(9, seed=1)
    scores, ids = search(queries, vectors, 20)
    both = np.concatenate([vectors, queries])
    rows = Rows(both.astype(float) @ both.T, KNNGraph.build(both, 10).neighbours.tolist(), k1, k2)
    encodings = [rows.averaged(row) for row in range(69)]
    shared = np.array([[jaccard(encodings[60 + q], encodings[row]) for row in range(60)] for q in range(9)])
    near = 1 - rows.distances[60:, :60] / rows.largest[60:, None]
    reranker = KReciprocal(k1, k2, weight, transductive=True).fit(KNNGraph.build(vectors, 10))
    assert_ordered(reranker(queries * 3, scores, ids), ids, (1 - weight) * (1 - shared) + weight * near)


@pytest.mark.parametrize("queries", [None, clustered(9, seed=1)])
def test_without_vectors_scores_are_cosines_and_the_last_place_stands_for_what_is_not_listed(queries):
    vectors, k1, k2, weight = clustered(), 8, 3, 0.3
    graph, (scores, ids) = KNNGraph.build(vectors, 9), search(clustered(9, seed=1), vectors, 12)
    ids[4, 10:] = -1
    known = np.full((60, 60), graph.scores[:, -1:])
    np.put_along_axis(known, graph.neighbours, graph.scores, axis=1)
    np.fill_diagonal(known, 1)
    rows = Rows(known, graph.neighbours.tolist(), k1, k2)
    rows.largest[:] = 2
    encodings = [rows.averaged(row) for row in range(60)]
    expected = np.empty((9, 60))
    for query, listed in enumerate(ids.tolist()):
        listed = [row for row in listed if row >= 0]
        own = np.full(60, scores[query, len(listed) - 1])
        own[listed] = scores[query, : len(listed)]
        encoded = outside(rows, own, listed, graph.scores[:, k1 - 1] - 1e-6, 2)
        shared = np.array([jaccard(encoded, each) for each in encodings])
        expected[query] = 1 - (1 - weight) * shared - weight * (2 - 2 * own) / 2
    reranker = KReciprocal(k1, k2, weight).fit(KNNGraph(graph.neighbours, graph.scores))
    assert_ordered(reranker(queries, scores, ids), ids, expected)


def test_an_example_by_hand():
    # Two pairs on a circle, and a query between the first two; each row names the other one of its pair.
    degrees = np.deg2rad([0, 10, 90, 100])
    vectors = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    query = np.array([[np.cos(np.deg2rad(4)), np.sin(np.deg2rad(4))]])
    scores, ids = search(query, vectors, 4)
    found = KReciprocal(1, 1, 0.3).fit(KNNGraph.build(vectors, 1))(query, scores, ids)

    def distance(angle):
        return 2 - 2 * np.cos(np.deg2rad(angle))

    # V of the query has itself and row 0; that of row 0, like that of row 1, both rows of its pair.
    near = np.exp(-distance(4) / distance(96))
    first, second = np.exp(-distance(10) / distance(100)), np.exp(-distance(10) / distance(90))
    query_0, row_00, row_10 = near / (1 + near), 1 / (1 + first), second / (1 + second)
    expected = []
    for angle, shared in ((4, min(query_0, row_00)), (6, min(query_0, row_10)), (86, 0), (96, 0)):
        expected.append(0.7 * shared / (2 - shared) + 0.3 * (1 - distance(angle) / distance(96)))
    assert found[1].tolist() == [[0, 1, 2, 3]]
    # Cosines near one are rounded to 6e-8; a distance of .005 then has four digits less than its cosine.
    np.testing.assert_allclose(found[0], [expected], atol=1e-5)


def test_a_weight_of_one_keeps_the_order_and_lists_keep_rows_that_share_nothing_as_they_stood():
    vectors, queries = clustered(), clustered(9, seed=1)
    graph, (scores, ids) = KNNGraph.build(vectors, 20), search(queries, vectors, 30)
    found = KReciprocal(weight=1).fit(graph)(queries, scores, ids)
    assert_ordered(found, ids, 1 - (1 - queries @ vectors.T) / (1 - queries @ vectors.T).max(axis=1, keepdims=True))
    again = KReciprocal(3, 1, weight=0).fit(graph)(queries, scores, ids)
    for listed, row_scores, row in zip(ids.tolist(), *again, strict=True):
        rest = row[row_scores == 0].tolist()
        assert rest
        assert rest == [each for each in listed if each in rest]


@pytest.mark.parametrize("transductive", [False, True])
def test_lengths_scores_and_the_order_of_rows_play_no_part(transductive):
    vectors, queries = clustered(), clustered(9, seed=1)
    scores, ids = search(queries, vectors, 25)
    expected, options = np.full((9, 60), np.nan), {"transductive": transductive}
    found = KReciprocal(**options).fit(KNNGraph.build(vectors, 20))(queries, scores, ids)
    np.put_along_axis(expected, found[1], found[0], axis=1)
    again = KReciprocal(**options).fit(KNNGraph.build(vectors, 20))(5 * queries, 8 * scores, ids)
    assert_ordered(again, ids, expected)
    order = np.random.default_rng(2).permutation(60)
    moved = np.argsort(order)[ids]
    again = KReciprocal(**options).fit(KNNGraph.build(vectors[order], 20))(queries, scores, moved)
    assert_ordered(again, moved, expected[:, order])


def test_of_a_large_gallery_some_rows_tell_how_far_rows_are(monkeypatch):
    monkeypatch.setattr(module, "_FAR_ROWS", 20)
    vectors, queries = clustered(), clustered(9, seed=1)
    scores, ids = search(queries, vectors, 60)
    found = KReciprocal(weight=1).fit(KNNGraph.build(vectors, 20))(queries, scores, ids)
    # Every third row of sixty.
    largest = (2 - 2 * queries @ vectors[::3].T).max(axis=1, keepdims=True)
    assert_ordered(found, ids, 1 - (2 - 2 * queries @ vectors.T) / largest)


@pytest.mark.parametrize("transductive", [False, True])
def test_copies_of_one_vector_are_all_as_near(transductive):
    vectors = np.ones((50, 4), np.float32)
    scores, ids = np.full((2, 25), 4.0), np.tile(np.arange(25), (2, 1))
    reranker = KReciprocal(weight=1, transductive=transductive).fit(KNNGraph.build(vectors, 20))
    found = reranker(vectors[:2], scores, ids)
    # 2 - 2 cos is rounded to some 1e-7 and divided by 1e-5.
    np.testing.assert_allclose(found[0], 1, atol=0.05)
    found = KReciprocal(transductive=transductive).fit(KNNGraph.build(vectors, 20))(vectors[:2], scores, ids)
    assert (np.sort(found[1], axis=1) == ids).all()
    # Each has the distance 0, and shares between none and all of its set.
    assert ((found[0] > 0.3 - 0.05) & (found[0] < 1 + 1e-6)).all()


def test_a_query_that_ties_with_the_last_neighbour_is_among_them():
    vectors = clustered(4)[np.repeat(np.arange(4), 15)]
    scores, ids = search(vectors[:1], vectors, 15)
    found = KReciprocal(5, 1, weight=0).fit(KNNGraph.build(vectors, 5))(vectors[:1], scores, ids)
    # V of the query holds the first five of its list, and each of them is in its own V.
    assert (found[0] > 0).sum() >= 5


def test_isolated_rows_small_galleries_and_empty_lists():
    vectors = clustered(5)
    near = np.array([[1, -1], [0, -1], [4, 3], [4, 2], [-1, -1]])
    graph = KNNGraph(near, np.where(near < 0, 0, (vectors @ vectors.T)[np.arange(5)[:, None], near]), vectors)
    query = unit(vectors[:1] + 0.01)
    lists = search(query, vectors, 5)
    found = KReciprocal(2, 2).fit(graph)(query, *lists)
    # A row that has fewer than k1 neighbours would take any query in.
    limits = np.where(near[:, 1] < 0, -np.inf, graph.scores[:, 1] - 1e-6)
    rows = Rows(vectors.astype(float) @ vectors.T, [row[row >= 0].tolist() for row in near], 2, 2)
    own = (query.astype(float) @ vectors.T)[0]
    encoded = outside(rows, own, lists[1][0].tolist(), limits, (2 - 2 * own).max())
    shared = np.array([jaccard(encoded, rows.averaged(row)) for row in range(5)])
    assert_ordered(found, lists[1], (0.7 * (1 - shared) + 0.3 * (1 - (2 - 2 * own) / (2 - 2 * own).max()))[None])
    # k1 = 20 of a gallery of five: all others are neighbours.
    small = KReciprocal().fit(KNNGraph.build(vectors, 4))
    assert sorted(small(query, *lists)[1][0].tolist()) == [0, 1, 2, 3, 4]
    for width in (5, 22):
        scores, ids = small(query, np.zeros((1, width)), np.full((1, width), -1))
        assert (ids == -1).all()
        assert np.isneginf(scores).all()
        assert small(None, np.zeros((1, width)), np.full((1, width), -1))[1].shape == (1, width)
    assert small(query[:0], np.zeros((0, 22)), np.zeros((0, 22), int))[1].shape == (0, 22)


def test_zeros_are_as_far_from_all_as_orthogonal_vectors():
    vectors = clustered()
    scores, ids = np.zeros((1, 20)), np.arange(20)[None]
    found = KReciprocal(weight=1).fit(KNNGraph.build(vectors, 20))(np.zeros((1, 6), np.float32), scores, ids)
    assert found[0].tolist() == [[0] * 20]
    assert found[1].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k1": 0, "k2": 0}, "k1 must be at least 1 and k2 from 1 to k1, got k1=0 and k2=0"),
        ({"k1": 5}, "got k1=5 and k2=6"),
        ({"k2": 0}, "got k1=20 and k2=0"),
        ({"weight": -0.1}, "weight must be from 0 to 1, got -0.1"),
        ({"weight": 1.1}, "weight must be from 0 to 1, got 1.1"),
        ({"weight": float("nan")}, "weight must be from 0 to 1, got nan"),
    ],
)
def test_impossible_parameters_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        KReciprocal(**given)


def test_what_does_not_fit_is_refused():
    graph = KNNGraph.build(clustered(), 19)
    bare = KNNGraph(graph.neighbours, graph.scores)
    with pytest.raises(ValueError, match="k1=20 needs 20 neighbours a row, the graph holds 19"):
        KReciprocal().fit(graph)
    with pytest.raises(ValueError, match="transductive=True puts queries into the graph, and this one has no vectors"):
        KReciprocal(5, 2, transductive=True).fit(bare)
    with pytest.raises(RuntimeError, match=r"call fit\(graph\) first"):
        KReciprocal()(None, [[1.0]], [[0]])
    with pytest.raises(ValueError, match="transductive=True needs queries, got None"):
        KReciprocal(5, 2, transductive=True).fit(graph)(None, [[1.0]], [[0]])


@pytest.mark.parametrize(
    ("queries", "scores", "ids", "error", "message"),
    [
        (clustered(1), [[1.0]], [[0]], ValueError, "k1=2 needs lists of as many places, got 1"),
        (clustered(1), [[1.0, 1.0]], [[0, 60]], ValueError, "an id that is no row from 0 to 59"),
        (clustered(1), [[1.0, np.nan]], [[0, 1]], ValueError, "a score that is NaN"),
        (clustered(1), [[1.0, 1.0]], [[0.0, 1.0]], TypeError, "ids integers"),
        (clustered(2), [[1.0, 1.0]], [[0, 1]], ValueError, r"queries must be float \[1, 6\], .* float32 \[2, 6\]"),
        (np.full((1, 6), np.nan), [[1.0, 1.0]], [[0, 1]], ValueError, "queries must be finite, query 0 is not"),
        (None, [[7.5, 0.5]], [[0, 1]], ValueError, "scores must be cosines, from -1 to 1, got 7.5"),
        (None, [[0.5, -np.inf]], [[0, 1]], ValueError, "scores must be cosines, from -1 to 1, got -inf"),
    ],
)
def test_impossible_queries_and_lists_are_refused(queries, scores, ids, error, message):
    reranker = KReciprocal(2, 1).fit(KNNGraph.build(clustered(), 3))
    with pytest.raises(error, match=message):
        reranker(queries, np.array(scores), np.array(ids))


def test_a_transductive_gallery_has_more_rows_than_neighbours():
    graph = KNNGraph.build(np.random.default_rng(0).standard_normal((15, 5)).astype(np.float32), 14)
    with pytest.raises(ValueError, match="with k1=20 needs a gallery of at least 21 rows, got 15"):
        KReciprocal(transductive=True).fit(graph)
