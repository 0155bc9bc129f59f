"""Scores of float search and of FAISS product quantization."""

import numpy as np
import pytest

from tcq_hf.evaluation.baselines import float_scores, pq_scores

RNG = np.random.default_rng(0)
DATABASE = RNG.standard_normal((300, 12)).astype(np.float32) + 1
QUERIES = RNG.standard_normal((5, 12)).astype(np.float32) + 1


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("centre", [False, True])
def test_float_scores_are_cosines(centre):
    mean = DATABASE.mean(axis=0) if centre else 0
    expected = [[cosine(query - mean, row - mean) for row in DATABASE] for query in QUERIES]
    np.testing.assert_allclose(float_scores(QUERIES, DATABASE, centre), expected, rtol=0, atol=1e-5)


def test_pq_restores_a_database_of_as_many_rows_as_codewords():
    """With 16 codewords for 16 rows every row is its own codeword, so nothing is lost."""
    few = DATABASE[:16]
    np.testing.assert_allclose(pq_scores(QUERIES, few, 3, num_bits=4), float_scores(QUERIES, few), rtol=0, atol=1e-5)


def test_more_codewords_lose_less():
    exact = float_scores(QUERIES, DATABASE)
    errors = [np.abs(pq_scores(QUERIES, DATABASE, 4, num_bits=bits) - exact).mean() for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_scores_do_not_depend_on_the_scale_of_rows_and_any_width_is_taken():
    scale = RNG.uniform(0.5, 2, (300, 1)).astype(np.float32)
    np.testing.assert_allclose(float_scores(QUERIES, DATABASE * scale), float_scores(QUERIES, DATABASE), atol=1e-5)
    assert pq_scores(QUERIES, DATABASE, 5, num_bits=4).shape == (5, 300)  # 12 is no multiple of 5


def test_too_few_rows_are_refused():
    with pytest.raises(RuntimeError, match="training points"):
        pq_scores(QUERIES, DATABASE[:100], 4)
