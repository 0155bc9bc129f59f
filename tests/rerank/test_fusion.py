"""fusion: lists against loops and by hand, overlap against its sum, sets of rankers against all unions."""

import itertools
import logging

import numpy as np
import pytest

from tcq_hf.rerank import fusion as module
from tcq_hf.rerank.fusion import (
    Fusion,
    combined_sum,
    rank_correlation,
    reciprocal_rank_fusion,
    select,
    selection_scores,
)
from tcq_hf.rerank.graph import KNNGraph, quality

BOTH = [reciprocal_rank_fusion, combined_sum]
NONE = -np.inf


def ranked(generator, queries, rows, k, values=None):
    """A list of a random ranker, best first; few different scores where `values` is given."""
    ids = np.stack([generator.permutation(rows)[:k] for _ in range(queries)])
    drawn = generator.standard_normal((queries, k)) if values is None else generator.integers(values, size=(queries, k))
    return -np.sort(-drawn, axis=1).astype(np.float32), ids


def with_gaps(scores, ids, generator):
    """Lists of which some end early."""
    ids = ids.copy()
    ids[np.arange(ids.shape[1]) >= generator.integers(ids.shape[1] + 1, size=(len(ids), 1))] = -1
    return scores, ids


def points_by_loop(combine, scores, ids):
    """Points of the rows of one list of one query."""
    scores, ids = scores[ids >= 0].tolist(), ids[ids >= 0].tolist()
    if combine is reciprocal_rank_fusion:
        return {row: 1 / (60 + place) for place, row in enumerate(ids, start=1)}
    low, high = min(scores, default=0), max(scores, default=0)
    return {row: 1.0 if high == low else (score - low) / (high - low) for row, score in zip(ids, scores, strict=True)}


def fused_by_loop(combine, lists, k):
    """Totals and ids of each query; ties, equal in float32, by the first list and then by number."""
    totals, rows = [], []
    for query in range(len(lists[0][0])):
        own, points = lists[0][1][query].tolist(), {}
        for scores, ids in lists:
            for row, value in points_by_loop(combine, scores[query], ids[query]).items():
                points[row] = points.get(row, 0) + value
        keys = [
            (-float(np.float32(value)), own.index(row) if row in own else len(own), row)
            for row, value in points.items()
        ]
        best = sorted(keys)[:k] + [(-NONE, 0, -1)] * (k - len(points))
        totals.append([-key[0] for key in best])
        rows.append([key[2] for key in best])
    return np.array(totals, np.float32), np.array(rows)


@pytest.mark.parametrize("combine", BOTH)
@pytest.mark.parametrize("places", [1, 60, 2**20])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_fused_lists_are_those_of_a_loop(monkeypatch, combine, places, k):
    monkeypatch.setattr(module, "_PLACES_AT_ONCE", places)
    generator = np.random.default_rng(k)
    lists = [ranked(generator, 30, 25, 8), ranked(generator, 30, 25, 5, values=3), ranked(generator, 30, 25, 12)]
    lists = [with_gaps(*each, generator) for each in lists]
    scores, ids = combine(lists, k)
    expected, rows = fused_by_loop(combine, lists, k)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    assert ids.tolist() == rows.tolist()
    np.testing.assert_array_equal(scores, expected)


def test_reciprocal_ranks_by_hand():
    first, second = (np.array([[0.9, 0.8, 0.1]]), np.array([[4, 7, 2]])), (np.array([[30.0, 5]]), np.array([[7, 9]]))
    scores, ids = reciprocal_rank_fusion([first, second], k=6)
    assert ids.tolist() == [[7, 4, 9, 2, -1, -1]]
    expected = [1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63, NONE, NONE]
    np.testing.assert_array_equal(scores[0], np.array(expected, np.float32))
    # Without the constant the place alone counts.
    expected = [3 / 2, 1, 1 / 2, 1 / 3]
    np.testing.assert_array_equal(reciprocal_rank_fusion([first, second], 4, 0)[0][0], np.array(expected, np.float32))


