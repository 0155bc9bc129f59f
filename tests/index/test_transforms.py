"""transforms: steps against formulas, chains here and in FAISS, in front of indexes and datasets, saved and loaded."""

import functools
import gc
import json
import math
import subprocess
import sys
import warnings

import faiss
import numpy as np
import pytest
import sklearn.decomposition
from datasets import Dataset
from safetensors import safe_open
from safetensors.numpy import save_file

from tcq_hf import build_index
from tcq_hf.index import transforms as module
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.index.gpu_index import zero_coarse_index
from tcq_hf.index.transforms import Chain, Step, export_index, fit_chain, twice_pca_whitening

EPS = float(np.finfo(np.float32).eps)


def rows_of(count=300, width=12, seed=0):
    """Rows off the origin whose directions, askew to the axes, have standard deviations from 1 down to 0.1."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.standard_normal((width, width)))[0]
    spread = generator.standard_normal((count, width)) * np.geomspace(1, 0.1, width)
    return (spread @ turn + generator.standard_normal(width)).astype(np.float32)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_pca(rows, dim, epsilon=None):
    """Rows `[n, dim]` in float64, entry by entry: centred, along eigenvectors, over the root of their variances."""
    rows = rows.astype(np.float64)
    count, width = rows.shape
    mean = [sum(float(row[j]) for row in rows) / count for j in range(width)]
    covariance = np.empty((width, width))
    for i in range(width):
        for j in range(width):
            covariance[i, j] = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / count
    # The directions of a singular value decomposition: another algorithm than the one under test.
    left, variances, _ = np.linalg.svd(covariance)
    found = np.empty((count, dim))
    for k in range(dim):
        direction = left[:, k] * math.copysign(1, left[np.abs(left[:, k]).argmax(), k])
        scale = 1 if epsilon is None else 1 / math.sqrt(variances[k] + epsilon)
        for i, row in enumerate(rows):
            found[i, k] = scale * sum(direction[j] * (row[j] - mean[j]) for j in range(width))
    return found


def apart(chain, x):
    """By how much two float32 evaluations of a chain may differ, to first order, float64 `[n, D']`.

    A sum of F products and a bias errs by (F + 1) / 2 eps of the sum of magnitudes, in each of the two; a norm by
    F / 4 eps relatively, and the quotient by another eps. What came in wrong goes through the maps, and the root takes
    at most its length off a row of unit norm.
    """
    x, error = np.asarray(x, np.float32), np.zeros(np.shape(x))
    for fitted in chain.steps:
        after = fitted.apply(x)
        if fitted.weight is None:
            length = np.linalg.norm(x, axis=1, keepdims=True)
            carried = (error + np.abs(after) * np.linalg.norm(error, axis=1, keepdims=True)) / length
            error = carried + (x.shape[1] / 2 + 2) * EPS * np.abs(after)
        else:
            size = np.abs(x) @ np.abs(fitted.weight).T + (0 if fitted.bias is None else np.abs(fitted.bias))
            error = error @ np.abs(fitted.weight).T + (x.shape[1] + 1) * EPS * size
        x = after
    return error


STEPS = {
    "l2": [Step("l2")],
    "pca": [Step("pca", 5)],
    "pca-whitening": [Step("pca-whitening")],
    "opq": [Step("opq", 8, num_codebooks=4)],
    "rotation": [Step("rotation")],
    "wider rotation": [Step("rotation", 20)],
    "l2 + pca + l2": [Step("l2"), Step("pca", 5), Step("l2")],
    "long": [Step("l2"), *twice_pca_whitening(8)[:2], Step("opq", num_codebooks=2), Step("rotation", 6), Step("l2")],
    "tpw": twice_pca_whitening(6),
}


@functools.cache
def fitted_chain(name):
    return fit_chain(STEPS[name], train=rows_of(), auxiliary=rows_of(seed=1), gallery=rows_of(seed=2))


@pytest.fixture(params=STEPS)
def chain(request):
    return fitted_chain(request.param)


# --- Formulas: what PyRetri calls dimension processing ---------------------------------------------------------------


def test_l2_divides_each_row_by_its_length():
    rows = rows_of(20)
    found = fit_chain([Step("l2")], train=rows).apply(rows)
    for row, scaled in zip(rows, found, strict=True):
        length = math.sqrt(sum(float(value) ** 2 for value in row))
        np.testing.assert_allclose(scaled, [float(value) / length for value in row], rtol=(12 / 4 + 2) * EPS)


# Two float32 roundings of weight and bias beside those of `apart`: twice as much.
@pytest.mark.parametrize("dim", [5, 12])
def test_pca_is_centred_and_along_the_directions_of_largest_variance(dim):
    rows = rows_of(60)
    chain = fit_chain([Step("pca", dim)], train=rows)
    assert (np.abs(chain.apply(rows) - slow_pca(rows, dim)) <= 2 * apart(chain, rows)).all()
    assert apart(chain, rows).max() < 1e-4


@pytest.mark.parametrize(("dim", "epsilon"), [(5, 1e-5), (12, 1e-5), (12, 0), (12, 0.3)])
def test_whitening_divides_by_the_root_of_the_variance_and_epsilon(dim, epsilon):
    rows = rows_of(60)
    chain = fit_chain([Step("pca-whitening", dim, epsilon=epsilon)], train=rows)
    assert (np.abs(chain.apply(rows) - slow_pca(rows, dim, epsilon)) <= 2 * apart(chain, rows)).all()
    assert apart(chain, rows).max() < 1e-3


def test_whitening_is_that_of_scikit_learn_but_for_its_n_minus_one():
    rows = rows_of(60)
    chain = fit_chain([Step("pca-whitening", 5, epsilon=0)], train=rows)
    expected = sklearn.decomposition.PCA(5, whiten=True).fit_transform(rows.astype(np.float64)) * math.sqrt(60 / 59)
    found = chain.apply(rows)
    signs = np.sign((found * expected).sum(axis=0))
    assert (np.abs(found - signs * expected) <= 2 * apart(chain, rows)).all()


def test_l2_pca_l2_is_one_behind_the_other():
    rows = rows_of(60)
    chain = fit_chain([Step("l2"), Step("pca", 5), Step("l2")], train=rows)
    expected = unit(slow_pca(unit(rows.astype(np.float64)), 5))
    assert (np.abs(chain.apply(rows) - expected) <= 2 * apart(chain, rows)).all()
    assert apart(chain, rows).max() < 1e-3


def test_twice_pca_whitening_is_whitening_of_one_set_and_pca_of_the_other():
    auxiliary, gallery = rows_of(60, 6, seed=1), rows_of(60, 6, seed=2)
    chain = fit_chain(twice_pca_whitening(3), auxiliary=auxiliary, gallery=gallery)
    both = np.concatenate([auxiliary, gallery])
    centred = (auxiliary - auxiliary.mean(0)).astype(np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / 60)
    whitened = (both - auxiliary.mean(0, dtype=np.float64)) @ directions / np.sqrt(variances + 1e-5)
    projected = slow_pca(whitened[60:], 3)
    # Principal components are up to their sign; eigh orders the directions of the whitening the other way.
    found = chain.apply(gallery)
    signs = np.sign((found * projected).sum(axis=0))
    assert (np.abs(found - signs * unit(projected)) <= 2 * apart(chain, gallery)).all()
    assert apart(chain, gallery).max() < 1e-3


def test_whitened_rows_have_unit_covariance():
    rows = rows_of(500)
    whitened = fit_chain([Step("pca-whitening", epsilon=0)], train=rows).apply(rows).astype(np.float64)
    # Entries are off by up to 1e-4 (`apart`); a product of two of size 4 by 1e-3.
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(12), atol=1e-3)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-4)


def test_axes_of_known_variance():
    # Rows at +-4, +-2 and +-1 on three axes: mean zero, and variances 2 a^2 / 6 along the axes, in this order.
    axes = np.diag([1.0, 4.0, 2.0])
    rows = np.concatenate([axes, -axes]) + np.array([7, 8, 9])
    pca = fit_chain([Step("pca", 2)], train=rows).steps[0]
    np.testing.assert_allclose(pca.weight, [[0, 1, 0], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(pca.bias, [-8, -9])
    np.testing.assert_allclose(pca.eigenvalues, [16 / 3, 4 / 3], rtol=1e-6)
    white = fit_chain([Step("pca-whitening", epsilon=2 / 3)], train=rows).apply(rows)
    # 1, 4 and 2 over the roots of 1, 6 and 2; 7 eps of the sum of 9 / sqrt(2) + 2 / sqrt(2) is below 1e-5.
    expected = [[0, 0, 1], [4 / math.sqrt(6), 0, 0], [0, math.sqrt(2), 0]]
    np.testing.assert_allclose(white, expected + [[-value for value in row] for row in expected], atol=1e-5)


def test_rotations_keep_lengths_and_follow_their_seed():
    rows = rows_of()
    for kind in (Step("rotation"), Step("rotation", 20), Step("opq", num_codebooks=3)):
        chain = fit_chain([kind], train=rows)
        # A float32 QR of 20 columns is orthonormal to about 20 eps, and 12 products are summed.
        np.testing.assert_allclose(chain.apply(rows) @ chain.apply(rows).T, rows @ rows.T, atol=64 * EPS * 30)
        again, other = (fit_chain([Step(**{**vars(kind), "seed": seed})], train=rows) for seed in (0, 5))
        np.testing.assert_array_equal(again.apply(rows), chain.apply(rows))
        assert np.abs(other.apply(rows) - chain.apply(rows)).max() > 1e-3
    narrow = fit_chain([Step("rotation", 3)], train=rows).steps[0].weight
    np.testing.assert_allclose(narrow @ narrow.T, np.eye(3), atol=64 * EPS)


def test_opq_is_the_rotation_that_faiss_learns():
    rows = rows_of()
    rotation, quantizer = faiss.OPQMatrix(12, 2, 4), faiss.ProductQuantizer(4, 2, 8)
    quantizer.cp.seed, quantizer.cp.min_points_per_centroid = 7, 1
    rotation.pq = quantizer
    rotation.train(rows)
    found = fit_chain([Step("opq", 4, num_codebooks=2, seed=7)], train=rows).steps[0].weight
    np.testing.assert_array_equal(found, faiss.vector_to_array(rotation.A).reshape(4, 12))


def test_opq_lowers_the_error_of_the_quantizer_that_it_is_for():
    # Variance in the first half of the dimensions, which one of two codebooks would have to bear alone.
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1000, 8)).astype(np.float32) * np.float32([1] * 4 + [0.05] * 4)

    def error(vectors):
        quantizer = faiss.ProductQuantizer(8, 2, 8)
        quantizer.cp.min_points_per_centroid = 1
        quantizer.train(vectors)
        return float(np.square(vectors - quantizer.decode(quantizer.compute_codes(vectors))).sum())

    turned = fit_chain([Step("opq", num_codebooks=2)], train=rows).apply(rows)
    assert error(turned) < 0.5 * error(rows)


def test_steps_may_come_one_by_one():
    steps = (Step("pca-whitening"), Step("pca", 3), Step("l2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert fit_chain(iter(steps), train=rows_of()).output_dim == fit_chain(steps, train=rows_of()).output_dim == 3


def test_a_step_is_fitted_behind_those_before_it():
    rows = rows_of()
    first = fit_chain([Step("l2"), Step("rotation", 7)], train=rows)
    whole = fit_chain([Step("l2"), Step("rotation", 7), Step("pca", 3)], train=rows)
    last = fit_chain([Step("pca", 3)], train=first.apply(rows))
    np.testing.assert_array_equal(whole.apply(rows), last.apply(first.apply(rows)))


# --- Symmetries ------------------------------------------------------------------------------------------------------


def test_permuting_rows_permutes_what_comes_out(chain):
    rows, order = rows_of(50, seed=3), np.random.default_rng(0).permutation(50)
    assert (np.abs(chain.apply(rows[order]) - chain.apply(rows)[order]) <= apart(chain, rows)[order]).all()


@pytest.mark.parametrize("kind", ["pca", "pca-whitening", "l2 + pca + l2"])
def test_the_order_of_the_rows_that_it_is_fitted_to_plays_no_part(kind):
    rows, order = rows_of(), np.random.default_rng(0).permutation(300)
    first, second = (fit_chain(STEPS[kind], train=given) for given in (rows, rows[order]))
    # The moments agree to float64; the maps are rounded once.
    assert (np.abs(first.apply(rows) - second.apply(rows)) <= apart(first, rows)).all()


def test_blocks_change_nothing(monkeypatch, chain):
    rows = rows_of(50, seed=3)
    expected = chain.apply(rows)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    assert (np.abs(chain.apply(rows) - expected) <= apart(chain, rows)).all()
    fitted = fit_chain([Step("pca", 5)], train=rows_of())
    monkeypatch.undo()
    np.testing.assert_allclose(fit_chain([Step("pca", 5)], train=rows_of()).apply(rows), fitted.apply(rows), atol=1e-5)


def test_each_row_twice_gives_the_same_map():
    rows = rows_of()
    once, twice = (fit_chain([Step("pca-whitening")], train=given) for given in (rows, np.concatenate([rows, rows])))
    assert (np.abs(once.apply(rows) - twice.apply(rows)) <= apart(once, rows)).all()


def test_a_row_of_zeros_stays_and_one_too_long_is_refused():
    chain = fit_chain([Step("l2")], train=rows_of())
    rows = np.zeros((3, 12), np.float32)
    rows[1] = 1e-25  # its square is zero in float32
    np.testing.assert_array_equal(chain.apply(rows), rows)
    np.testing.assert_array_equal(chain.steps[0].to_faiss(12).apply(rows), rows)
    with pytest.raises(ValueError, match=r"too long for float32, with values up to 1e\+20"):
        chain.apply(np.full((2, 12), 1e20))


def test_no_rows_give_none(chain):
    assert chain.apply(np.empty((0, 12), np.float32)).shape == (0, chain.output_dim)


# --- One linear map --------------------------------------------------------------------------------------------------


def test_linear_is_the_chain_before_its_last_l2(chain):
    rows = rows_of(50, seed=3)
    weight, bias = chain.linear()
    assert weight.shape == (chain.output_dim, 12)
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    given = unit(rows) if chain.steps[0].weight is None else rows
    found = given @ weight.T + bias
    if chain.steps[-1].weight is None:
        found = unit(found)
    assert (np.abs(found - chain.apply(rows)) <= 2 * apart(chain, rows)).all()


def test_an_l2_between_maps_is_no_linear_map():
    with pytest.raises(ValueError, match=r"'l2' between other steps and is no linear map.*export_index"):
        fit_chain([Step("pca", 5), Step("l2"), Step("rotation")], train=rows_of()).linear()


def test_a_chain_knows_whether_it_ends_in_a_rotation():
    assert {name for name in STEPS if fitted_chain(name).rotated} == {"opq", "rotation", "wider rotation", "long"}


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_chain_comes_back_bit_by_bit(chain, tmp_path):
    chain.save(tmp_path / "chain.safetensors")
    loaded = Chain.load(tmp_path / "chain.safetensors")
    assert [fitted.step for fitted in loaded.steps] == [fitted.step for fitted in chain.steps]
    assert (loaded.input_dim, loaded.output_dim) == (12, chain.output_dim)
    rows = rows_of(50, seed=3)
    np.testing.assert_array_equal(loaded.apply(rows), chain.apply(rows))
    first, second = (export_index(each, faiss.IndexFlatIP(chain.output_dim)) for each in (chain, loaded))
    assert faiss.serialize_index(first).tobytes() == faiss.serialize_index(second).tobytes()


def test_no_file_a_damaged_one_and_another_one_are_refused(tmp_path):
    path = tmp_path / "chain.safetensors"
    with pytest.raises(FileNotFoundError, match="no chain file"):
        Chain.load(path)
    fit_chain([Step("pca", 5)], train=rows_of()).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"chain\.safetensors is damaged"):
            Chain.load(path)
    save_file({"rows": rows_of()}, path)
    with pytest.raises(ValueError, match="holds no chain"):
        Chain.load(path)


def test_a_chain_file_that_was_tampered_with_is_refused(tmp_path):
    path, chain = tmp_path / "chain.safetensors", fit_chain([Step("pca", 3), Step("l2")], train=rows_of())
    chain.save(path)
    with safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    broken = tensors["0.weight"].copy()
    broken[1, 2] = np.nan
    for changed, message in [
        ({"0.weight": None}, "has a weight unless it is 'l2'"),
        ({"0.weight": broken}, "weight of a step must be finite float32"),
        ({"0.bias": np.zeros(7, np.float32)}, "bias of a step has a shape that does not fit"),
        (
            {"0.weight": np.ones((3, 5), np.float32), "0.mean": np.zeros(5, np.float32)},
            "takes rows of width 5, 12 comes",
        ),
        ({"0.mean": None}, "'pca' has a bias, a mean and eigenvalues"),
        ({"7.weight": broken}, "IndexError"),
        ({"0.step": broken}, "TypeError"),
    ]:
        kept = {name: values for name, values in (tensors | changed).items() if values is not None}
        save_file(kept, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"chain file .* is damaged: .*{message}"):
            Chain.load(path)
    for recipe in ("{", "[]", json.dumps({"input_dim": 12}), json.dumps({"input_dim": 12, "steps": [{"sort": "pca"}]})):
        save_file(tensors, path, metadata=metadata | {"chain": recipe})
        with pytest.raises(ValueError, match=r"chain file .* is damaged"):
            Chain.load(path)


@pytest.mark.parametrize("hide", [faiss.IndexShards, faiss.IndexReplicas, faiss.IndexRefineFlat])
def test_learned_codebooks_are_seen_through_what_holds_them(hide):
    words = unit(np.random.default_rng(0).standard_normal((12 * 16, 1)).astype(np.float32)).reshape(12, 16, 1)
    learned = build_index(words, np.zeros((40, 12), np.uint8))
    if hide is faiss.IndexRefineFlat:
        outer = faiss.IndexRefineFlat(build_index(words))
    else:
        outer = hide(12)
        outer.add_shard(learned) if hide is faiss.IndexShards else outer.addIndex(learned)
    with pytest.raises(ValueError, match="inner holds learned codebooks"):
        export_index(fit_chain([Step("rotation")], train=rows_of()), outer)


def test_what_was_there_stays_where_a_chain_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "chain.safetensors"
    chain = fit_chain([Step("pca", 5)], train=rows_of())
    chain.save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tcq_hf.index.tensor_files.save_file", full)
    with pytest.raises(OSError, match=r"chain\.safetensors"):
        chain.save(path)
    assert [(found, found.read_bytes()) for found in tmp_path.iterdir()] == [(path, before)]


def test_transforms_need_no_torch():
    code = """
