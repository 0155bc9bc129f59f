"""mean_average_precision against a slow loop, scikit-learn, closed forms and symmetries."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tcq_hf import mean_average_precision


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
        ({"scores": np.array([[0, 0, 0], [0, np.nan, 0]])}, "must not be NaN, query 1 has one"),
    ],
)
def test_illegal_input_is_refused(arguments, match):
    given = {"scores": np.zeros((2, 3)), "relevant": np.zeros((2, 3), bool)} | arguments
    with pytest.raises(ValueError, match=match):
        mean_average_precision(**given)
