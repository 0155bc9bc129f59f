"""Float search, FAISS product quantization and binary codes on the same features."""

import inspect

import faiss
import numpy as np
import pytest

from tcq_hf.evaluation import baselines
from tcq_hf.evaluation.baselines import (
    float_cosine,
    float_scores,
    itq,
    opq,
    pq,
    pq_scores,
    random_projections,
    selected_projections,
)
from tcq_hf.evaluation.metrics import evaluate

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


CODED = [pq, opq, itq, random_projections, selected_projections]


def coded(baseline, *features, bits=8, **options):
    """Any coded baseline at 8 bits; PQ and OPQ with two codebooks of 16."""
    if baseline in (pq, opq):
        options["codebook_bits"] = 4
    return baseline(*features, bits, **options)


@pytest.mark.parametrize("baseline", CODED)
def test_the_database_has_at_most_the_rows_that_its_bits_can_tell_apart(baseline):
    queries, database = coded(baseline, QUERIES, DATABASE, DATABASE)
    assert len(queries) == 5
    assert len(database) == 300
    assert queries.dtype == database.dtype == np.float32
    assert 16 < len(np.unique(database, axis=0)) <= 2**8


@pytest.mark.parametrize("baseline", CODED)
def test_only_train_is_learnt_from(baseline):
    """Other queries and database rows change nothing for those that stay."""
    _, database = coded(baseline, QUERIES, DATABASE[:50], DATABASE[50:])
    more = coded(baseline, -QUERIES[:1], np.concatenate([DATABASE[:20], -DATABASE[:7]]), DATABASE[50:])
    np.testing.assert_allclose(more[1][:20], database[:20], atol=1e-6)
    other = coded(baseline, QUERIES, DATABASE[:50], DATABASE[50:] ** 3)
    assert not np.allclose(other[1], database, atol=1e-3)


