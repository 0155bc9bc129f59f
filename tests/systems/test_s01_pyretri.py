"""S1, PyRetri: its options are formulas by loop; on digits k-reciprocal adds .06, DBA and QE .10.

Pooling is not offered, nor what docs/pyretri.md names beside it.
"""

import numpy as np
import pytest

from tcq_hf.evaluation.list_metrics import mean_average_precision_of_lists
from tcq_hf.index.transforms import Step, fit_chain
from tcq_hf.rerank.graph import KNNGraph
from tcq_hf.rerank.k_reciprocal import KReciprocal, encode
from tcq_hf.rerank.query_expansion import QueryExpansion


def lists_of(queries, vectors):
    """Scores and ids of all rows, best first."""
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, ids, axis=1), ids


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- The options, with the parameters of PyRetri, against loops ------------------------------------------------------


@pytest.fixture(scope="module")
def few(digits):
    """80 digits as gallery, 10 others as queries, their graph and the lists of all rows."""
    rows = digits[0][np.random.default_rng(3).permutation(1797)[:90]].astype(np.float64)
    vectors, queries = rows[:80], rows[80:]
    return vectors, queries, KNNGraph.build(vectors, 20), lists_of(queries, vectors)


def test_qe_is_the_sum_of_a_query_and_its_ten_nearest(few):
    vectors, queries, graph, lists = few
    expected = []
    for query, ids in zip(queries, lists[1], strict=True):
        total = query.copy()
        for row in ids[:10]:
            total += vectors[row]
        expected.append(total / np.linalg.norm(total))
    found = QueryExpansion(k=10, alpha=0).fit(graph).expanded(queries, *lists)
    # Sums of eleven vectors of length one in float32.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dba_is_the_sum_of_a_row_and_its_ten_nearest(few):
    vectors, _, graph, _ = few
    expected = []
    for row, own in enumerate(vectors):
        total = own.copy()
        for other in np.argsort(-(vectors @ own), kind="stable")[:11]:
            total += vectors[other] if other != row else 0
        expected.append(total / np.linalg.norm(total))
    found = QueryExpansion(k=10, alpha=0, database=True).fit(graph).embeddings()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_k_reciprocal_is_its_formula_over_the_union_of_queries_and_gallery(few):
    vectors, queries, graph, lists = few
    expected = union_distances(np.concatenate([vectors, queries]), 20, 6, 0.3)[80:, :80]
    scores, ids = KReciprocal(20, 6, 0.3, transductive=True).fit(graph)(queries, *lists)
    # Sums of at most ninety products below one in float32.
    np.testing.assert_allclose(1 - scores, np.take_along_axis(expected, ids, axis=1), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def union_distances(rows, k1, k2, weight):
    """New distances `[n, n]` between all rows, by loops over dense matrices."""
    n, distances = len(rows), np.maximum(2 - 2 * rows @ rows.T, 0)
    ranked = np.argsort(distances, axis=1, kind="stable")
    distances /= distances.max(axis=1, keepdims=True)

    def reciprocal(row, k):
        return {i for i in ranked[row, : k + 1].tolist() if row in ranked[i, : k + 1]}

    encoded = np.zeros((n, n))
    for row in range(n):
        members = reciprocal(row, k1)
        extended = members.union(*(r for r in (reciprocal(c, k1 // 2) for c in members) if _mostly(r, members)))
        for other in extended:
            encoded[row, other] = np.exp(-distances[row, other])
    encoded /= encoded.sum(axis=1, keepdims=True)
    encoded = np.stack([encoded[ranked[row, :k2]].mean(axis=0) for row in range(n)])
    shared = np.array([np.minimum(row, encoded).sum(axis=1) for row in encoded])
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * distances


def _mostly(some, members):
    return 3 * len(some & members) > 2 * len(some)


# --- Digits ----------------------------------------------------------------------------------------------------------


class Bench:
    """Every digit as a query among all: lists, their graph, and mAP of lists of 400 and of all rows."""

    def __init__(self, rows, labels):
        self.rows, self.labels, self.graph = rows, labels, KNNGraph.build(rows, 20)
        self.lists = lists_of(rows, rows)

    def figures(self, ids):
        """mAP of the first 400 places and of all, the query taken out of its list, over all relevant rows."""
        given = {"denominator": "relevant", "exclude_self": True}
        return [mean_average_precision_of_lists(ids, self.labels, self.labels, k, **given) for k in (399, 1796)]


@pytest.fixture(scope="module")
def bench(digits):
    return Bench(*digits)


@pytest.fixture(scope="module")
def baseline(bench):
    return bench.figures(bench.lists[1])


def test_the_baseline_is_that_of_the_reference(baseline):
    np.testing.assert_allclose(baseline, [0.614, 0.659], atol=0.001)


@pytest.mark.parametrize(("kind", "expected"), [("pca", 0.683), ("pca-whitening", 0.464)])
def test_l2_and_pca_and_l2_are_eigenvectors_of_the_covariance(bench, kind, expected):
    values, vectors = np.linalg.eigh(np.cov(bench.rows.astype(np.float64).T, bias=True))
    shorter = (bench.rows - bench.rows.mean(axis=0)) @ vectors[:, -32:]
    shorter = unit(shorter / np.sqrt(values[-32:] + 1e-5) if kind == "pca-whitening" else shorter)
    found = fit_chain([Step("l2"), Step(kind, 32), Step("l2")], train=bench.rows).apply(bench.rows)
    # Cosines do not see which way a direction points; sums of 64 terms in float32.
    np.testing.assert_allclose(found @ found.T, shorter @ shorter.T, atol=1e-5)
    assert bench.figures(lists_of(found, found)[1])[1] == pytest.approx(expected, abs=0.001)


def test_query_expansion_gains(bench):
    found = bench.figures(QueryExpansion().fit(bench.graph)(bench.rows, *bench.lists)[1])
    np.testing.assert_allclose(found, [0.667, 0.707], atol=0.001)


def test_database_augmentation_and_query_expansion_gain_a_tenth(bench, baseline):
    reranker = QueryExpansion(database=True).fit(bench.graph)
    found = bench.figures(reranker(bench.rows, *bench.lists)[1])
    assert found[0] >= baseline[0] + 0.10
    assert found[1] >= baseline[1] + 0.10
    # The reference augments the queries too, being rows, and lists them among the augmented rows.
    augmented = reranker.embeddings()
    again = bench.figures(reranker(augmented, *lists_of(augmented, augmented))[1])
    np.testing.assert_allclose(again, [0.763, 0.793], atol=0.001)


def test_k_reciprocal_gains(bench, baseline):
    reranker = KReciprocal().fit(bench.graph)
    assert bench.figures(reranker(bench.rows, *bench.lists)[1])[1] >= baseline[1] + 0.06
    short = [each[:, :400] for each in bench.lists]
    assert bench.figures(reranker(bench.rows, *short)[1])[0] >= baseline[0] + 0.06


def test_k_reciprocal_of_rows_among_themselves_is_that_of_the_reference(bench):
    encoded = encode(bench.graph, 20, 6).columns.T.toarray()
    shared = np.stack([np.minimum(row[row > 0], encoded[:, row > 0]).sum(axis=1) for row in encoded])
    distances = np.maximum(2 - 2 * bench.rows @ bench.rows.T, 0)
    new = 0.7 * (1 - shared / (2 - shared)) + 0.3 * distances / distances.max(axis=1, keepdims=True)
    np.testing.assert_allclose(bench.figures(np.argsort(new, axis=1, kind="stable")), [0.706, 0.743], atol=0.001)


# mAP of alpha-QE, DBA and QE, and k-reciprocal of the union on what codes of so many bits restore.
CODES = {None: (0.706, 0.784, 0.740), 64: (0.706, 0.778, 0.737), 32: (0.710, 0.777, 0.727), 16: (0.704, 0.738, 0.691)}


@pytest.mark.parametrize("bits", CODES)
def test_figures_out_of_codes_are_those_of_the_reference(halves, restored, bits):
    (queries, labels), (gallery, gallery_labels) = halves
    gallery = restored(bits) if bits else gallery
    graph, augmented = KNNGraph.build(gallery, 20), QueryExpansion(database=True)
    augmented.fit(graph)
    # The reference lists queries among the augmented rows.
    found = [
        QueryExpansion().fit(graph)(queries, *lists_of(queries, gallery)),
        augmented(queries, *lists_of(queries, augmented.embeddings())),
        KReciprocal(transductive=True).fit(graph)(queries, *lists_of(queries, gallery)),
    ]
    figures = [mean_average_precision_of_lists(ids, labels, gallery_labels, 1497, "relevant") for _, ids in found]
    # k-means of another FAISS, and rows of one code in another order, move the figures of codes.
    np.testing.assert_allclose(figures, CODES[bits], atol=0.01 if bits else 0.001)
