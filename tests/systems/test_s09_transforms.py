"""S9, TPW: finds again what a shift had hidden from whitening, is warned of where its two sets are one, and is one with
FAISS and the projection of a model.

On the shifted set (B5) TPW to 16 dimensions gives a mAP of at least .9 and whitening at most .1; where the auxiliary
set shares what is searched for, TPW loses to whitening, and on digits all whitening hurts. A flat spectrum is warned
of. The chain in FAISS is that of NumPy, survives its file and stands in front of a GPU; its linear map is the chain
before the last scaling.
"""

import warnings

import faiss
import numpy as np
import pytest

from tcq_hf import TCQConfig, TCQModel, build_index
from tcq_hf.evaluation.list_metrics import mean_average_precision_of_lists
from tcq_hf.index.transforms import Step, export_index, fit_chain, twice_pca_whitening

GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
# FAISS and NumPy sum the same 256 float32 products in other orders, twice, and divide by lengths of about 4: near 1e-3
# in the worst case, which roundings of either sign stay below by the root of their number, 16. (`apart` in
# tests/index/test_transforms.py holds every step to its own.)
SAME = 1e-4
# Three digits of the reference, and as much again and more for near ties that another BLAS may rank otherwise.
DIGITS = 0.002


@pytest.fixture(scope="module")
def shift():
    """B5: gallery, auxiliary set, auxiliary set that shares the classes' directions, and labels."""
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((256, 256)))[0]
    nuisance, labels = turn[48:72], np.repeat(np.arange(40), 25)

    def drawn(seed, directions):
        generator = np.random.default_rng(seed)
        centres = generator.standard_normal((40, 24))
        signal = centres[labels] + 0.5 * generator.standard_normal((1000, 24))
        shared = 4 * generator.standard_normal((1000, 24))
        rows = signal @ directions + shared @ nuisance + 0.3 * generator.standard_normal((1000, 256))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return drawn(1, turn[:24]), drawn(2, turn[24:48]), drawn(2, turn[:24]), labels


def quality(vectors, labels, stored=None):
    """mAP of each row among the others."""
    lists = np.argsort(-(vectors @ (vectors if stored is None else stored).T), axis=1, kind="stable")
    return mean_average_precision_of_lists(lists, labels, labels, len(lists), "relevant", exclude_self=True)


def projected(auxiliary, gallery):
    """Gallery by PCA and whitening of the auxiliary set, whitening of the gallery, and TPW; 64 components of each."""
    ways = (
        [Step("pca", 64, "auxiliary")],
        [Step("pca-whitening", 64, "auxiliary")],
        [Step("pca-whitening", 64, "gallery")],
        twice_pca_whitening(64)[:2],
    )
    return [fit_chain(steps, auxiliary=auxiliary, gallery=gallery).apply(gallery) for steps in ways]


def cut(components, dim):
    """The first components at unit norm: what the same steps give for a smaller `dim`, followed by l2."""
    return components[:, :dim] / np.linalg.norm(components[:, :dim], axis=1, keepdims=True)


@pytest.fixture(scope="module")
def components(shift):
    return projected(shift[1], shift[0])


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (64, [0.031, 0.225, 0.427, 0.962]),
        (32, [0.030, 0.030, 0.180, 0.972]),
        (16, [0.030, 0.030, 0.030, 0.964]),
        (8, [0.030, 0.030, 0.031, 0.814]),
    ],
)
def test_tpw_finds_what_whitening_loses(shift, components, dim, expected):
    found = [quality(cut(each, dim), shift[3]) for each in components]
    assert found == pytest.approx(expected, abs=DIGITS)


def test_sixteen_dimensions_are_enough_for_tpw_and_too_few_for_whitening(shift, components):
    gallery, auxiliary, _, labels = shift
    chain = fit_chain(twice_pca_whitening(16), auxiliary=auxiliary, gallery=gallery)
    assert quality(chain.apply(gallery), labels) >= 0.9
    np.testing.assert_allclose(chain.apply(gallery), cut(components[3], 16), atol=SAME)
    for on in ("auxiliary", "gallery"):
        whitening = fit_chain([Step("pca-whitening", 16, on), Step("l2")], auxiliary=auxiliary, gallery=gallery)
        assert quality(whitening.apply(gallery), labels) <= 0.1


def test_without_a_transform_the_classes_are_hidden(shift):
    assert quality(shift[0], shift[3]) == pytest.approx(0.045, abs=DIGITS)


def test_tpw_loses_where_the_auxiliary_set_shares_the_classes_directions(shift):
    gallery, _, sharing, labels = shift
    whitened, tpw = (quality(cut(each, 64), labels) for each in projected(sharing, gallery)[1::2])
    assert (whitened, tpw) == pytest.approx((0.625, 0.185), abs=DIGITS)


