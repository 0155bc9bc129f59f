"""losses: each formula against a loop, in closed form, under symmetry, with illegal input, in bf16."""

import math

import pytest
import torch
import torch.nn.functional as F

from tcq_hf.model.quantization_tcq import ProductQuantizer
from tcq_hf.training.losses import contrastive_loss, diversity_loss, usage_loss, view_similarity
from tcq_hf.training.negatives import image_similarity, negative_filter

# Losses of order one to ten in float32, sums of at most some hundred terms.
TOLERANCE = 1e-5


def vectors(count, width=6, seed=0):
    return torch.randn(2 * count, width, generator=torch.Generator().manual_seed(seed))


def loop(similarity, temperature, drop=None, prior=None):
    """The definition, anchor by anchor, term by term, in Python floats."""
    views = len(similarity)
    images = views // 2
    losses = []
    for i in range(views):
        positive = math.exp(float(similarity[i, (i + images) % views]) / temperature)
        kept = [
            math.exp(float(similarity[i, j]) / temperature)
            for j in range(views)
            if j % images != i % images and not (drop is not None and drop[i % images, j % images])
        ]
        total = sum(kept)
        if prior is not None:
            total = (total - prior * len(kept) * positive) / (1 - prior)
            total = max(total, len(kept) * math.exp(-1 / temperature))
        losses.append(-math.log(positive / (positive + total)))
    return torch.tensor(losses)


def random_drop(count, seed=1):
    drop = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) < 0.4
    return drop & ~torch.eye(count, dtype=torch.bool)


@pytest.mark.parametrize("prior", [None, 0.0, 0.1, 0.5])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_the_loss_equals_the_loop(count, temperature, dropped, prior):
    similarity = view_similarity(vectors(count), vectors(count, seed=2))
    drop = random_drop(count) if dropped else None
    found = contrastive_loss(similarity, temperature, drop, prior)
    torch.testing.assert_close(found, loop(similarity, temperature, drop, prior), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_equal_vectors_have_the_logarithm_of_their_number_as_loss(count):
    # One positive among 1 + (2N - 2) equal terms.
    similarity = view_similarity(torch.ones(2 * count, 4), torch.ones(2 * count, 4))
    expected = torch.full((2 * count,), math.log(2 * count - 1))
    torch.testing.assert_close(contrastive_loss(similarity, 0.3), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prior", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("value", [-0.5, 0.0, 0.9])
def test_defect_3_debiasing_leaves_equal_similarities_as_they_are(value, prior):
    # (n e - rho n e) / (1 - rho) = n e, with n the number of terms that are summed.
    similarity = torch.full((12, 12), value)
    for drop in (None, random_drop(6)):
        kept = torch.full((12,), 10.0) if drop is None else 2 * (5 - drop.sum(dim=1)).repeat(2).float()
        torch.testing.assert_close(
            contrastive_loss(similarity, 0.2, drop, prior), (1 + kept).log(), atol=TOLERANCE, rtol=TOLERANCE
        )


def test_defect_3_debiased_negatives_never_fall_below_their_floor():
    # The positive is so similar that the correction alone would be negative.
    similarity = torch.full((8, 8), -0.9)
    similarity[torch.arange(8), (torch.arange(8) + 4) % 8] = 1.0
    temperature, prior, n = 0.5, 0.3, 6
    floor = n * math.exp(-1 / temperature)
    expected = torch.full((8,), math.log1p(floor / math.exp(1 / temperature)))
    torch.testing.assert_close(contrastive_loss(similarity, temperature, None, prior), expected, atol=1e-6, rtol=0)


def test_the_two_views_are_alike():
    similarity = view_similarity(vectors(7), vectors(7))
    swapped = torch.arange(14).roll(7)
    torch.testing.assert_close(
        contrastive_loss(similarity[swapped][:, swapped], 0.3, random_drop(7)),
        contrastive_loss(similarity, 0.3, random_drop(7))[swapped],
    )


def test_defect_2_permuting_the_other_images_leaves_an_anchor_unchanged():
    a = vectors(8)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(7, generator=torch.Generator().manual_seed(0))])
    both = torch.cat([order, order + 8])
    before, after = (contrastive_loss(view_similarity(x, x), 0.3) for x in (a, a[both]))
    assert before.shape == (16,)
    torch.testing.assert_close(after, before[both])
    assert after[0] == pytest.approx(float(before[0]), abs=TOLERANCE)