def test_sums_by_hand():
    first = np.array([[1.0, 0.75, 0.5]]), np.array([[4, 7, 2]])
    second = np.array([[30.0, 20, 10]]), np.array([[7, 9, 4]])
    scores, ids = combined_sum([first, second], k=5)
    # 7 has 1/2 + 1, 4 has 1 + 0, 9 has 1/2, and 2, the last of its list, has 0.
    assert ids.tolist() == [[7, 4, 9, 2, -1]]
    assert scores.tolist() == [[1.5, 1, 0.5, 0, NONE]]


def test_equal_scores_count_one_each():
    flat, other = (np.array([[5.0, 5.0]]), np.array([[3, 1]])), (np.array([[2.0, 1]]), np.array([[8, 1]]))
    scores, ids = combined_sum([flat, other], k=3)
    assert ids.tolist() == [[3, 1, 8]]
    assert scores.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("combine", BOTH)
def test_ties_stand_in_the_order_of_the_first_list_and_then_by_number(combine):
    flat = [(np.ones((1, 2)), np.array([pair])) for pair in ([6, 5], [5, 6], [9, 8], [8, 9])]
    assert combine(flat, 4)[1].tolist() == [[6, 5, 8, 9]]


def test_sums_of_the_same_points_tie_in_any_order():
    """In float64 the points of places 3, 1, 2 and 10 add up to more than those of 2, 3, 10 and 1, in the last bit."""
    places = {0: (2, 3, 10, 1), 1: (3, 1, 2, 10)}
    assert np.sum(1 / (60 + np.array(places[0]))) < np.sum(1 / (60 + np.array(places[1])))
    ids = np.arange(100, 140).reshape(4, 1, 10)
    for row, at in places.items():
        ids[range(4), 0, np.array(at) - 1] = row
    scores, found = reciprocal_rank_fusion([(np.zeros((1, 10)), each) for each in ids], 2)
    assert found.tolist() == [[0, 1]]
    assert scores[0, 0] == scores[0, 1]


@pytest.mark.parametrize("combine", BOTH)
def test_a_list_fused_with_itself_keeps_its_order(combine):
    scores, ids = ranked(np.random.default_rng(0), 20, 50, 15)
    for times in (1, 2, 3):
        np.testing.assert_array_equal(combine([(scores, ids)] * times)[1], ids)


def points_by_row(scores, ids):
    """Fused lists `[Q, k]` in the order of ids: points and ids."""
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


@pytest.mark.parametrize("combine", BOTH)
def test_the_order_of_rankers_changes_no_points(combine):
    generator = np.random.default_rng(1)
    lists = [with_gaps(*ranked(generator, 40, 30, 9), generator) for _ in range(3)]
    (scores, ids), *others = (points_by_row(*combine(list(order), 30)) for order in itertools.permutations(lists))
    for found, rows in others:
        np.testing.assert_array_equal(rows, ids)
        # Float64 rounds sums of three in another order by 1e-15, which float32 at worst makes its next number.
        np.testing.assert_allclose(found, scores, rtol=2**-23)


