"""significance: closed forms, symmetry, coverage of the interval, illegal input."""

import numpy as np
import pytest

from tcq_hf.evaluation import significance
from tcq_hf.evaluation.significance import paired_bootstrap


def pairs(count=400, seed=0):
    generator = np.random.default_rng(seed)
    hard = generator.uniform(size=count)
    return hard + 0.1 * generator.standard_normal(count) + 0.02, hard


def test_a_constant_difference_is_certain():
    found = paired_bootstrap(np.linspace(0, 1, 50) + 0.25, np.linspace(0, 1, 50))
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_the_interval_is_that_of_the_normal_law():
    """Of 400 values the mean is normal to better than the spread of quantiles over 10,000 draws."""
    first, second = pairs()
    found, difference = paired_bootstrap(first, second), first - second
    error = difference.std() / 20
    assert found.mean == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(error, rel=0.03)
    for end, side in ((found.low, -1.96), (found.high, 1.96)):
        assert end == pytest.approx(difference.mean() + side * error, abs=0.15 * error)


def test_pairing_leaves_out_how_hard_the_queries_are():
    first, second = pairs()
    unpaired = np.sqrt(first.var() / 400 + second.var() / 400)
    assert paired_bootstrap(first, second).standard_error < 0.4 * unpaired


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 sets with a true difference of 0.02, 90 % intervals: 180 +- 4.2 expected, five deviations allowed."""
    found = [paired_bootstrap(*pairs(200, seed), samples=500, level=0.9) for seed in range(200)]
    assert 159 <= sum(each.low <= 0.02 <= each.high for each in found) <= 200


def test_the_order_of_searches_is_the_sign_of_the_difference():
    forth, back = paired_bootstrap(*pairs()), paired_bootstrap(*reversed(pairs()))
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_blocks_draw_what_one_block_draws(monkeypatch):
    whole = paired_bootstrap(*pairs())
    monkeypatch.setattr(significance, "_DRAWS", 1000)
    assert paired_bootstrap(*pairs()) == whole


def test_a_difference_is_read_with_its_interval():
    found = paired_bootstrap(np.full(5, 0.5), np.zeros(5))
    assert str(found) == "+0.500 [+0.500, +0.500]"


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ([1.0, 2], [1.0], {}, r"both must be \[Q\] of the same queries, got \(2,\) and \(1,\)"),
        ([], [], {}, r"got \(0,\)"),
        ([[1.0]], [[1.0]], {}, r"got \(1, 1\)"),
        ([1.0, np.nan], [1.0, 1], {}, "query 1 is not"),
        ([1.0], [1.0], {"samples": 1}, "samples must be at least 2"),
        ([1.0], [1.0], {"level": 1}, "level between 0 and 1, got 10000 and 1"),
    ],
)
def test_impossible_input_is_refused(first, second, options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(np.array(first), np.array(second), **options)
