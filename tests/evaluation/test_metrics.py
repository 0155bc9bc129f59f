"""Figures of scores and of vectors against slow loops, scikit-learn, closed forms and symmetries."""

import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tcq_hf import mean_average_precision
from tcq_hf.evaluation import ranking
from tcq_hf.evaluation.metrics import evaluate, precision_at_k, recall_at_k


def drawn(queries=6, rows=40, share=0.3, seed=0):
    """Scores without ties and relevance."""
    generator = np.random.default_rng(seed)
    scores = np.stack([generator.permutation(rows) for _ in range(queries)]).astype(np.float32)
    return scores, generator.random((queries, rows)) < share


def slow(scores, relevant, k, denominator):
    total = 0.0
    for row, good in zip(scores.tolist(), relevant.tolist(), strict=True):
        ranking = sorted(range(len(row)), key=lambda item: -row[item])[:k]
        hits, precisions = 0, 0.0
        for rank, item in enumerate(ranking, start=1):
            if good[item]:
                hits += 1
                precisions += hits / rank
        count = hits if denominator == "hits" else min(k, sum(good))
        total += precisions / count if count else 0.0
    return total / len(scores)


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
@pytest.mark.parametrize("k", [1, 3, 10, 39, 40, 1000])
def test_equals_a_slow_loop(k, denominator):
    scores, relevant = drawn()
    relevant[2], relevant[3] = False, True
    assert math.isclose(
        mean_average_precision(scores, relevant, k, denominator), slow(scores, relevant, k, denominator), rel_tol=1e-12
    )


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
@pytest.mark.parametrize("k", [40, 10_000])
def test_equals_scikit_learn_on_full_rankings(k, denominator):
    scores, relevant = drawn()
    expected = np.mean([average_precision_score(good, row) for good, row in zip(relevant, scores, strict=True)])
    assert math.isclose(mean_average_precision(scores, relevant, k, denominator), expected, rel_tol=1e-12)


def test_one_hit_at_rank_one_of_ten_relevant_rows():
    scores = -np.arange(20.0)[None]
    relevant = np.zeros((1, 20), bool)
    relevant[0, 0] = relevant[0, 10:19] = True
    assert mean_average_precision(scores, relevant, k=5, denominator="hits") == 1.0
    assert mean_average_precision(scores, relevant, k=5, denominator="relevant") == 0.2


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
def test_closed_forms(denominator):
    scores, nothing = -np.arange(8.0)[None], np.zeros((1, 8), bool)
    assert mean_average_precision(scores, nothing, 5, denominator) == 0.0
    assert mean_average_precision(scores, ~nothing, 5, denominator) == 1.0
    third = nothing.copy()
    third[0, 2] = True
    assert mean_average_precision(scores, third, 5, denominator) == pytest.approx(1 / 3, rel=1e-12)
    assert mean_average_precision(scores, third, 2, denominator) == 0.0


def test_a_query_without_relevant_rows_counts_as_zero():
    scores = -np.arange(8.0)[None].repeat(2, axis=0)
    relevant = np.zeros((2, 8), bool)
    relevant[0, 0] = True
    assert mean_average_precision(scores, relevant) == 0.5


def test_the_default_is_the_thousand_best_rows_and_their_hits():
    scores, relevant = -np.arange(3000.0)[None], np.zeros((1, 3000), bool)
    relevant[0, [0, 999, 1000]] = True
    expected = (1 + 2 / 1000) / 2
    assert math.isclose(mean_average_precision(scores, relevant), expected, rel_tol=1e-12)


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
def test_the_order_of_rows_and_queries_does_not_matter(denominator):
    scores, relevant = drawn()
    expected = mean_average_precision(scores, relevant, 10, denominator)
    generator = np.random.default_rng(1)
    rows, queries = generator.permutation(40), generator.permutation(6)
    for twin in ((scores[:, rows], relevant[:, rows]), (scores[queries], relevant[queries])):
        assert math.isclose(mean_average_precision(*twin, 10, denominator), expected, rel_tol=1e-12)


def test_only_the_order_of_the_scores_counts():
    scores, relevant = drawn()
    expected = mean_average_precision(scores, relevant, 10)
    for twin in (scores * 3 - 100, np.exp(scores), scores.astype(np.float64), scores.astype(np.int64)):
        assert mean_average_precision(twin, relevant, 10) == expected