def test_invariant_2_the_loss_has_one_value_an_anchor():
    for count in (1, 3, 32):
        similarity = view_similarity(vectors(count), vectors(count))
        for prior in (None, 0.1):
            assert contrastive_loss(similarity, 0.3, None, prior).shape == (2 * count,)


@pytest.mark.parametrize("prior", [None, 0.1])
def test_an_anchor_without_negatives_has_loss_0_and_a_finite_gradient(prior):
    views = vectors(4).requires_grad_()
    drop = torch.zeros(4, 4, dtype=torch.bool)
    drop[1] = True
    drop[1, 1] = False
    losses = contrastive_loss(view_similarity(views, views), 0.05, drop, prior)
    assert losses[[1, 5]].tolist() == pytest.approx([0.0, 0.0], abs=1e-20)
    assert (losses[[0, 2, 3]] > 0).all()
    losses.sum().backward()
    assert views.grad.isfinite().all()


def test_dropped_negatives_get_no_gradient_from_the_anchor():
    similarity = view_similarity(vectors(5), vectors(5)).requires_grad_()
    drop = random_drop(5)
    contrastive_loss(similarity, 0.3, drop).sum().backward()
    left_out = drop.repeat(2, 2) | torch.eye(5, dtype=torch.bool).repeat(2, 2)
    left_out[torch.arange(10), (torch.arange(10) + 5) % 10] = False  # the positive
    assert (similarity.grad[left_out] == 0).all()
    assert (similarity.grad[~left_out] != 0).all()


@pytest.mark.parametrize("temperature", [0.005, 0.02, 100.0])
@pytest.mark.parametrize("prior", [None, 0.1])
def test_extreme_temperatures_stay_finite(temperature, prior):
    views = vectors(16).requires_grad_()
    losses = contrastive_loss(view_similarity(views, views), temperature, None, prior)
    losses.mean().backward()
    assert losses.isfinite().all()
    assert views.grad.isfinite().all()


def test_defect_4_the_length_of_a_vector_plays_no_part():
    # All negatives of a batch stand on the unit sphere, so none runs at a temperature of its own.
    views = vectors(6)
    longer = views * torch.rand(12, 1, generator=torch.Generator().manual_seed(1)).add(0.1).mul(10)
    torch.testing.assert_close(view_similarity(longer, views), view_similarity(views, longer), atol=1e-6, rtol=0)
    assert view_similarity(longer, longer).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_runs_in_float32_under_autocast(dtype):
    views = vectors(12)
    with torch.autocast("cpu", dtype=dtype):
        inside = contrastive_loss(view_similarity(views, views), 0.1)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, contrastive_loss(view_similarity(views, views), 0.1), atol=0, rtol=0)


def test_the_cross_quantised_form_pulls_the_embedding_to_the_other_views_reconstruction():
    z, restored = vectors(6, seed=3), vectors(6, seed=4)
    similarity = view_similarity(z, restored)
    for i in range(12):
        assert similarity[i, (i + 6) % 12] == pytest.approx(
            float(F.cosine_similarity(z[i], restored[(i + 6) % 12], dim=0)), abs=1e-6
        )
    assert not torch.allclose(similarity, similarity.T)


def test_a_filter_at_the_share_of_false_negatives_removes_their_gradient():
    # Two groups of four equal images: half of the negatives but one are false.
    group = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    noise = 0.01 * vectors(8, 2)
    similarity = view_similarity(group.repeat(2, 1) + noise, group.repeat(2, 1) + noise)
    drop = negative_filter("topk", count=3)(image_similarity(similarity))
    same = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool() & ~torch.eye(8, dtype=torch.bool)
    assert torch.equal(drop, same)
    assert (contrastive_loss(similarity, 0.1, drop) < contrastive_loss(similarity, 0.1) - 1).all()


