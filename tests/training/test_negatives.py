"""negatives: each filter against a loop, in closed form, under permutation, with illegal input."""

import math

import pytest
import torch

from tcq_hf.training.losses import view_similarity
from tcq_hf.training.negatives import image_similarity, negative_filter

FILTERS = [
    ("none", {}),
    *[("fraction", {"share": share}) for share in (0.0, 0.1, 0.34, 0.9)],
    *[("topk", {"count": count}) for count in (0, 1, 5)],
    *[("threshold", {"threshold": value}) for value in (-1.0, 0.1, 0.5, 1.0)],
    *[("margin", {"margin": value}) for value in (0.0, 0.2, 5.0)],
]


def similarities(count, seed=0):
    """Cosines of images, float64, symmetric, with a diagonal of positives below 1."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2 * count, 5, generator=generator, dtype=torch.float64)
    views[count:] = views[:count] + 0.8 * views[count:]
    return image_similarity(torch.nn.functional.normalize(views, dim=1) @ torch.nn.functional.normalize(views, dim=1).T)


def loop(similarity, name, share=None, count=None, threshold=None, margin=None):
    """The definition, pair by pair."""
    n = len(similarity)
    drop = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(similarity[i, j]))
        if name in ("fraction", "topk"):
            most = round(math.floor(round(share * (n - 1), 6))) if name == "fraction" else count
            chosen = others[:most]
        elif name == "threshold":
            chosen = [j for j in others if similarity[i, j] > threshold]
        elif name == "margin":
            chosen = [j for j in others if similarity[i, j] > similarity[i, i] - margin]
        else:
            chosen = []
        for j in chosen:
            drop[i, j] = True
    return drop


@pytest.mark.parametrize("count", [7, 8, 31])
@pytest.mark.parametrize(("name", "values"), FILTERS)
def test_every_filter_equals_the_loop(name, values, count):
    similarity = similarities(count)
    assert torch.equal(negative_filter(name, **values)(similarity), loop(similarity, name, **values))


@pytest.mark.parametrize(("name", "values"), FILTERS)
def test_the_positive_is_never_dropped(name, values):
    for seed in range(5):
        assert not negative_filter(name, **values)(similarities(9, seed)).diagonal().any()


@pytest.mark.parametrize(("name", "values"), FILTERS)
def test_a_filter_follows_a_permutation_of_the_images(name, values):
    similarity = similarities(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    chosen = negative_filter(name, **values)
    assert torch.equal(chosen(similarity[order][:, order]), chosen(similarity)[order][:, order])


@pytest.mark.parametrize(
    ("batch", "share", "dropped"),
    [(128, 0.1, 12), (31, 0.1, 3), (11, 0.1, 1), (10, 0.1, 0), (2, 0.9, 0), (101, 0.29, 29)],
)
def test_a_fraction_drops_the_floor_of_its_share(batch, share, dropped):
    assert (negative_filter("fraction", share=share)(similarities(batch)).sum(dim=1) == dropped).all()


def test_image_similarity_is_the_mean_of_both_cross_views():
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = image_similarity(view_similarity(torch.cat([a, b]), torch.cat([a, b])))
    for i in range(6):
        for j in range(6):
            mean = (torch.cosine_similarity(a[i], b[j], dim=0) + torch.cosine_similarity(b[i], a[j], dim=0)) / 2
            assert found[i, j] == pytest.approx(float(mean), abs=1e-6)


def test_filters_look_at_detached_similarities():
    views = torch.randn(8, 4, requires_grad=True)
    assert not image_similarity(view_similarity(views, views)).requires_grad


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_filter_that_leaves_no_negative_says_so(batch):
    with pytest.raises(
        ValueError, match=rf"drops 5 of {batch - 1} negatives of a batch of {batch} images: none is left"
    ):
        negative_filter("topk", count=5)(torch.eye(batch))


def test_a_share_just_below_one_leaves_a_negative():
    assert (negative_filter("fraction", share=0.999)(similarities(11)).sum(dim=1) == 9).all()


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("fractoin", {}, "negative_filter must be one of auto, none, fraction, topk, threshold, margin"),
        ("fraction", {"share": 1.0}, "negative_share must be at least 0 and below 1, got 1.0"),
        ("fraction", {"share": -0.1}, "negative_share"),
        ("fraction", {"share": math.nan}, "negative_share"),
        ("topk", {"count": -1}, "negative_count must be at least 0, got -1"),
        ("threshold", {"threshold": 1.5}, "negative_threshold must be a cosine from -1 to 1, got 1.5"),
        ("margin", {"margin": -0.5}, "negative_margin must be at least 0"),
        ("margin", {"margin": math.inf}, "negative_margin"),
    ],
)
def test_impossible_values_are_refused(name, values, match):
    with pytest.raises(ValueError, match=match):
        negative_filter(name, **values)