def test_infinite_scores_are_ranked():
    scores = np.array([[-np.inf, 0.0, np.inf]])
    assert mean_average_precision(scores, np.array([[False, False, True]])) == 1.0
    assert mean_average_precision(scores, np.array([[True, False, False]])) == pytest.approx(1 / 3, rel=1e-12)


def test_ties_are_seeded():
    scores, relevant = np.zeros((3, 50)), np.random.default_rng(0).random((3, 50)) < 0.2
    values = [mean_average_precision(scores, relevant, seed=seed) for seed in range(20)]
    assert values == [mean_average_precision(scores, relevant, seed=seed) for seed in range(20)]
    assert len(set(values)) > 10


def test_ties_have_the_expected_value_wherever_the_relevant_row_stands():
    """One relevant row among n equal scores has AP 1 / rank, rank uniform: mean H_n / n, known variance."""
    rows, seeds = 8, 4000
    ranks = 1 / np.arange(1, rows + 1)
    # Five standard errors: wrong by chance once in 1.7 million.
    tolerance = 5 * ranks.std() / math.sqrt(seeds)
    for place in (0, rows - 1):
        relevant = (np.arange(rows) == place)[None].repeat(seeds, axis=0)
        assert abs(mean_average_precision(np.zeros((seeds, rows)), relevant) - ranks.mean()) <= tolerance
    first = (np.arange(rows) == 0)[None]
    one_by_one = [mean_average_precision(np.zeros((1, rows)), first, seed=seed) for seed in range(seeds)]
    assert abs(np.mean(one_by_one) - ranks.mean()) <= tolerance


def test_ties_across_the_cut_off_are_drawn_too():
    """Two equal rows compete for the last place: the relevant one takes it half of the time."""
    queries = 4000
    scores, relevant = np.tile([2.0, 1.0, 1.0], (queries, 1)), np.tile([False, True, False], (queries, 1))
    # AP@2 is 1/2 or 0, each with probability 1/2: deviation 1/4.
    assert abs(mean_average_precision(scores, relevant, k=2) - 0.25) <= 5 * 0.25 / math.sqrt(queries)


def test_lists_and_zero_one_relevance_are_taken():
    assert mean_average_precision([[3, 2, 1]], [[1, 0, 0]]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"relevant": np.zeros((2, 4), bool)}, r"one shape \[Q, N\], got \(2, 3\) and \(2, 4\)"),
        ({"scores": np.zeros(3), "relevant": np.zeros(3, bool)}, r"got \(3,\)"),
        ({"scores": np.zeros((0, 3)), "relevant": np.zeros((0, 3), bool)}, r"got \(0, 3\)"),
        ({"scores": np.zeros((2, 0)), "relevant": np.zeros((2, 0), bool)}, r"got \(2, 0\)"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": -1}, "k must be at least 1, got -1"),
        ({"denominator": "all"}, "'hits' or 'relevant', got 'all'"),
        ({"ties": "none"}, "'random' or 'expected', got 'none'"),
        ({"ties": "expected"}, "needs denominator='relevant'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"scores": np.array([[0, 0, 0], [0, np.nan, 0]])}, "must not be NaN, query 1 has one"),
    ],
)
def test_illegal_input_is_refused(arguments, match):
    given = {"scores": np.zeros((2, 3)), "relevant": np.zeros((2, 3), bool)} | arguments
    with pytest.raises(ValueError, match=match):
        mean_average_precision(**given)