def test_the_spectrum_of_the_second_stage(shift):
    gallery, auxiliary, sharing, _ = shift

    def ratios(first, *dims):
        chain = fit_chain(twice_pca_whitening(max(dims)), auxiliary=first, gallery=gallery)
        values = chain.steps[1].eigenvalues
        return [values[0] / np.median(values[:dim]) for dim in dims]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ratios(auxiliary, 64, 32, 16, 8) == pytest.approx([15.2, 4.1, 2.1, 1.6], abs=0.05)
        assert ratios(sharing, 64) == pytest.approx([2.65], abs=0.05)
    with pytest.warns(UserWarning, match="two sets are one"):
        assert max(ratios(gallery, 64, 8)) < 1.05


def test_one_set_twice_is_an_ordinary_whitening(shift):
    gallery = shift[0]
    with pytest.warns(UserWarning, match="ordinary whitening"):
        chain = fit_chain(twice_pca_whitening(256), auxiliary=gallery, gallery=gallery)
    whitening = fit_chain([Step("pca-whitening"), Step("l2")], train=gallery)
    # The second stage only turns what the first one gives, but for the rows' rounding: cosines are the same.
    first, second = (each.apply(gallery) @ each.apply(gallery).T for each in (chain, whitening))
    np.testing.assert_allclose(first, second, atol=SAME)


def test_faiss_numpy_and_the_linear_map_are_one(shift, tmp_path):
    gallery, auxiliary, _, labels = shift
    chain = fit_chain(twice_pca_whitening(16), auxiliary=auxiliary, gallery=gallery)
    index = export_index(chain, faiss.IndexFlatIP(16))
    index.add(gallery)
    vectors = chain.apply(gallery)
    np.testing.assert_allclose(faiss.downcast_index(index.index).reconstruct_n(0, 1000), vectors, atol=SAME)
    weight, bias = chain.linear()
    mapped = gallery @ weight.T + bias
    np.testing.assert_allclose(mapped / np.linalg.norm(mapped, axis=1, keepdims=True), vectors, atol=SAME)
    scores, lists = index.search(gallery, 1000)
    assert mean_average_precision_of_lists(lists, labels, labels, 1000, "relevant", exclude_self=True) >= 0.9
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    loaded = faiss.read_index(str(tmp_path / "index.faiss"))
    for first, second in zip(loaded.search(gallery, 1000), (scores, lists), strict=True):
        np.testing.assert_array_equal(first, second)
    with pytest.raises(RuntimeError, match="clone not supported"):
        faiss.clone_index(index)  # why the inner index is moved to a GPU, and not this one


@pytest.mark.skipif(not GPU, reason="FAISS sees no GPU")
def test_a_chain_stands_in_front_of_an_index_on_a_gpu(shift):
    gallery, auxiliary, _, _ = shift
    chain = fit_chain(twice_pca_whitening(16), auxiliary=auxiliary, gallery=gallery)
    here = export_index(chain, faiss.IndexFlatIP(16))
    there = export_index(chain, faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatIP(16)))
    for index in (here, there):
        index.add(gallery)
    np.testing.assert_allclose(there.search(gallery[:50], 10)[0], here.search(gallery[:50], 10)[0], atol=SAME)


def test_a_model_starts_from_tpw(shift):
    """Codes of a model find the classes when its projection starts from TPW, and not when it starts from PCA."""
    gallery, auxiliary, _, labels = shift
    backbone = {"embed_dim": 256, "depth": 1, "num_heads": 1}
    config = {"image_size": 32, "embedding_dim": 32, "num_codebooks": 4, "codebook_size": 64}
    model = TCQModel(TCQConfig(backbone="vit_tiny_patch16_224", backbone_kwargs=backbone, **config))
    chain = fit_chain((Step("l2"), *twice_pca_whitening(32)), auxiliary=auxiliary, gallery=gallery)

    def of_codes():
        output = model(features=model.projection.weight.new_tensor(gallery))
        embeddings = output.embeddings.detach().numpy()
        index = build_index(model, output.codes.numpy())
        return quality(embeddings, labels, index.reconstruct_n(0, 1000))

    # 32 bits; .942 and .037, standard deviation over seeds .003.
    model.initialize(gallery, transform=chain)
    assert of_codes() >= 0.9
    model.initialize(gallery)
    assert of_codes() <= 0.1


def test_on_digits_whitening_hurts(digits):
    rows, labels = digits
    pca, whitening = (fit_chain([Step(kind, 32), Step("l2")], train=rows) for kind in ("pca", "pca-whitening"))
    tpw = fit_chain(twice_pca_whitening(32), auxiliary=rows[labels < 5], gallery=rows)
    found = [quality(chain.apply(rows), labels) for chain in (pca, whitening, tpw)]
    assert found == pytest.approx([0.683, 0.464, 0.367], abs=DIGITS)
    assert quality(rows, labels) == pytest.approx(0.659, abs=DIGITS)
