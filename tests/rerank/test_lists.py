"""lists: what a search may give, and a new ranking against a loop."""

import numpy as np
import pytest
from scipy import sparse

from tcq_hf.rerank.lists import check_lists, rank_by


def test_lists_keep_their_values_and_empty_places_score_minus_infinity():
    scores, ids = check_lists([[3.0, 2.0, -3.4e38]], np.array([[4, 0, -1]], np.int32), 5)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    assert scores.tolist() == [[3, 2, -np.inf]]
    assert ids.tolist() == [[4, 0, -1]]
    assert check_lists([[np.nan]], [[-1]], 5)[0].tolist() == [[-np.inf]]


@pytest.mark.parametrize(
    ("scores", "ids", "error", "message"),
    [
        ([1.0], [1], ValueError, r"one shape \[Q, k\], got \[1\] and \[1\]"),
        ([[1.0, 2.0]], [[1]], ValueError, r"got \[1, 2\] and \[1, 1\]"),
        ([[1.0]], [[1.0]], TypeError, "got float64 and float64"),
        ([["a"]], [[1]], TypeError, "got <U1 and int64"),
        ([[1.0], [1.0]], [[4], [5]], ValueError, "the list of query 1 has an id that is no row from 0 to 4"),
        ([[1.0], [1.0]], [[-2], [4]], ValueError, "the list of query 0 has an id that is no row"),
        ([[1.0, 1.0]], [[-1, 0]], ValueError, "the list of query 0 has the id -1 before a row"),
        ([[1.0, 1.0, 0.5]], [[2, 0, 2]], ValueError, "the list of query 0 has one id twice"),
        ([[1.0, np.nan]], [[0, 1]], ValueError, "the list of query 0 has a score that is NaN"),
    ],
)
def test_impossible_lists_are_refused(scores, ids, error, message):
    with pytest.raises(error, match=message):
        check_lists(np.array(scores), np.array(ids), 5)


def ranked_by_loop(similarity, ids):
    """Ids by descending similarity, ties by place in the list and then number; the rest of the list behind."""
    rows = []
    for query, listed in enumerate(ids.tolist()):
        listed = [row for row in listed if row >= 0]
        keys = [
            (-value, listed.index(row) if row in listed else len(listed), row)
            for row, value in enumerate(similarity[query])
            if value > 0
        ]
        best = [row for *_, row in sorted(keys)]
        best += [row for row in listed if row not in best]
        best = best[: ids.shape[1]]
        rows.append(best + [-1] * (ids.shape[1] - len(best)))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_the_new_ranking_is_that_of_a_loop(seed):
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(30)[:8] for _ in range(20)])
    ids[generator.random(20) < 0.3, 6:] = -1
    # Few values, so that many tie; some not above 0.
    similarity = generator.integers(-1, 4, (20, 30)) * (generator.random((20, 30)) < 0.3).astype(np.float32)
    scores, found = rank_by(sparse.csr_array(similarity), np.zeros(ids.shape, np.float32), ids)
    assert found.tolist() == ranked_by_loop(similarity, ids)
    expected = np.maximum(np.take_along_axis(similarity, np.maximum(found, 0), axis=1), 0)
    np.testing.assert_array_equal(scores, np.where(found < 0, -np.inf, expected))