def tied(rows=7, seed=0):
    """One query with few distinct scores."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 3, (1, rows)).astype(np.float32), generator.random((1, rows)) < 0.5


def orders(scores):
    """Every ranking that equal scores allow."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield list(order)


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("k", [1, 2, 4, 6, 7])
def test_expected_ties_are_the_mean_over_every_order(k, seed):
    scores, relevant = tied(seed=seed)
    hits = [relevant[0][order] for order in orders(scores[0])]
    untied = [(-np.arange(7.0)[None], row[None]) for row in hits]
    every = [mean_average_precision(*ranking, k, "relevant") for ranking in untied]
    ours = mean_average_precision(scores, relevant, k, "relevant", ties="expected")
    assert math.isclose(ours, np.mean(every), rel_tol=1e-12)
    within = np.mean([row[:k].sum() for row in hits])
    assert math.isclose(precision_at_k(scores, relevant, k, ties="expected"), within / k, rel_tol=1e-12)
    assert math.isclose(recall_at_k(scores, relevant, k, ties="expected"), within / relevant.sum(), rel_tol=1e-12)


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
def test_random_ties_take_every_order_equally_often(denominator):
    scores, relevant = np.array([[2.0, 1, 1, 1, 1, 0]]), np.array([[True, True, False, True, False, True]])
    values = [
        mean_average_precision(-np.arange(6.0)[None], relevant[:, order], 3, denominator) for order in orders(scores[0])
    ]
    seeds = 4000
    drawn = [mean_average_precision(scores, relevant, 3, denominator, seed) for seed in range(seeds)]
    assert set(np.round(drawn, 9)) == set(np.round(values, 9))
    # Five standard errors.
    assert abs(np.mean(drawn) - np.mean(values)) <= 5 * np.std(values) / math.sqrt(seeds)


def test_expected_ties_equal_random_ones_where_there_are_none():
    scores, relevant = drawn()
    for k in (1, 10, 40):
        expected = mean_average_precision(scores, relevant, k, "relevant", ties="expected")
        assert math.isclose(expected, mean_average_precision(scores, relevant, k, "relevant"), rel_tol=1e-12)