@pytest.mark.parametrize(
    ("similarity", "arguments", "match"),
    [
        (torch.zeros(4, 5), {}, r"similarity must have shape \[2N, 2N\], got \[4, 5\]"),
        (torch.zeros(3, 3), {}, r"got \[3, 3\]"),
        (torch.zeros(0, 0), {}, r"got \[0, 0\]"),
        (torch.zeros(4, 4), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (torch.zeros(4, 4), {"temperature": -1.0}, "temperature"),
        (torch.zeros(4, 4), {"temperature": math.nan}, "temperature"),
        (torch.zeros(4, 4), {"debias_prior": 1.0}, "debias_prior must be at least 0 and below 1, got 1.0"),
        (torch.zeros(4, 4), {"debias_prior": -0.1}, "debias_prior"),
        (torch.zeros(4, 4), {"drop": torch.zeros(4, 4)}, r"drop must have shape \[2, 2\], got \[4, 4\]"),
    ],
)
def test_illegal_input_is_refused(similarity, arguments, match):
    with pytest.raises(ValueError, match=match):
        contrastive_loss(similarity, **{"temperature": 0.3, **arguments})


# --- Codebook regularisers -------------------------------------------------------------------------------------------


def test_usage_loss_equals_the_loop():
    usage = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    entropies = [-sum(float(p) * math.log(float(p)) for p in row) for row in usage]
    assert float(usage_loss(usage)) == pytest.approx(-sum(entropies) / 3 / math.log(8), abs=1e-6)


@pytest.mark.parametrize("words", [2, 16, 256])
def test_usage_loss_is_minus_one_for_even_use_and_zero_for_a_single_word(words):
    even, single = torch.full((4, words), 1 / words), F.one_hot(torch.zeros(4, dtype=torch.long), words).float()
    assert float(usage_loss(even)) == pytest.approx(-1, abs=1e-6)
    assert float(usage_loss(single)) == pytest.approx(0, abs=1e-6)


def test_usage_loss_does_not_depend_on_the_order_of_the_words():
    usage = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    assert float(usage_loss(usage[:, torch.randperm(8)])) == pytest.approx(float(usage_loss(usage)), abs=1e-6)


def test_usage_loss_of_words_that_nobody_uses_has_a_finite_gradient():
    logits = torch.tensor([[[200.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    usage_loss(logits.softmax(dim=-1).mean(dim=0)).backward()
    assert logits.grad.isfinite().all()


def test_diversity_loss_equals_the_loop_over_pairs():
    words = F.normalize(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(words[m, i] @ words[m, j]) for m in range(3) for i in range(5) for j in range(5)]
    assert float(diversity_loss(words)) == pytest.approx(sum(pairs) / (3 * 25), abs=1e-6)


def test_diversity_loss_is_one_for_equal_words_and_zero_for_opposite_ones():
    word = F.normalize(torch.ones(2, 1, 4), dim=-1)
    assert float(diversity_loss(word.repeat(1, 6, 1))) == pytest.approx(1, abs=1e-6)
    assert float(diversity_loss(torch.cat([word, -word], dim=1))) == pytest.approx(0, abs=1e-6)


def test_defect_1_the_regularisers_reach_the_codebooks():
    quantizer = ProductQuantizer(2, 8, 4, 10.0)
    torch.nn.init.normal_(quantizer.codebooks)
    diversity_loss(quantizer.normalized_codebooks()).backward()
    assert (quantizer.codebooks.grad.flatten(2).norm(dim=-1) > 0).all()
    quantizer.codebooks.grad = None
    table = quantizer.lookup_table(quantizer.normalize(torch.randn(32, 8)))
    usage_loss(quantizer.assignments(table).mean(dim=0)).backward()
    assert (quantizer.codebooks.grad.norm(dim=-1) > 0).all()