@pytest.mark.parametrize("combine", BOTH)
def test_rows_under_other_numbers_have_the_same_points(combine):
    generator = np.random.default_rng(2)
    lists = [ranked(generator, 20, 30, 9) for _ in range(2)]
    # Larger than any array could be.
    numbers = generator.choice(2**40, 30, replace=False)
    scores, ids = combine(lists, 18)
    renamed, rows = combine([(each, numbers[found]) for each, found in lists], 18)
    np.testing.assert_array_equal(renamed, scores)
    expected = points_by_row(scores, np.where(ids < 0, -1, numbers[ids]))
    for found, wanted in zip(points_by_row(renamed, rows), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_neither_scale_nor_offset_of_a_ranker_counts():
    generator = np.random.default_rng(3)
    first, second = ranked(generator, 20, 30, 9, values=20), ranked(generator, 20, 30, 9, values=20)
    stretched = (1024 * second[0] + 7, second[1])  # exact in float32
    for combine in BOTH:
        for one, other in zip(combine([first, second]), combine([first, stretched]), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("combine", BOTH)
def test_empty_lists_give_what_the_others_have(combine):
    nothing, full = (
        (np.full((2, 3), np.nan), np.full((2, 3), -1)),
        (np.array([[2.0, 1], [4, 3]]), np.array([[5, 6]] * 2)),
    )
    np.testing.assert_array_equal(combine([nothing, full])[1], [[5, 6, -1]] * 2)
    np.testing.assert_array_equal(combine([nothing])[0], np.full((2, 3), NONE))
    narrow = (np.zeros((2, 0)), np.zeros((2, 0), np.int64))
    np.testing.assert_array_equal(combine([narrow, full])[1], [[5, 6]] * 2)
    assert combine([narrow], 2)[1].tolist() == [[-1, -1]] * 2
    assert combine([(np.zeros((0, 4)), np.zeros((0, 4), int))])[1].shape == (0, 4)


GOOD = (np.array([[2.0, 1.0]]), np.array([[0, 1]]))


@pytest.mark.parametrize("combine", BOTH)
@pytest.mark.parametrize(
    ("lists", "k", "error", "message"),
    [
        ([], None, ValueError, r"lists must be pairs \(scores, ids\) of arrays \[Q, k\]"),
        ([GOOD[1]], None, ValueError, "lists must be pairs"),
        (
            [GOOD, (np.zeros((2, 2)), np.array([[0, 1]] * 2))],
            None,
            ValueError,
            r"same queries, got .* \[1, 2\] queries",
        ),
        ([GOOD], 0, ValueError, "k must be at least 1, got 0"),
        ([(np.zeros((1, 0)), np.zeros((1, 0), int))], None, ValueError, "k must be at least 1, got 0"),
        ([GOOD, (GOOD[0], GOOD[0])], None, TypeError, "ids integers, got float64 and float64"),
        ([GOOD, (np.array([[1.0, np.nan]]), GOOD[1])], None, ValueError, "query 0 has a score that is NaN"),
        ([GOOD, (GOOD[0], np.array([[3, 3]]))], None, ValueError, "query 0 has one id twice"),
        ([GOOD, (GOOD[0], np.array([[-1, 3]]))], None, ValueError, "query 0 has the id -1 before a row"),
        ([GOOD, (GOOD[0], np.array([[3, -2]]))], None, ValueError, "query 0 has an id that is no row"),
    ],
)
def test_impossible_lists_are_refused(combine, lists, k, error, message):
    with pytest.raises(error, match=message):
        combine(lists, k)


def test_scores_that_cannot_be_summed_are_refused():
    with pytest.raises(ValueError, match="scores must be finite, list 1 has one of query 0 that is not"):
        combined_sum([GOOD, (np.array([[np.inf, 1.0]]), GOOD[1])])
    with pytest.raises(ValueError, match="but rise in list 1 at query 0; of distances give the negative"):
        combined_sum([GOOD, (np.array([[1.0, 2.0]]), GOOD[1])])
    # Their order is all that counts here.
    assert reciprocal_rank_fusion([GOOD, (np.array([[1.0, 2.0]]), GOOD[1])])[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("constant", [-1, np.inf, np.nan])
def test_an_impossible_constant_is_refused(constant):
    with pytest.raises(ValueError, match="constant must be at least 0 and finite"):
        reciprocal_rank_fusion([GOOD], constant=constant)


# --- Of several indexes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", BOTH)
def test_a_fusion_asks_the_other_indexes_and_keeps_the_length(combine):
    generator = np.random.default_rng(4)
    own, other, third = ranked(generator, 3, 30, 6), ranked(generator, 3, 30, 6), ranked(generator, 3, 30, 9)
    answers = {("small", "model", "processor"): other, ("large", "net", "transform"): third}
    fuse = Fusion({"small": ("model", "processor"), "large": ("net", "transform")}, combine)
    scores, ids = fuse(lambda *asked: answers[asked], *own)
    expected = combine([own, other, third], 6)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_a_fusion_takes_reciprocal_ranks_by_default():
    assert Fusion({"a": (None, None)}).combine is reciprocal_rank_fusion


@pytest.mark.parametrize("others", [{}, {"a": ("model",)}])
def test_a_fusion_of_nothing_is_refused(others):
    with pytest.raises(ValueError, match=r"others must map names of indexes to \(model, processor\) each, got"):
        Fusion(others)


# --- Overlap ---------------------------------------------------------------------------------------------------------


def graph_of(rows=40, k=9, seed=0):
    return KNNGraph.build(np.random.default_rng(seed).standard_normal((rows, 4)), k)


def listed(neighbours):
    """A graph of given neighbours, whose scores play no part."""
    return KNNGraph(np.array(neighbours), np.zeros(np.shape(neighbours), np.float32))


@pytest.mark.parametrize("p", [0.5, 0.9])
@pytest.mark.parametrize("depth", [1, 6, 10])
def test_overlap_is_its_sum(p, depth):
    first, second = graph_of(), graph_of(k=12, seed=1)
    first.neighbours[3, 5:] = second.neighbours[3, 7:] = -1
    total = 0.0
    for row in range(40):
        one, other = ([row, *graph.neighbours[row].tolist()] for graph in (first, second))
        for j in range(1, depth + 1):
            total += (1 - p) * p ** (j - 1) * len({*one[:j]} & {*other[:j]} - {-1}) / j
    # Some 800 terms below one: float64 sums them to 1e-13.
    assert rank_correlation(first, second, p, depth) == pytest.approx(total / 40, rel=1e-12)
    assert rank_correlation(second, first, p, depth) == pytest.approx(total / 40, rel=1e-12)


def test_overlap_of_equal_and_of_disjoint_lists_is_closed():
    graph = graph_of(k=19)
    assert rank_correlation(graph, graph) == pytest.approx(1 - 0.9**20)
    ring = np.arange(6)[:, None]
    after, before = (listed((ring + np.array(steps)) % 6) for steps in ([1, 2], [-1, -2]))
    # The row itself alone is in both: .1 (1 + .9 / 2 + .81 / 3).
    assert rank_correlation(after, before, depth=3) == pytest.approx(0.1 * (1 + 0.45 + 0.27))
    swapped = listed((ring + np.array([2, 1])) % 6)
    assert rank_correlation(after, swapped, depth=3) == pytest.approx(0.1 * (1 + 0.45 + 0.81))


def test_rows_without_neighbours_overlap_in_themselves():
    alone = listed(np.full((5, 2), -1))
    assert rank_correlation(alone, alone, depth=3) == pytest.approx(0.1 * (1 + 0.45 + 0.27))


def test_overlap_and_scores_do_not_depend_on_the_order_of_rows():
    vectors = np.random.default_rng(0).standard_normal((3, 50, 4))
    order = np.random.default_rng(1).permutation(50)
    graphs, moved = ([KNNGraph.build(each, 6) for each in given] for given in (vectors, vectors[:, order]))
    assert rank_correlation(*graphs[:2], depth=7) == pytest.approx(rank_correlation(*moved[:2], depth=7), rel=1e-12)
    assert selection_scores(graphs, 2) == pytest.approx(selection_scores(moved, 2), rel=1e-12)


def test_copies_of_one_row_draw_their_order_and_overlap_little():
    copies = [KNNGraph.build(np.ones((500, 3)), 9, seed) for seed in (0, 1)]
    # 9 of 499 others each: beside the row itself, .1 sum .9^(j - 1) / j = .2 of ten places, next to nothing.
    own = 0.1 * sum(0.9 ** (j - 1) / j for j in range(1, 11))
    assert own < rank_correlation(*copies, depth=10) < own + 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be from 1 to 10, a row and its neighbours, got 0"),
        ({"depth": 11}, "depth must be from 1 to 10, a row and its neighbours, got 11"),
        ({"depth": 5, "p": 1.0}, "p must be between 0 and 1, got 1.0"),
        ({"depth": 5, "p": np.nan}, "p must be between 0 and 1, got nan"),
    ],
)
def test_an_impossible_overlap_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(graph_of(), graph_of(k=12), **options)
    with pytest.raises(ValueError, match="the same rows, got 40 and 30"):
        rank_correlation(graph_of(), graph_of(30))


# --- Selection -------------------------------------------------------------------------------------------------------


def rankers(count=5):
    """Graphs of one set of vectors under noise that grows."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((60, 4))
    return {f"noise {n}": KNNGraph.build(vectors + n * generator.standard_normal((60, 4)), 7) for n in range(count)}


@pytest.mark.parametrize("beta", [-1.0, 0.0, 2.0])
def test_scores_of_pairs_are_their_formula(beta):
    graphs = rankers()
    found = selection_scores(graphs, beta=beta)
    expected = {
        (a, b): quality(graphs[a]) * quality(graphs[b]) / (1 + rank_correlation(graphs[a], graphs[b], depth=8)) ** beta
        for a, b in itertools.permutations(graphs, 2)
        if quality(graphs[a]) > quality(graphs[b])
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_larger_sets_score_the_best_sum_of_two_that_share_all_but_one():
    graphs = rankers()
    smaller = {frozenset(names): score for names, score in selection_scores(graphs, 2).items()}
    for size in (3, 4, 5):
        found = {frozenset(names): score for names, score in selection_scores(graphs, size).items()}
        expected = {}
        for (a, first), (b, second) in itertools.combinations(smaller.items(), 2):
            if len(a | b) == size:
                expected[a | b] = max(expected.get(a | b, 0), first + second)
        assert found == pytest.approx(expected, rel=1e-12)
        assert len(select(graphs, size)) == size
        smaller = expected


def test_of_many_sets_the_best_seek_a_partner(monkeypatch):
    graphs = rankers()
    every = selection_scores(graphs, 3)
    monkeypatch.setattr(module, "_SETS_KEPT", 1)
    few = selection_scores(graphs, 3)
    assert len(few) == 3 < len(every)  # the best pair and one more
    assert next(iter(few.items())) == next(iter(every.items()))


def test_names_come_by_quality_and_the_score_is_logged(caplog):
    graphs = rankers()
    with caplog.at_level(logging.INFO, logger="tcq_hf.rerank.fusion"):
        chosen = select(dict(reversed(graphs.items())), 3)
    best = selection_scores(graphs, 3)
    assert chosen == list(next(iter(best))) == sorted(chosen, key=lambda name: -quality(graphs[name]))
    assert f"of 5 rankers chosen: {', '.join(chosen)}, score {next(iter(best.values())):.4f}" in caplog.text
    assert select(graphs, 1) == [max(graphs, key=lambda name: quality(graphs[name]))]
    assert selection_scores(graphs, 1) == {(name,): quality(graph) for name, graph in graphs.items()}


def test_a_sequence_is_chosen_from_by_number():
    graphs = rankers()
    assert [list(graphs)[number] for number in select(list(graphs.values()), 3)] == select(graphs, 3)


def test_beta_prefers_rankers_that_agree_or_that_differ():
    """Three of equal quality, cliques of three rows each; two of them agree."""
    cliques, rows = np.repeat(np.arange(6), 3), np.arange(18)
    others = np.array([rows[(cliques == cliques[row]) & (rows != row)] for row in rows])
    mixed = np.random.default_rng(0).permutation(18)
    apart = np.empty_like(others)
    apart[mixed] = mixed[others]
    graphs = {"one": listed(others), "apart": listed(apart), "same": listed(others)}
    assert {quality(graph) for graph in graphs.values()} == {1}
    assert select(graphs, beta=-1) == ["one", "same"]
    assert "apart" in select(graphs, beta=1)
    assert set(selection_scores(graphs, beta=0).values()) == {1}


@pytest.mark.parametrize(
    ("graphs", "options", "error", "message"),
    [
        ([], {}, ValueError, "size must be from 1 to 0, the graphs, got 2"),
        ([graph_of()], {}, ValueError, "size must be from 1 to 1, the graphs, got 2"),
        ([graph_of()] * 2, {"size": 0}, ValueError, "size must be from 1 to 2, the graphs, got 0"),
        ([graph_of()] * 2, {"beta": np.nan}, ValueError, "beta must be finite, got nan"),
        ([graph_of(), graph_of(k=4)], {}, ValueError, r"as many neighbours each, got .*1: \(40, 4\)"),
        ([graph_of(), graph_of(30)], {}, ValueError, r"the same rows .*1: \(30, 9\)"),
        ({"a": np.ones((3, 2))}, {}, TypeError, "graphs must be KNNGraph, that of 'a' is a ndarray"),
    ],
)
def test_impossible_choices_are_refused(graphs, options, error, message):
    with pytest.raises(error, match=message):
        select(graphs, **options)