def test_precision_and_recall_count_the_first_rows():
    scores, relevant = -np.arange(10.0)[None].repeat(2, axis=0), np.zeros((2, 10), bool)
    relevant[0, [0, 2, 9]] = True
    for ties in ("random", "expected"):
        assert precision_at_k(scores, relevant, 5, ties=ties) == pytest.approx(2 / 5 / 2)  # the second query has none
        assert recall_at_k(scores, relevant, 5, ties=ties) == pytest.approx(2 / 3)  # and is left out here
        assert recall_at_k(scores, relevant, 10, ties=ties) == 1.0
    for figure in (precision_at_k, recall_at_k):
        for k in (0, 11):
            with pytest.raises(ValueError, match=rf"from 1 to 10, the rows to rank, got \[{k}\]"):
                figure(scores, relevant, k)
    with pytest.raises(ValueError, match="needs a query with a relevant row"):
        recall_at_k(scores, np.zeros((2, 10), bool), 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_scores_of_any_number_type_are_ranked_downwards(dtype):
    scores = np.array([[0, 1, 0, 0]]).astype(dtype)
    assert mean_average_precision(scores, [[False, True, False, False]]) == 1.0


def vectors(queries=30, rows=200, width=8, classes=5, seed=0):
    """Queries, database with every row several times, and labels; a few rows without one."""
    generator = np.random.default_rng(seed)
    distinct = generator.standard_normal((rows // 4, width)).astype(np.float32)
    database = distinct[generator.integers(0, len(distinct), rows)]
    asked = generator.standard_normal((queries, width)).astype(np.float32)
    return asked, database, generator.integers(-1, classes, queries), generator.integers(-1, classes, rows)


def figures(evaluation):
    return {name: value for name, value in evaluation.to_dict().items() if name != "seed"}


def matrix(queries, database, labels, base_labels):
    """Scores and relevance of labelled queries, equal rows with equal scores."""
    distinct, places = np.unique(database, axis=0, return_inverse=True)
    relevant = (labels[:, None] == base_labels) & (labels >= 0)[:, None]
    return (queries @ distinct.T)[:, places.ravel()], relevant


@pytest.mark.parametrize("k", [1, 7, 50, 1000])
def test_evaluate_equals_the_full_matrix(k):
    given = vectors()
    found = evaluate(*given, k=k, at=(1, 20, 200), seed=3)
    scores, relevant = matrix(*given)
    known = relevant.any(axis=1)
    assert math.isclose(found.map_published, mean_average_precision(scores, relevant, k, seed=3), rel_tol=1e-12)
    strict = mean_average_precision(scores[known], relevant[known], k, "relevant", ties="expected")
    assert math.isclose(found.map_strict, strict, rel_tol=1e-12)
    assert list(found.precision) == list(found.recall) == [1, 20, 200]
    for rank in (1, 20, 200):
        precision = precision_at_k(scores[known], relevant[known], rank, ties="expected")
        assert math.isclose(found.precision[rank], precision, rel_tol=1e-12)
        assert math.isclose(found.recall[rank], recall_at_k(scores, relevant, rank, ties="expected"), rel_tol=1e-12)
    assert (found.k, found.num_queries, found.num_ranked) == (min(k, 200), 30, 200)
    assert (found.num_unlabelled, found.num_unmatched) == ((given[2] < 0).sum(), 0)
    assert math.isclose(found.chance, relevant[known].mean(), rel_tol=1e-12)


def test_evaluate_equals_scikit_learn_on_full_rankings():
    generator = np.random.default_rng(0)
    queries, database = (generator.standard_normal((n, 8)).astype(np.float32) for n in (20, 500))
    labels, base_labels = generator.integers(0, 4, 20), generator.integers(0, 4, 500)
    expected = np.mean(
        [
            average_precision_score(base_labels == label, database @ query)
            for query, label in zip(queries, labels, strict=True)
        ]
    )
    found = evaluate(queries, database, labels, base_labels, k=500)
    assert found.map_strict == pytest.approx(expected, rel=1e-9)
    assert found.map_published == pytest.approx(expected, rel=1e-9)


def test_one_hit_at_rank_one_is_published_as_one_and_strictly_a_fifth():
    database = np.linspace(1, 0, 20, dtype=np.float32)[:, None]
    base_labels = np.ones(20, int)
    base_labels[[0, *range(10, 19)]] = 0
    found = evaluate(np.ones((1, 1)), database, [0], base_labels, k=5, at=(1, 5))
    assert (found.map_published, found.map_strict) == (1.0, pytest.approx(0.2))
    assert found.precision == {1: 1.0, 5: pytest.approx(0.2)}
    assert found.recall == {1: pytest.approx(0.1), 5: pytest.approx(0.1)}


def test_queries_without_a_relevant_row_are_published_as_zero_and_strictly_left_out():
    database = np.eye(3, dtype=np.float32)
    found = evaluate(np.eye(3), database, [0, -1, 7], [0, -1, 1], k=3, at=[1])
    assert (found.map_published, found.map_strict) == (pytest.approx(1 / 3), 1.0)
    assert (found.num_queries, found.num_unlabelled, found.num_unmatched) == (3, 1, 1)
    assert (found.precision, found.recall, found.chance) == ({1: 1.0}, {1: 1.0}, pytest.approx(1 / 3))


def test_relevant_means_one_shared_label_of_several():
    queries, database, labels, base_labels = vectors()
    generator = np.random.default_rng(1)
    labels, base_labels = (generator.random((n, 6)) < 0.2 for n in (30, 200))
    found = evaluate(queries, database, labels, base_labels, k=20, seed=3)
    scores, _ = matrix(queries, database, np.zeros(30), np.zeros(200))
    relevant = np.array([[bool((a & b).any()) for b in base_labels] for a in labels])
    assert math.isclose(found.map_published, mean_average_precision(scores, relevant, 20, seed=3), rel_tol=1e-12)
    assert found.num_unlabelled == (~labels.any(axis=1)).sum() > 0
    assert figures(evaluate(queries, database, labels.astype(int), base_labels.astype(np.uint8), k=20, seed=3)) == (
        figures(found)
    )
    one_hot = np.eye(5, dtype=bool)
    single = vectors()
    twin = (*single[:2], *(np.where(row[:, None] < 0, False, one_hot[row]) for row in single[2:]))
    assert figures(evaluate(*twin)) == figures(evaluate(*single))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("at_once", "floats"), [(2, 2**24), (7, 2**24), (256, 200 * 3), (1000, 2**24)])
def test_figures_do_not_depend_on_chunks_and_threads(monkeypatch, threads, at_once, floats):
    expected = evaluate(*vectors(), curve=True)
    monkeypatch.setattr(ranking, "_QUERIES_AT_ONCE", at_once)
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", floats)
    assert evaluate(*vectors(), curve=True, threads=threads).to_dict() == expected.to_dict()


def test_figures_do_not_depend_on_the_order_of_the_database_ties_included():
    queries, database, labels, base_labels = vectors()
    expected = evaluate(queries, database, labels, base_labels, curve=True).to_dict()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(200)
        assert evaluate(queries, database[order], labels, base_labels[order], curve=True).to_dict() == expected
    by_class = np.argsort(base_labels, kind="stable")
    for order in (by_class, by_class[::-1]):
        assert evaluate(queries, database[order], labels, base_labels[order], curve=True).to_dict() == expected


def test_the_strict_figure_does_not_depend_on_the_seed_and_is_the_mean_of_the_random_ones():
    given = vectors(queries=200)
    runs = [evaluate(*given, k=20, seed=seed) for seed in range(40)]
    assert len({run.map_strict for run in runs}) == 1
    assert len({run.map_published for run in runs}) > 30
    scores, relevant = matrix(*given)
    known = relevant.any(axis=1)
    random = [mean_average_precision(scores[known], relevant[known], 20, "relevant", seed) for seed in range(40)]
    assert abs(np.mean(random) - runs[0].map_strict) <= 5 * np.std(random) / math.sqrt(40)


def test_equal_rows_and_zeros_of_either_sign_tie_exactly():
    """A copy of the database for every class: the expected precision at any rank is then that of a random order."""
    generator = np.random.default_rng(0)
    queries, rows = (generator.standard_normal((n, 33)).astype(np.float32) for n in (40, 101))
    rows[:, 0] = 0.0
    twin = rows.copy()
    twin[:, 0] = -0.0
    found = evaluate(queries, np.concatenate([rows, twin]), np.zeros(40, int), np.repeat([0, 1], 101), at=range(1, 203))
    np.testing.assert_allclose(list(found.precision.values()), 0.5, rtol=1e-12)


def test_a_query_leaves_itself_out():
    _, database, _, labels = vectors()
    queries = database + np.random.default_rng(1).normal(0, 0.1, database.shape).astype(np.float32)
    found = evaluate(queries, database, labels, labels, k=30, exclude_self=True, seed=2)
    scores, relevant = matrix(queries, database, labels, labels)
    published, strict = [], []
    for i in range(200):
        others = np.arange(200) != i
        row = scores[i, others][None], relevant[i, others][None]
        if relevant[i, others].any():
            strict.append(mean_average_precision(*row, 30, "relevant", ties="expected"))
        published.append([mean_average_precision(*row, 30, seed=seed) for seed in range(30)])
    assert math.isclose(found.map_strict, np.mean(strict), rel_tol=1e-12)
    spread = np.std(published, axis=1)
    assert abs(found.map_published - np.mean(published)) <= 5 * math.sqrt((spread**2).sum()) / 200 + 1e-12
    assert found.num_ranked == 199
    alone = evaluate(np.eye(3), np.eye(3), [0, 1, 1], [0, 1, 1], exclude_self=True)
    assert (alone.num_unmatched, alone.num_ranked, alone.k) == (1, 2, 2)


def test_the_curve_runs_over_the_whole_database():
    given = vectors(rows=400)
    found = evaluate(*given, curve=True, at=(1, 400))
    curve = found.curve
    assert (curve.ranks[0], curve.ranks[-1]) == (1, 400)
    assert (np.diff(curve.ranks) > 0).all()
    assert len(curve.ranks) == len(curve.precision) == len(curve.recall)
    assert (curve.precision[0], curve.recall[0]) == (found.precision[1], found.recall[1])
    assert (curve.precision[-1], curve.recall[-1]) == (pytest.approx(found.chance), pytest.approx(1.0))
    assert (np.diff(curve.recall) >= 0).all()
    scores, relevant = matrix(*given)
    known = relevant.any(axis=1)
    for rank, precision in list(zip(curve.ranks, curve.precision, strict=True))[::20]:
        assert math.isclose(precision, precision_at_k(scores[known], relevant[known], rank, ties="expected"))
    assert evaluate(*given).curve is None


def test_figures_survive_json():
    found = evaluate(*vectors(), seed=np.int64(4), at=np.array([1, 10]), curve=True)
    figures = json.loads(json.dumps(found.to_dict()))
    assert {"map_published", "map_strict", "precision@1", "recall@10", "k", "seed", "chance"} < set(figures)
    assert figures["precision@10"] == found.precision[10]
    assert figures["curve"]["ranks"] == found.curve.ranks.tolist()
    assert "curve" not in evaluate(*vectors()).to_dict()
    assert "average_precision" not in figures


def test_average_precisions_are_those_of_each_query_alone():
    """The published figure is their mean; without a relevant row it is 0."""
    generator = np.random.default_rng(0)
    queries, database = generator.standard_normal((8, 6)), generator.standard_normal((90, 6))  # no ties
    labels, base_labels = np.array([0, -1, 1, 2, 9, 0, 1, 2]), generator.integers(0, 3, 90)
    found = evaluate(queries, database, labels, base_labels, k=30)
    assert found.average_precision.shape == (len(queries),)
    assert found.average_precision.mean() == pytest.approx(found.map_published)
    assert np.flatnonzero(found.average_precision == 0).tolist() == [1, 4]
    scores, relevant = queries @ database.T, labels[:, None] == base_labels
    for query in range(8):
        alone = mean_average_precision(scores[[query]], relevant[[query]], 30)
        assert found.average_precision[query] == pytest.approx(alone)


def test_default_ranks_are_those_that_the_ranking_has():
    assert list(evaluate(*vectors()).precision) == [1, 10, 100]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_vectors_of_any_float_type_are_compared_in_float32(dtype):
    queries, database, *labels = vectors()
    rounded = queries.astype(dtype), database.astype(dtype)
    expected = evaluate(*(vector.astype(np.float32) for vector in rounded), *labels)
    assert figures(evaluate(*rounded, *labels)) == figures(expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"queries": np.zeros(4)}, r"queries must be float vectors \[n, D\].* got float64 \(4,\)"),
        ({"database": np.zeros((5, 4), np.uint8)}, r"database must be .* codes restored first, got uint8 \(5, 4\)"),
        ({"database": np.zeros((0, 4))}, r"got float64 \(0, 4\)"),
        ({"database": np.zeros((5, 3))}, r"one width, got \(3, 4\) and \(5, 3\)"),
        ({"queries": np.full((3, 4), [[0], [0], [np.nan]])}, "queries must be finite and shorter .*, row 2 is not"),
        ({"database": np.full((5, 4), np.inf)}, "database must be finite and shorter .*, row 0 is not"),
        ({"database": np.full((5, 4), 1e19, np.float32)}, "shorter than 1e19, row 0 is not"),
        ({"query_labels": ["a", "b", "c"]}, r"query_labels must be int \[3\], .* got <U1 \(3,\)"),
        ({"query_labels": [0.0, 1.0, 1.0]}, r"must be int \[3\], .* got float64"),
        ({"query_labels": [0, 1]}, r"must be int \[3\], .* got int64 \(2,\)"),
        ({"database_labels": [0, 1, -2, 0, 0]}, r"database_labels must be int \[5\], -1 for no label"),
        ({"database_labels": np.full((5, 2), 2)}, r"or 0/1 \[5, C\], got int64 \(5, 2\)"),
        ({"query_labels": np.ones((3, 2), bool)}, r"got \(3, 2\) and \(5,\)"),
        (
            {"query_labels": np.ones((3, 2), bool), "database_labels": np.ones((5, 3), bool)},
            r"one C, got \(3, 2\) and \(5, 3\)",
        ),
        ({"query_labels": [-1, -1, 9]}, "no query shares a label with any database row"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"at": (1, 6)}, r"from 1 to 5, the rows to rank, got \[1, 6\]"),
        ({"at": (0,)}, r"got \[0\]"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"exclude_self": True}, "exclude_self needs query i and database row i to be one item"),
        (
            {name: np.zeros((1, 4)) for name in ("queries", "database")}
            | {name: [0] for name in ("query_labels", "database_labels")}
            | {"exclude_self": True},
            "leaves no row to rank",
        ),
    ],
)
def test_illegal_vectors_labels_and_options_are_refused(arguments, match):
    given = {
        "queries": np.zeros((3, 4)),
        "database": np.zeros((5, 4)),
        "query_labels": [0, 1, 1],
        "database_labels": [0, 1, 0, 0, 0],
    }
    with pytest.raises(ValueError, match=match):
        evaluate(**given | arguments)
