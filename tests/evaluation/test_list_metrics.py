"""list_metrics: against a loop, against the figures from vectors, hand examples, illegal input."""

import numpy as np
import pytest

from tcq_hf.evaluation.list_metrics import mean_average_precision_of_lists
from tcq_hf.evaluation.metrics import evaluate


def by_loop(ids, labels, base, k, denominator, exclude_self):
    values = []
    for query, listed in enumerate(ids.tolist()):
        listed = [row for row in listed if row != query] if exclude_self else listed
        relevant = [r for r in range(len(base)) if base[r] == labels[query] >= 0 and not (exclude_self and r == query)]
        found = [rank for rank, row in enumerate(listed[:k], 1) if row in relevant]
        total = sum((place + 1) / rank for place, rank in enumerate(found))
        divisor = len(found) if denominator == "hits" else min(k, len(relevant))
        if divisor or denominator == "hits":
            values.append(total / max(1, divisor))
    return np.mean(values)


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_lists_against_a_loop(denominator, exclude_self, k):
    generator = np.random.default_rng(k)
    base = generator.integers(-1, 4, 30)
    labels = base if exclude_self else generator.integers(-1, 5, 30)
    ids = np.stack([generator.permutation(30)[:12] for _ in range(30)])
    ids[generator.random(30) < 0.3, 9:] = -1
    found = mean_average_precision_of_lists(ids, labels, base, k, denominator, exclude_self)
    # Sums of at most 12 numbers below one.
    assert found == pytest.approx(by_loop(ids, labels, base, k, denominator, exclude_self), rel=1e-12)


def test_lists_without_ties_have_the_figures_of_their_vectors():
    generator = np.random.default_rng(0)
    vectors, labels = generator.standard_normal((60, 5)).astype(np.float32), generator.integers(0, 4, 60)
    ids = np.argsort(-(vectors @ vectors.T), axis=1)
    expected = evaluate(vectors, vectors, labels, labels, k=20, exclude_self=True)
    for denominator, figure in (("hits", expected.map_published), ("relevant", expected.map_strict)):
        found = mean_average_precision_of_lists(ids, labels, labels, 20, denominator, exclude_self=True)
        assert found == pytest.approx(figure, rel=1e-12)


def test_pictures_with_several_labels_are_relevant_when_they_share_one():
    base = np.array([[1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]])
    ids, queries = [[0, 1, 2, 3]], [[0, 1, 0]]
    assert mean_average_precision_of_lists(ids, queries, base, 4) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision_of_lists(ids, queries, base, 2) == 1
    assert mean_average_precision_of_lists(ids, queries, base, 2, "relevant") == 0.5


def test_a_query_without_relevant_rows_counts_zero_or_is_left_out():
    ids, labels, base = [[0, 1], [0, 1]], [0, 7], [0, 1]
    assert mean_average_precision_of_lists(ids, labels, base) == 0.5
    assert mean_average_precision_of_lists(ids, labels, base, denominator="relevant") == 1
    with pytest.raises(ValueError, match="no query has a relevant row"):
        mean_average_precision_of_lists(ids, [7, 8], base, denominator="relevant")


@pytest.mark.parametrize(
    ("ids", "labels", "base", "options", "message"),
    [
        ([0, 1], [0], [0, 1], {}, r"ids must be integers \[Q, L\], got int64 \[2\]"),
        ([[0.0]], [0], [0], {}, "got float64"),
        ([[0]], [0, 1], [0], {}, r"query_labels must be \[1\]"),
        ([[0]], [0], [[0, 1]], {}, r"or both with C columns, got \[1\] and \[1, 2\]"),
        ([[0], [2]], [0, 1], [0, 1], {}, "the list of query 1 has an id that is no row from 0 to 1"),
        ([[-2]], [0], [0], {}, "the list of query 0"),
        ([[0, 1], [1, 1]], [0, 1], [0, 1], {}, "the list of query 1 has one id twice"),
        ([[0]], [0], [0], {"k": 0}, "k must be at least 1, got 0"),
        ([[0]], [0], [0], {"denominator": "all"}, "'hits' or 'relevant', got 'all'"),
        ([[0]], [0], [0, 0], {"exclude_self": True}, "needs the queries to be the database, got 1 and 2"),
    ],
)
def test_impossible_lists_are_refused(ids, labels, base, options, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision_of_lists(ids, labels, base, **options)