@pytest.mark.parametrize("baseline", CODED)
def test_a_seed_repeats_itself_and_another_does_not(baseline):
    first, again, other = (coded(baseline, QUERIES, DATABASE, DATABASE, seed=seed)[1] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("baseline", [itq, random_projections, selected_projections])
def test_signs_score_by_hamming_distance(baseline):
    queries, database = baseline(QUERIES, DATABASE, DATABASE, 10)
    assert set(np.unique(queries)) == set(np.unique(database)) == {-1, 1}
    distances = (queries[:, None] != database).sum(axis=2)
    np.testing.assert_array_equal(queries @ database.T, 10 - 2 * distances)


@pytest.mark.parametrize("baseline", [itq, random_projections, selected_projections])
def test_signs_are_balanced_on_train(baseline):
    """Both centre: the features here all point to one side."""
    _, database = baseline(QUERIES, DATABASE + 1, DATABASE + 1, 10)
    assert np.abs(database.mean(axis=0)).max() < 0.4


def test_itq_loses_less_than_the_principal_components_that_it_turns():
    """It seeks the rotation of the components that comes closest to signs: the one of the largest absolute sum."""
    unit = DATABASE / np.linalg.norm(DATABASE, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    components = faiss.PCAMatrix(12, 8)
    components.train(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    projected = components.apply(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    signs = itq(QUERIES, DATABASE, DATABASE, 8)[1]
    # The best rotation for these signs, by Procrustes, has the sum of the singular values.
    turned = np.linalg.svd(projected.T @ signs, compute_uv=False).sum()
    assert turned > np.abs(projected).sum()


def test_pq_is_what_faiss_gives():
    unit = DATABASE / np.linalg.norm(DATABASE, axis=1, keepdims=True)
    index = faiss.IndexPQ(12, 2, 4)
    index.train(unit)
    index.add(unit)
    np.testing.assert_allclose(
        pq(QUERIES, DATABASE, DATABASE, 8, codebook_bits=4)[1], index.reconstruct_n(0, 300), atol=1e-6
    )


def test_opq_keeps_inner_products_and_restores_better_what_is_correlated():
    generator = np.random.default_rng(0)
    spread = np.linspace(3, 0.1, 12)[:, None] * np.linalg.qr(generator.standard_normal((12, 12)))[0]
    features = (generator.standard_normal((600, 12)) @ spread).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    queries, _ = opq(features[:50], features, features, 8, codebook_bits=4)
    np.testing.assert_allclose(queries @ queries.T, unit[:50] @ unit[:50].T, atol=1e-5)
    errors = {
        baseline: np.square(np.subtract(*baseline(features, features, features, 8, codebook_bits=4))).mean()
        for baseline in (pq, opq)
    }
    assert errors[opq] < errors[pq]


def test_one_evaluation_serves_all():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    features = (2 * np.eye(12)[labels] + 0.5 * generator.standard_normal((300, 12))).astype(np.float32)
    base, asked = features[30:], features[:30]
    for vectors in (float_cosine(asked, base, base), *(coded(baseline, asked, base, base) for baseline in CODED)):
        assert evaluate(*vectors, labels[:30], labels[30:]).map_strict > 0.5


def test_more_bits_than_components_are_refused_by_itq_alone():
    with pytest.raises(ValueError, match=r"bits must be from 1 to 12, the principal components of train .*, got 16"):
        itq(QUERIES, DATABASE, DATABASE, 16)
    with pytest.raises(ValueError, match="bits must be from 1 to 9,"):
        itq(QUERIES, DATABASE, DATABASE[:9], 10)
    assert random_projections(QUERIES, DATABASE, DATABASE, 16)[1].shape == (300, 16)


@pytest.mark.parametrize("baseline", [float_cosine, *CODED])
def test_features_that_do_not_fit_are_refused(baseline):
    options = [8] if "bits" in inspect.signature(baseline).parameters else []
    for features in (
        (QUERIES, DATABASE, DATABASE[:, :5]),
        (QUERIES[0], DATABASE, DATABASE),
        (QUERIES, DATABASE[:0], DATABASE),
    ):
        with pytest.raises(ValueError, match=r"must be features \[n, F\] of one width F, got \("):
            baseline(*features, *options)


@pytest.mark.parametrize("baseline", [float_cosine, *CODED])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30])
def test_features_that_are_not_finite_are_refused_by_name_and_row(baseline, number, bad):
    features = [QUERIES, DATABASE, DATABASE]
    features[number] = features[number].copy()
    features[number][[3, 4], 2] = bad
    name = ("queries", "database", "train")[number]
    with pytest.raises(ValueError, match=f"{name} must be finite and shorter than 1e19, row 3 is not"):
        baseline(*features, *([8] if "bits" in inspect.signature(baseline).parameters else []))


@pytest.mark.parametrize("baseline", CODED)
@pytest.mark.parametrize("bits", [0, -8])
def test_codes_of_no_bits_are_refused(baseline, bits):
    with pytest.raises(ValueError, match="bits must be"):
        baseline(QUERIES, DATABASE, DATABASE, bits)


@pytest.mark.parametrize("baseline", [pq, opq])
def test_bits_that_no_codebook_fills_and_too_few_rows_are_refused(baseline):
    with pytest.raises(ValueError, match="multiple of codebook_bits, got 12 and 8"):
        baseline(QUERIES, DATABASE, DATABASE, 12)
    with pytest.raises(ValueError, match="train must have at least 256 rows, one for each codeword, got 100"):
        baseline(QUERIES, DATABASE, DATABASE[:100], 16)
    with pytest.raises(ValueError, match="at least 256 rows"):
        pq_scores(QUERIES, DATABASE[:100], 4)


def test_opq_refuses_fewer_rows_than_features():
    generator = np.random.default_rng(0)
    queries, train = generator.standard_normal((2, 20, 24)).astype(np.float32)
    with pytest.raises(ValueError, match="train must have at least 24 rows, one for each feature, got 20"):
        opq(queries, train, train, 8, codebook_bits=4)


# --- Selected projections --------------------------------------------------------------------------------------------


def test_projections_are_selected_by_their_score_and_correlation(monkeypatch):
    """A loop over bits and pairs, on signs that are at hand."""
    generator = np.random.default_rng(0)
    signs = np.where(generator.standard_normal((50, 30)) < 0, -1.0, 1.0)
    signs[:, 10] = signs[:, 3]
    pairs = generator.integers(50, size=(40, 2))
    random = np.random.default_rng(5).integers(50, size=(40, 2))
    scores = [
        sum(signs[a, bit] == signs[b, bit] for a, b in pairs) / 40
        - sum(signs[a, bit] == signs[b, bit] for a, b in random) / 40
        for bit in range(30)
    ]
    taken = []
    for bit in sorted(range(30), key=lambda bit: -scores[bit]):
        if all(abs(sum(signs[row, bit] * signs[row, other] for row in range(50)) / 50) < 0.6 for other in taken):
            taken.append(bit)
    assert baselines._select(signs, pairs, 12, np.random.default_rng(5)) == taken[:12]
    assert len({3, 10} & set(taken)) == 1
    # The twin comes last, when nothing else is left.
    every = baselines._select(signs, pairs, 30, np.random.default_rng(5))
    assert sorted(every) == list(range(30))
    assert every[-1] in {3, 10}


def test_a_selection_needs_neighbours_and_a_pool():
    with pytest.raises(ValueError, match="bits must be from 1 to 4, the projections to choose from, got 8"):
        selected_projections(QUERIES, DATABASE, DATABASE, 8, pool=4)
    with pytest.raises(ValueError, match="train must have more than 5 rows"):
        selected_projections(QUERIES, DATABASE, DATABASE[:5], 8)