import sys, types
package = types.ModuleType("tcq_hf"); package.__path__ = [sys.argv[1]]; sys.modules["tcq_hf"] = package
import tcq_hf.index.transforms
print(sorted({"torch", "transformers", "datasets", "timm"} & set(sys.modules)))
"""
    folder = module.__file__.rsplit("/index/", 1)[0]
    found = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- In front of an index --------------------------------------------------------------------------------------------


def stored(index):
    """Vectors that an index of floats behind a chain holds."""
    inner = faiss.downcast_index(index.index)
    return inner.reconstruct_n(0, inner.ntotal)


def test_faiss_applies_the_chain_as_numpy_does(chain):
    rows = rows_of(50, seed=3)
    index = export_index(chain, faiss.IndexFlatIP(chain.output_dim))
    assert (index.d, index.is_trained, index.ntotal) == (12, True, 0)
    index.add(rows)
    assert (np.abs(stored(index) - chain.apply(rows)) <= apart(chain, rows)).all()
    assert apart(chain, rows).max() < 1e-3


def test_faiss_holds_transforms_of_its_own_kinds():
    chain = fitted_chain("long")
    index = export_index(chain, faiss.IndexFlatIP(6))
    transforms = [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]
    kinds = (faiss.NormalizationTransform, faiss.PCAMatrix, faiss.PCAMatrix, faiss.OPQMatrix)
    assert tuple(map(type, transforms)) == (*kinds, faiss.RandomRotationMatrix, faiss.NormalizationTransform)
    whitening = transforms[1]
    assert (whitening.eigen_power, whitening.d_in) == (-0.5, 12)
    assert whitening.epsilon == np.float32(1e-5)
    # From what it keeps FAISS prepares the same map: three float32 roundings of an entry, and of a sum of 12.
    weight, bias = (faiss.vector_to_array(values) for values in (whitening.A, whitening.b))
    whitening.prepare_Ab()
    np.testing.assert_allclose(faiss.vector_to_array(whitening.A), weight, rtol=4 * EPS)
    size = np.abs(weight.reshape(12, 12)) @ np.abs(faiss.vector_to_array(whitening.mean))
    assert (np.abs(faiss.vector_to_array(whitening.b) - bias) <= 16 * EPS * size).all()


def test_an_index_comes_back_from_its_file_the_same(chain, tmp_path):
    rows = rows_of(50, seed=3)
    index = export_index(chain, faiss.IndexFlatIP(chain.output_dim))
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    loaded = faiss.read_index(str(tmp_path / "index.faiss"))
    for first, second in zip(index.search(rows[:7], 9), loaded.search(rows[:7], 9), strict=True):
        np.testing.assert_array_equal(first, second)


def test_nothing_is_freed_while_it_is_in_use():
    rows = rows_of(50, seed=3)

    def made():
        chain = fit_chain(STEPS["tpw"], auxiliary=rows_of(seed=1), gallery=rows_of(seed=2))
        inner = faiss.IndexFlatIP(6)
        return export_index(chain, inner), chain.apply(rows)

    index, expected = made()
    spent = [export_index(fit_chain([Step("rotation", 6)], train=rows), faiss.IndexFlatIP(6)) for _ in range(50)]
    del spent
    gc.collect()
    index.add(rows)
    scores, _ = index.search(rows[:5], 50)
    best = (expected[:5] @ expected.T).max(axis=1)
    np.testing.assert_allclose(scores[:, 0], best, rtol=1e-4)
    # The inner index outlives what was put around it.
    inner = faiss.IndexFlatIP(6)
    outer = export_index(fit_chain([Step("rotation", 6)], train=rows), inner)
    outer.add(rows)
    del outer
    gc.collect()
    assert inner.search(expected[:5], 3)[1].shape == (5, 3)
    assert inner.ntotal == 50


def test_rows_of_the_inner_index_count_as_transformed():
    rows, chain = rows_of(50, seed=3), fit_chain([Step("pca", 5)], train=rows_of())
    inner = faiss.IndexFlatIP(5)
    inner.add(chain.apply(rows))
    index = export_index(chain, inner)
    assert index.ntotal == 50
    index.add(rows[:2])
    np.testing.assert_allclose(stored(index)[50:], chain.apply(rows[:2]), atol=float(apart(chain, rows).max()))


def test_codebooks_of_faiss_are_learned_behind_the_chain():
    rows = rows_of(600)
    chain = fit_chain([Step("pca-whitening", 8), Step("l2")], train=rows)
    index = export_index(chain, faiss.IndexPQ(8, 2, 4, faiss.METRIC_INNER_PRODUCT))
    index.train(rows)
    index.add(rows)
    alone = faiss.IndexPQ(8, 2, 4, faiss.METRIC_INNER_PRODUCT)
    alone.train(stored_by(chain, rows))
    alone.add(stored_by(chain, rows))
    np.testing.assert_array_equal(index.search(rows[:9], 5)[1], alone.search(stored_by(chain, rows[:9]), 5)[1])
    # An index that FAISS trained is no learned index: it may be wrapped again.
    assert export_index(chain, alone).ntotal == 600


def stored_by(chain, rows):
    """Rows as FAISS transforms them, bit by bit."""
    index = export_index(chain, faiss.IndexFlatIP(chain.output_dim))
    index.add(rows)
    return stored(index)


def test_a_dataset_searches_through_the_chain(tmp_path):
    rows, query = rows_of(200), rows_of(1, seed=9)[0]
    chain = fit_chain([Step("l2"), Step("pca", 5), Step("l2")], train=rows)
    index = export_index(chain, faiss.IndexFlatIP(5))
    dataset = Dataset.from_dict({"row": list(range(200)), "feature": rows.tolist()})
    dataset.add_faiss_index("feature", custom_index=index, train_size=100)
    gc.collect()
    before = Dataset.from_dict({"short": chain.apply(rows).tolist()})
    before.add_faiss_index("short", custom_index=faiss.IndexFlatIP(5))
    scores, found = dataset.search("feature", query, k=10)
    expected, same = before.search("short", chain.apply(query[None])[0], k=10)
    # Inner products of unit vectors of 5 dimensions, each off by `apart` at most.
    np.testing.assert_allclose(scores, expected, atol=2 * 5 * float(apart(chain, rows).max()))
    assert found.tolist() == same.tolist()
    _, examples = dataset.get_nearest_examples("feature", query, k=3)
    assert examples["row"] == found[:3].tolist()
    dataset.save_faiss_index("feature", str(tmp_path / "feature.faiss"))
    dataset.drop_index("feature")
    dataset.load_faiss_index("feature", str(tmp_path / "feature.faiss"))
    np.testing.assert_array_equal(dataset.search("feature", query, k=10)[0], scores)
    attached = attach_index(Dataset.from_dict({"row": range(200)}), index, "chain")
    assert attached.search("chain", query, k=10)[1].tolist() == found.tolist()


# --- Learned codebooks -----------------------------------------------------------------------------------------------


def learned(mode="exact", num_codebooks=4, codebook_size=16):
    generator = np.random.default_rng(0)
    codebooks = generator.standard_normal((num_codebooks, codebook_size, 12 // num_codebooks))
    codebooks = (codebooks / np.linalg.norm(codebooks, axis=-1, keepdims=True)).astype(np.float32)
    return build_index(codebooks, generator.integers(0, 16, (300, num_codebooks)), mode)


def identity():
    """A PCA of rows on the axes, in the order of their variance: it changes nothing."""
    axes = np.diag(np.arange(12, 0, -1.0))
    return fit_chain([Step("pca")], train=np.concatenate([axes, -axes]))


@functools.cache
def square_chain(kind):
    return fit_chain([Step("opq", num_codebooks=4) if kind == "opq" else Step(kind)], train=rows_of())


def plain(index):
    return faiss.deserialize_index(faiss.serialize_index(index))


@pytest.mark.parametrize("kind", ["pca", "pca-whitening", "rotation", "opq", "l2"])
@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
def test_a_chain_in_front_of_learned_codebooks_is_refused(kind, mode):
    chain, index = square_chain(kind), learned(mode)
    empty = plain(index)
    empty.reset()
    forms = [index, plain(index), faiss.IndexIDMap(empty), faiss.IndexPreTransform(plain(index))]
    if mode != "ivf":
        forms.append(zero_coarse_index(index, 4))
    for given in forms:
        with pytest.raises(ValueError, match=r"learned codebooks.*initialize\(features, transform=chain\).*IndexPQ"):
            export_index(chain, given)


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
@pytest.mark.parametrize("steps", ["none", "identity"])
def test_a_chain_that_changes_nothing_leaves_codes_scores_and_codebooks(steps, mode):
    chain = fit_chain([], train=rows_of()) if steps == "none" else identity()
    index, queries = learned(mode), learned().reconstruct_n(0, 20)
    codebooks = index.codebooks()
    outer = export_index(chain, index)
    scores, _ = outer.search(queries, 5)
    # Both through FAISS: the fast mode looks deeper when it is asked through Python.
    expected, _ = plain(index).search(queries, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    outer.train(rows_of())
    np.testing.assert_array_equal(index.codebooks(), codebooks)


@pytest.mark.parametrize(("num_codebooks", "codebook_size"), [(4, 16), (6, 256), (3, 16)])
def test_the_form_for_a_gpu_counts_the_codebooks_of_the_model(num_codebooks, codebook_size):
    # There two codebooks of 16 words are one of 256, and codebooks of zeros make up a number that a GPU takes.
    moved = zero_coarse_index(learned(num_codebooks=num_codebooks, codebook_size=codebook_size), 4)
    assert module._learned_codebooks(moved) == num_codebooks


def test_one_codebook_stands_scaling_to_unit_norm():
    index = learned(num_codebooks=1)
    outer = export_index(fit_chain([Step("l2")], train=rows_of()), index)
    queries = index.reconstruct_n(0, 20)
    np.testing.assert_allclose(outer.search(queries, 5)[0], index.search(queries, 5)[0], atol=1e-5)


def test_a_chain_near_the_identity_is_refused_where_scores_would_move():
    chain = identity()
    for part, size in (("weight", 2e-5), ("bias", 2e-5)):
        values = getattr(chain.steps[0], part).copy()
        values.flat[1] += size
        step = module.FittedStep(**{**vars(chain.steps[0]), part: values})
        with pytest.raises(ValueError, match="learned codebooks"):
            export_index(Chain((step,), 12), learned())


# --- A flat spectrum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_one_set_for_both_stages_is_warned_of(dim):
    rows = rows_of()
    with pytest.warns(UserWarning, match=r"whitened on 'auxiliary'.*'gallery' vary alike.*eigenvalue 1\.0") as caught:
        chain = fit_chain(twice_pca_whitening(dim), auxiliary=rows, gallery=rows)
    assert caught[0].filename == __file__
    assert chain.steps[1].eigenvalues.max() <= 1


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_two_sets_are_not(dim):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_chain(twice_pca_whitening(dim), auxiliary=rows_of(), gallery=3 * rows_of(seed=1))
        fit_chain([Step("pca", dim)], train=np.concatenate([np.eye(12), -np.eye(12)]))


def test_the_warning_can_be_turned_off():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", UserWarning)
        fit_chain(twice_pca_whitening(3), auxiliary=rows_of(), gallery=rows_of())
    assert not caught


# --- Illegal input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "whitening"}, "kind must be one of l2, pca, pca-whitening, opq, rotation, got 'whitening'"),
        ({"kind": "pca", "dim": 0}, "dim must be at least 1, and unset for 'l2', got 0 for 'pca'"),
        ({"kind": "l2", "dim": 3}, "unset for 'l2', got 3"),
        ({"kind": "pca-whitening", "epsilon": -1e-9}, "epsilon must be a number of at least 0, got -1e-09"),
        ({"kind": "pca-whitening", "epsilon": math.nan}, "epsilon must be a number of at least 0, got nan"),
        ({"kind": "pca", "epsilon": 0.1}, "epsilon is for 'pca-whitening' alone, got 0.1 for 'pca'"),
        ({"kind": "opq"}, "num_codebooks must be set for 'opq' alone, got None for 'opq'"),
        ({"kind": "pca", "num_codebooks": 2}, "num_codebooks must be set for 'opq' alone, got 2 for 'pca'"),
        ({"kind": "opq", "num_codebooks": 0}, "num_codebooks must be at least 1, got 0"),
    ],
)
def test_impossible_steps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Step(**arguments)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("pca", 13)], "dim of 'pca' must be from 1 to 12, the width that goes in, got 13"),
        ([Step("rotation", 4), Step("pca", 5)], "from 1 to 4, the width that goes in, got 5"),
        ([Step("opq", 13, num_codebooks=13)], "dim of 'opq' must be from 1 to 12"),
        ([Step("opq", num_codebooks=5)], "comes out of 'opq', 12, must be a multiple of num_codebooks=5"),
        ([Step("rotation", 7), Step("opq", num_codebooks=2)], "'opq', 7, must be a multiple of num_codebooks=2"),
        ([Step("pca", 3, fit_on="gallery")], "fitted on 'gallery', but the sets given are train; pass gallery=rows"),
    ],
)
def test_steps_that_do_not_fit_the_rows_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        fit_chain(steps, train=rows_of())


def test_directions_in_which_rows_do_not_vary_are_refused():
    flat = rows_of()[:, :4] @ rows_of(4, 9, seed=1)  # rank 4
    rounded = fit_chain([Step("pca", 4), Step("rotation", 9)], train=flat).apply(flat)
    for rows in (flat, rounded):
        assert fit_chain([Step("pca", 4)], train=rows).output_dim == 4
        for kind in ("pca", "pca-whitening"):
            with pytest.raises(ValueError, match=f"'{kind}' asks for dim=5 directions, but the 300 rows .* in 4 only"):
                fit_chain([Step(kind, 5)], train=rows)
    with pytest.raises(ValueError, match="asks for dim=7 directions, but the 7 rows of 'train' vary in 6 only"):
        fit_chain([Step("pca", 7)], train=rows_of(7))
    with pytest.raises(ValueError, match="asks for dim=1 directions, but the 9 rows of 'train' vary in 0 only"):
        fit_chain([Step("pca")], train=np.ones((9, 12)))


def test_all_directions_are_kept_where_rows_do_not_vary_in_some():
    flat = rows_of()[:, :4] @ rows_of(4, 9, seed=1)
    for kind in ("pca", "pca-whitening"):
        chain = fit_chain([Step(kind)], train=flat)
        # What is left of a variance of zero after rounding, at most multiplied by 1 / sqrt(1e-5).
        assert np.abs(chain.apply(flat)[:, 4:]).max() < 320 * 20 * EPS * np.abs(flat).max()
    with pytest.raises(ValueError, match=r"whitening in all 9 directions.*an epsilon above 0.*300 rows that vary in 4"):
        fit_chain([Step("pca-whitening", epsilon=0)], train=flat)
    with pytest.raises(ValueError, match=r"needs more than 12 rows that vary in all.*'train' has 12 rows"):
        fit_chain([Step("pca-whitening")], train=rows_of(12))
    assert fit_chain([Step("pca-whitening")], train=rows_of(13)).output_dim == 12


@pytest.mark.parametrize(("count", "width", "needed"), [(255, 12, 256), (299, 300, 300)])
def test_opq_of_too_few_rows_is_refused_before_faiss_sees_them(count, width, needed):
    rows = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    with pytest.raises(ValueError, match=f"'opq' needs at least {needed} rows at width {width}, 'train' has {count}"):
        fit_chain([Step("opq", num_codebooks=2)], train=rows)


def test_sets_that_are_no_rows_are_refused():
    rows = rows_of()
    with pytest.raises(ValueError, match=r"fit_chain\(steps, train=rows\)"):
        fit_chain([Step("l2")])
    for bad in (rows[0], rows[:0], rows[None], rows[:, :0]):
        with pytest.raises(ValueError, match=r"each set must be rows \[n, D\], got train \["):
            fit_chain([Step("pca", 3)], train=bad)
    with pytest.raises(ValueError, match=r"gallery must have shape \[n, 12\], got \[300, 11\]"):
        fit_chain([Step("pca", 3)], train=rows, gallery=rows[:, :11])
    with pytest.raises(TypeError, match="train must be floats, got int64"):
        fit_chain([Step("pca", 3)], train=np.ones((20, 3), int))
    for bad in (math.nan, math.inf, 1e39):
        broken = rows.astype(np.float64)
        broken[[7, 11], 3] = bad
        with np.errstate(over="ignore"), pytest.raises(ValueError, match="train must be finite, row 7 is not"):
            fit_chain([Step("l2")], train=broken)


def test_vectors_that_do_not_fit_are_refused(chain):
    rows = rows_of(20)
    with pytest.raises(ValueError, match=r"x must have shape \[n, 12\], got \[20, 11\]"):
        chain.apply(rows[:, :11])
    with pytest.raises(ValueError, match=r"x must have shape \[n, 12\], got \[12\]"):
        chain.apply(rows[0])
    rows[[7, 11], 3] = math.nan
    with pytest.raises(ValueError, match="x must be finite, row 7 is not"):
        chain.apply(rows)


def test_a_row_that_grows_too_long_is_refused():
    chain, rows = fit_chain([Step("rotation")], train=rows_of()), rows_of(20)
    # The first of the rotated numbers is 3e38 times the sum of the sizes of a unit vector's numbers, about 2.7.
    rows[[5, 6]] = 3e38 * np.sign(chain.steps[0].weight[0])
    with pytest.raises(ValueError, match="x must be short enough for float32, row 5 is not"):
        chain.apply(rows)


def test_indexes_that_do_not_fit_are_refused():
    chain = fit_chain([Step("pca", 5)], train=rows_of())
    with pytest.raises(ValueError, match="gives vectors of width 5, the inner index takes 12"):
        export_index(chain, faiss.IndexFlatIP(12))
    with pytest.raises(TypeError, match="inner must be a FAISS index, got str"):
        export_index(chain, "Flat")
    with pytest.raises(TypeError, match=r"chain must come from fit_chain\(steps, ...\), got list"):
        export_index([Step("l2")], faiss.IndexFlatIP(5))
