"""TCQModel: forward, initialisation, training, dtypes, timm weights, saving and loading."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from tcq_hf import TCQConfig, TCQModel, TCQOutput
from tcq_hf.index.transforms import Step, fit_chain

EPS = torch.finfo(torch.float32).eps
SMALL = {"embedding_dim": 16, "num_codebooks": 4, "codebook_size": 4}
WIDTH = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# name -> (backbone_kwargs, image_size, has non-persistent buffers)
BACKBONES = {
    "vit_tiny_patch16_224": (WIDTH, 32, False),
    "vit_small_patch14_reg4_dinov2": (WIDTH, 28, False),
    "vit_small_patch16_dinov3": (WIDTH, 32, True),
    "eva02_tiny_patch14_224": (WIDTH, 28, True),
    "vit_small_patch16_rope_224": (WIDTH, 32, True),
    "vit_base_patch16_siglip_224": (WIDTH, 32, False),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        32,
        True,
    ),
    # Without these two arguments timm scales the branches of a fresh network by 1e-6 or 0: no gradient in one step.
    "convnext_atto": ({"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "ls_init_value": 1.0}, 32, False),
    "resnet10t": ({"stem_width": 8, "channels": (16, 16, 32, 32), "zero_init_last": False}, 64, False),
    "mobilenetv3_small_050": (None, 64, False),
}
BUFFERED = [name for name, (*_, buffered) in BACKBONES.items() if buffered]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name, seed=0, **fields) -> TCQModel:
    torch.manual_seed(seed)
    kwargs, side, _ = BACKBONES[name]
    return TCQModel(TCQConfig(backbone=name, backbone_kwargs=kwargs, image_size=side, **{**SMALL, **fields})).eval()


def pixels(model, count=3, seed=0):
    side = model.config.image_size
    return draw(count, model.config.num_channels, side, side, seed=seed)


def same(first: TCQOutput, second: TCQOutput) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# forward


@pytest.mark.parametrize("count", [1, 5])
def test_forward_gives_the_documented_shapes_and_dtypes(model, count):
    output = model(pixels(model, count))
    assert isinstance(output, TCQOutput)
    assert {key: (tuple(value.shape), value.dtype) for key, value in output.items()} == {
        "embeddings": ((count, 32), torch.float32),
        "codes": ((count, 4), torch.uint8),
        "reconstruction": ((count, 32), torch.float32),
        "assignments": ((count, 4, 16), torch.float32),
    }


def test_forward_equals_the_slow_way_through_every_formula(model):
    output = model(pixels(model))
    with torch.no_grad():
        projected = model.projection(model.backbone(pixels(model))).double().view(3, 4, 8)
    embeddings = projected / projected.norm(dim=-1, keepdim=True)
    table = torch.einsum("nmd,mkd->nmk", embeddings, torch.from_numpy(model.codebooks()).double())
    # Sub-vectors of width d = 8: (2 d + 4) eps for the table, times alpha = 10 in the exponent.
    assert torch.allclose(output.embeddings.view(3, 4, 8).double(), embeddings, rtol=0, atol=6 * EPS)
    assert torch.allclose(output.assignments.double(), (10 * table).softmax(-1), rtol=0, atol=2 * 10 * 20 * EPS)
    assert torch.equal(output.codes.long(), table.argmax(-1))
    chosen = [[model.codebooks()[m, k] for m, k in enumerate(row)] for row in output.codes.tolist()]
    assert np.array_equal(output.reconstruction.detach().numpy(), np.array(chosen).reshape(3, 32))


def test_projection_is_the_affine_map_of_features_at_root_mean_square_one(model):
    features = 100 * draw(5, 32)
    weight, bias = model.projection.weight.detach().double(), model.projection.bias.detach().double()
    found = model.projection(features).detach()
    for row, projected in zip(features.double(), found.double(), strict=True):
        scaled = row / math.sqrt(sum(float(x) ** 2 for x in row) / 32)
        # Rounding of the length, then a float32 product of F terms: (F + 8) eps of the sum of magnitudes.
        bound = (32 + 8) * EPS * (scaled.abs() @ weight.abs().T + bias.abs())
        assert ((projected - (scaled @ weight.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("length", [2.0**-4, 2.0**20])
def test_the_length_of_a_feature_plays_no_part(model, length):
    # A power of two scales without rounding, and what keeps the root from zero is below the rounding of these squares.
    features = draw(50, 32)
    assert float((length * features).square().mean(1).min()) > 1e-12 / (EPS / 4)
    plain, scaled = model(features=features), model(features=length * features)
    assert torch.allclose(scaled.embeddings, plain.embeddings, rtol=0, atol=8 * EPS)
    assert torch.equal(scaled.codes, plain.codes)


def test_a_feature_of_zeros_has_an_embedding(model):
    assert model(features=torch.zeros(2, 32)).embeddings.isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
def test_features_path_equals_pixel_path(name):
    model = build(name)
    features = model.get_image_features(pixels(model))
    assert features.shape == (3, model.projection.in_features)
    assert same(model(features=features), model(pixels(model)))


def test_one_image_alone_gets_the_code_that_it_gets_in_a_batch(model):
    batch = pixels(model, 8)
    alone = torch.cat([model(image[None]).codes for image in batch])
    assert torch.equal(alone, model(batch).codes)


def test_permuting_the_batch_permutes_the_output(model):
    order = torch.tensor([3, 0, 2, 1])
    output, moved = model(pixels(model, 4)), model(pixels(model, 4)[order])
    assert torch.equal(moved.codes, output.codes[order])


def test_tuple_output_holds_the_same_tensors(model):
    output = model(pixels(model))
    assert all(a is b for a, b in zip(output.to_tuple(), output.values(), strict=True))
    assert len(output.to_tuple()) == 4


@pytest.mark.parametrize("both", [False, True])
def test_neither_or_both_inputs_are_refused(model, both):
    inputs = {"pixel_values": pixels(model), "features": draw(3, 32)} if both else {}
    with pytest.raises(ValueError, match="exactly one of pixel_values and features"):
        model(**inputs)


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_wrong_pixel_shape_is_refused_with_expected_and_given(model, shape):
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\].*image_size") as caught:
        model(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 31), (32,), (2, 1, 32)])
def test_wrong_features_shape_is_refused_with_expected_and_given(model, shape):
    with pytest.raises(ValueError, match=r"features must have shape \[N, 32\]") as caught:
        model(features=torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_work_on_a_vit_and_on_a_conv(channels):
    for name in ("vit_tiny_patch16_224", "resnet10t"):
        model = build(name, num_channels=channels)
        assert model(pixels(model)).codes.shape == (3, 4)


def test_codebooks_are_float32_numpy_of_unit_norm(model):
    books = model.codebooks()
    assert isinstance(books, np.ndarray)
    assert (books.dtype, books.shape) == (np.float32, (4, 16, 8))
    assert np.abs(np.linalg.norm(books.astype(np.float64), axis=-1) - 1).max() <= (8 / 2 + 2) * EPS


def test_backbone_kwargs_that_the_backbone_refuses_raise_in_words():
    with pytest.raises(ValueError, match=r"refuses backbone_kwargs=.*no_such_thing"):
        TCQModel(TCQConfig(backbone="test_resnet", backbone_kwargs={"no_such_thing": 1}, **SMALL))


def test_scratch_construction_keeps_the_weights_that_timm_draws():
    for name, (kwargs, side, _) in BACKBONES.items():
        model = build(name, seed=3)
        torch.manual_seed(3)
        sized = {"img_size": side} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
        drawn = timm.create_model(name, num_classes=0, **(kwargs or {}), **sized).state_dict()
        assert drawn.keys() == model.backbone.state_dict().keys()
        assert [key for key, value in model.backbone.state_dict().items() if not torch.equal(value, drawn[key])] == []


def test_scratch_codebooks_and_projection_are_drawn_and_not_left_empty():
    model = build("vit_tiny_patch16_224", embedding_dim=64, codebook_size=256)
    codebooks = model.quantizer.codebooks.detach()
    # K M d = 16,384 standard normal draws: the mean errs by 1/128, the variance by sqrt(2)/128; six sigma.
    assert abs(float(codebooks.mean())) < 6 / 128
    assert abs(float(codebooks.var()) - 1) < 6 * math.sqrt(2) / 128
    assert float(model.projection.weight.detach().std()) > 0


# pooling


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_pooling_on_a_vit_equals_the_tokens_taken_by_hand(name):
    token, mean = build(name, pooling="token"), build(name, pooling="avg")
    tokens = token.backbone.forward_features(pixels(token)).detach()
    prefix = {"vit_tiny_patch16_224": 1}.get(name, 5)
    assert tokens.shape[1] == prefix + 4
    assert torch.equal(token.get_image_features(pixels(token)), tokens[:, 0])
    by_hand = torch.stack([sum(row[prefix:], torch.zeros(32)) / 4 for row in tokens])
    # Four summands: at most 4 eps of the largest token entry apart, whatever the order.
    given = mean.get_image_features(pixels(mean))
    assert torch.allclose(given, by_hand, rtol=0, atol=4 * EPS * float(tokens.abs().max()))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_naming_the_pooling_that_timm_uses_anyway_changes_nothing(name):
    plain = build(name)
    named = build(name, pooling=plain.backbone.global_pool)
    # The mean of four tokens taken in two orders, at most 4 eps of the largest feature each.
    with torch.no_grad():
        expected, given = plain.get_image_features(pixels(plain)), named.get_image_features(pixels(named))
    assert torch.allclose(given, expected, rtol=0, atol=8 * EPS * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_pooling_of_tokens_is_refused_on_a_backbone_without_them(name, pooling):
    with pytest.raises(ValueError, match=f"pooling='{pooling}' is impossible for backbone '{name}'.*leave pooling"):
        build(name, pooling=pooling)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "test_vit3"])
def test_pooling_token_is_refused_on_a_vit_without_class_token(name):
    # test_vit3 has register tokens, but no class token: its first token is a register.
    kwargs = BACKBONES.get(name, [None])[0]
    with pytest.raises(ValueError, match="no class token"):
        TCQModel(TCQConfig(backbone=name, backbone_kwargs=kwargs, image_size=32, pooling="token", **SMALL))


# initialize


def centred_scatter(rows: torch.Tensor) -> torch.Tensor:
    centred = rows.double() - rows.double().mean(0)
    return centred.T @ centred / len(rows)


def at_one_length(features):
    """Rows scaled to root mean square 1, in double precision; float32 again."""
    rows = features.double()
    return (rows / rows.square().mean(dim=1, keepdim=True).sqrt()).float()


def features_with_offset(count=300, width=32):
    """Features of root mean square 1 whose directions have very different variances and whose mean is far from zero."""
    return at_one_length(draw(count, width) * torch.logspace(0, -2, width) + draw(width, seed=1))


def test_initialize_centres_the_projection():
    model, features = build("vit_tiny_patch16_224"), features_with_offset()
    model.initialize(features)
    weight, bias = model.projection.weight.detach().double(), model.projection.bias.detach().double()
    # Rounding of W, b and the length to float32, and a product of F terms: (F + 8) eps of the sum of magnitudes.
    bound = (32 + 8) * EPS * (features.double().abs() @ weight.abs().T + bias.abs()).mean(0)
    with torch.no_grad():
        mean = model.projection(features).double().mean(0)
    assert (mean.abs() <= bound).all()
    assert bound.max() < 1e-2  # far below the length of the mean


@pytest.mark.parametrize("dim", [4, 16])
def test_initialize_keeps_the_variance_of_the_leading_eigenvectors(dim):
    model, features = build("vit_tiny_patch16_224", embedding_dim=dim), features_with_offset()
    model.initialize(features)
    with torch.no_grad():
        kept = torch.linalg.eigvalsh(centred_scatter(model.projection(features))).flip(0)
    best = torch.linalg.eigvalsh(centred_scatter(features)).flip(0)[:dim]
    # Projected values err by (F + 4) eps sum |w||x| <= 36 eps sqrt(F) max |row|; squared, twice that times the spread.
    error = 2 * 36 * EPS * math.sqrt(32) * float(features.norm(dim=1).max()) * float(best[0].sqrt())
    assert torch.allclose(kept, best, rtol=0, atol=error)


@pytest.mark.parametrize("dim", [32, 64])
def test_initialize_with_d_at_least_f_keeps_every_distance(dim):
    model, features = build("vit_tiny_patch16_224", embedding_dim=dim), features_with_offset(60)
    model.initialize(features)
    with torch.no_grad():
        projected = model.projection(features)
    distances, expected = (torch.cdist(x.double(), x.double()) for x in (projected, features))
    error = 2 * 36 * EPS * math.sqrt(32) * math.sqrt(dim) * float(features.norm(dim=1).max())
    assert torch.allclose(distances, expected, rtol=0, atol=error)
    assert model(features=features).embeddings.isfinite().all()


def test_initialize_shares_the_variance_among_the_sub_spaces():
    # One direction carries nearly everything. A rotation drawn uniformly gives a sub-space of d of D dimensions a share
    # of it that is Beta(d / 2, (D - d) / 2): here mean 1/2, and outside 0.1 .. 0.9 with probability below 1e-7.
    model = build("vit_tiny_patch16_224", embedding_dim=32, num_codebooks=2)
    features = draw(200, 32) * torch.tensor([100.0] + [0.01] * 31)
    model.initialize(features)
    with torch.no_grad():
        shares = model.projection(features).var(0).view(2, 16).sum(1)
    assert (shares / shares.sum() > 0.1).all()


def test_initialize_does_not_depend_on_the_order_of_the_features():
    # The sign of an eigenvector is a convention; here it must not depend on where the columns stand.
    features, order = features_with_offset(), torch.randperm(32, generator=torch.Generator().manual_seed(2))
    first, moved = build("vit_tiny_patch16_224"), build("vit_tiny_patch16_224")
    first.initialize(features)
    moved.initialize(features[:, order])
    # Both weights are rounded from float64, whose error is far below: entries are at most 1 in size.
    assert torch.allclose(moved.projection.weight, first.projection.weight[:, order], rtol=0, atol=2 * EPS)


def test_initialize_follows_its_seed_and_nothing_else():
    features = features_with_offset()
    first, again, other = (build("vit_tiny_patch16_224", seed=s) for s in (0, 1, 2))
    first.initialize(features, seed=4)
    again.initialize(features, seed=4)
    other.initialize(features, seed=5)
    assert torch.equal(first.projection.weight, again.projection.weight)
    assert torch.equal(first.projection.bias, again.projection.bias)
    assert np.array_equal(first.codebooks(), again.codebooks())
    assert not torch.equal(first.projection.weight, other.projection.weight)
    assert not np.array_equal(first.codebooks(), other.codebooks())


def test_initialize_from_numpy_and_other_dtypes_equals_initialize_from_float32():
    features = features_with_offset()
    expected = build("vit_tiny_patch16_224").initialize(features)
    for given in (features.numpy(), features.double(), features.double().numpy()):
        model = build("vit_tiny_patch16_224").initialize(given)
        assert torch.equal(model.projection.weight, expected.projection.weight)
        assert np.array_equal(model.codebooks(), expected.codebooks())


def test_initialize_with_embeddings_sets_the_codebooks_and_leaves_the_projection(model):
    weight, bias, before = model.projection.weight.clone(), model.projection.bias.clone(), model.codebooks()
    assert model.initialize(embeddings=draw(200, 32, seed=8)) is model
    assert torch.equal(model.projection.weight, weight)
    assert torch.equal(model.projection.bias, bias)
    assert not np.array_equal(model.codebooks(), before)


def test_initialize_with_features_equals_initialize_with_their_embeddings():
    features, model = features_with_offset(), build("vit_tiny_patch16_224")
    model.initialize(features, seed=3)
    fitted = model.codebooks()
    model.initialize(embeddings=model(features=features).embeddings, seed=3)
    # The sub-vectors are normalised once more, which moves them by an ulp; K-means carries that into the means.
    assert np.abs(model.codebooks() - fitted).max() <= 300 * EPS


def test_initialize_uses_every_codeword(model):
    features = draw(400, 32, seed=1)
    model.initialize(features)
    codes = model(features=features).codes
    assert [len(codes[:, m].unique()) for m in range(4)] == [16] * 4


@pytest.mark.parametrize("name", ["features", "embeddings"])
def test_initialize_refuses_too_few_rows_wrong_width_and_non_finite_rows(model, name):
    good = draw(20, 32)
    with pytest.raises(ValueError, match=f"{name} must have at least codebook_size=16 rows, got 15"):
        model.initialize(**{name: good[:15]})
    with pytest.raises(ValueError, match=rf"{name} must have shape \[n, 32\], got \[20, 31\]"):
        model.initialize(**{name: good[:, :31]})
    with pytest.raises(ValueError, match=rf"{name} must have shape \[n, 32\], got \[32\]"):
        model.initialize(**{name: good[0]})
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = good.clone()
        broken[[7, 11], 3] = bad
        with pytest.raises(ValueError, match=f"{name} row 7 is not finite"):
            model.initialize(**{name: broken})


def test_initialize_that_refuses_its_rows_changes_nothing(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        model.initialize(torch.full((20, 32), float("nan")))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_initialize_refuses_neither_and_both(model):
    with pytest.raises(ValueError, match="exactly one"):
        model.initialize()
    with pytest.raises(ValueError, match="exactly one"):
        model.initialize(draw(20, 32), embeddings=draw(20, 32))


# initialize from a transform


def of_unequal_lengths(count=300):
    return features_with_offset(count) * torch.linspace(1, 9, count)[:, None]


def transform(*steps, features=None):
    return fit_chain(steps, train=(of_unequal_lengths() if features is None else features).numpy())


def test_a_transform_that_is_rotated_is_the_projection_as_it_stands():
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    chain = transform(Step("l2"), Step("pca-whitening", 16), Step("rotation"), Step("l2"))
    model.initialize(features, transform=chain)
    expected = torch.from_numpy(chain.apply(features.numpy())).view(300, 4, 4)
    expected = expected / expected.norm(dim=2, keepdim=True)
    # Rounding of weight, bias and product: (F + 8) eps of the sum of magnitudes, over the length of the sub-vector.
    weight, bias = model.projection.weight.detach(), model.projection.bias.detach()
    size = (at_one_length(features).abs() @ weight.abs().T + bias.abs()).view(300, 4, 4).norm(dim=2, keepdim=True)
    with torch.no_grad():
        length = model.projection(features).view(300, 4, 4).norm(dim=2, keepdim=True)
    bound = 2 * (32 + 8) * EPS * size / length
    assert ((model(features=features).embeddings.view(300, 4, 4) - expected).abs() <= bound).all()
    assert bound.median() < 1e-3


def test_a_transform_in_the_order_of_its_variance_is_rotated():
    model = build("vit_tiny_patch16_224", embedding_dim=32, num_codebooks=2)
    features = draw(200, 32) * torch.tensor([100.0] + [0.01] * 31)
    model.initialize(features, transform=transform(Step("l2"), Step("pca"), Step("l2"), features=features))
    with torch.no_grad():
        shares = model.projection(features).var(0).view(2, 16).sum(1)
    assert (shares / shares.sum() > 0.1).all()  # as without a transform
    names = [("pca", 0), ("pca", 1), ("rotation", 0), ("rotation", 1)]
    weights = {}
    for kind, seed in names:
        chain = transform(Step("l2"), Step(kind), features=features)
        weights[kind, seed] = model.initialize(features, transform=chain, seed=seed).projection.weight.clone()
    assert not torch.equal(weights["pca", 0], weights["pca", 1])
    assert torch.equal(weights["rotation", 0], weights["rotation", 1])


def test_a_rotated_transform_keeps_every_cosine():
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    chain = transform(Step("l2"), Step("pca-whitening", 16), Step("l2"))
    model.initialize(features, transform=chain)
    weight, bias = model.projection.weight.detach().double(), model.projection.bias.detach().double()
    projected = model.projection(features).detach().double()
    expected = torch.from_numpy(chain.apply(features.numpy())).double()
    # A row errs as in the test above, in the chain too, and a cosine by as much as its two rows.
    size = (at_one_length(features).double().abs() @ weight.abs().T + bias.abs()).norm(dim=1)
    error = 2 * (32 + 8) * EPS * size / projected.norm(dim=1)
    projected = torch.nn.functional.normalize(projected, dim=1)
    assert ((projected @ projected.T - expected @ expected.T).abs() <= error[:, None] + error).all()
    assert error.max() < 1e-2


def pca_error(features, dim):
    """How far directions may move where rows at unit norm are rounded: the covariance by 2 eps, over the gap."""
    values = torch.linalg.eigvalsh(centred_scatter(at_one_length(features)) / 32).flip(0)
    return 2 * EPS / float((values[:dim] - values[1 : dim + 1]).min()) * math.sqrt(dim)


@pytest.mark.parametrize("dim", [8, 16])
def test_a_pca_as_transform_is_what_initialize_does_without(dim):
    features = of_unequal_lengths()
    plain, given = (build("vit_tiny_patch16_224", embedding_dim=dim) for _ in range(2))
    plain.initialize(features, seed=3)
    given.initialize(features, transform=transform(Step("l2"), Step("pca", dim)), seed=3)
    error = pca_error(features, dim)
    assert error < 0.05
    assert torch.allclose(given.projection.weight, plain.projection.weight, rtol=0, atol=error)
    assert torch.allclose(given.projection.bias, plain.projection.bias, rtol=0, atol=error * math.sqrt(32))


@pytest.mark.parametrize(
    ("steps", "dim"),
    [
        ([Step("pca-whitening", 16)], 16),
        ([Step("pca-whitening"), Step("rotation", 64)], 64),
        ([Step("opq", num_codebooks=4)], 32),
    ],
)
def test_training_starts_at_weights_of_the_usual_size(steps, dim):
    model, features = build("vit_tiny_patch16_224", embedding_dim=dim), of_unequal_lengths()
    norm = float(model.initialize(features).projection.weight.detach().norm())
    found = model.initialize(features, transform=transform(Step("l2"), *steps)).projection.weight.detach().norm()
    assert float(found) == pytest.approx(norm, rel=1e-5) == pytest.approx(math.sqrt(min(dim, 32)), rel=1e-5)


def test_a_transform_is_followed_by_the_codebooks_of_what_it_gives():
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    model.initialize(features, transform=transform(Step("l2"), Step("pca", 16)), seed=3)
    fitted = model.codebooks()
    model.initialize(embeddings=model(features=features).embeddings, seed=3)
    assert np.abs(model.codebooks() - fitted).max() <= 300 * EPS


def test_any_object_with_a_linear_map_is_a_transform():
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    weight, bias = draw(16, 32, seed=1).numpy(), draw(16, seed=2).numpy()
    model.initialize(features, transform=SimpleNamespace(linear=lambda: (weight, bias), rotated=True))
    scale = 4 / np.linalg.norm(weight)
    # The features are sqrt(F) as long as the rows of unit norm that the map is of.
    assert np.allclose(model.projection.weight.detach(), scale * weight, rtol=4 * EPS, atol=0)
    assert np.allclose(model.projection.bias.detach(), scale * math.sqrt(32) * bias, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("l2"), Step("pca", 8)], r"width 32 to embedding_dim=16, this one has a weight \[8, 32\]"),
        ([Step("pca", 16)], r"lengths of the features.*Step\('l2'\) as its first step"),
        ([Step("l2"), Step("pca", 16), Step("l2"), Step("rotation")], "'l2' between other steps and is no linear map"),
    ],
)
def test_a_transform_that_the_projection_cannot_be_is_refused(steps, message):
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.initialize(features, transform=transform(*steps))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_transform_of_rows_at_one_length_needs_no_l2():
    model, features = build("vit_tiny_patch16_224"), torch.nn.functional.normalize(of_unequal_lengths(), dim=1)
    first = model.initialize(
        features, transform=transform(Step("pca", 16), features=features)
    ).projection.weight.clone()
    second = model.initialize(features, transform=transform(Step("l2"), Step("pca", 16), features=features))
    assert torch.allclose(first, second.projection.weight, rtol=0, atol=pca_error(features, 16))


def test_what_is_no_transform_is_refused():
    model, features = build("vit_tiny_patch16_224"), of_unequal_lengths()
    with pytest.raises(TypeError, match=r"transform must be fitted.*got \(Step\(kind='pca'"):
        model.initialize(features, transform=(Step("pca", 16),))
    with pytest.raises(ValueError, match="embeddings leave as it is; give features with it"):
        model.initialize(embeddings=draw(20, 16), transform=transform(Step("l2"), Step("pca", 16)))
    narrow = transform(Step("l2"), Step("pca", 16), features=features[:, :31])
    with pytest.raises(ValueError, match=r"width 32 to embedding_dim=16, this one has a weight \[16, 31\]"):
        model.initialize(features, transform=narrow)
    for weight in (np.zeros((16, 32)), np.full((16, 32), np.nan)):
        with pytest.raises(ValueError, match="finite weights, not all of them zero"):
            model.initialize(features, transform=SimpleNamespace(linear=lambda weight=weight: (weight, np.zeros(16))))


# training


def one_step(model) -> list[str]:
    """Names of the trainable tensors that one plain SGD step leaves as they were."""
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output = model(pixels(model, 8))
    loss = (output.embeddings * draw(*output.embeddings.shape, seed=5)).sum()
    (loss + (output.assignments * draw(*output.assignments.shape, seed=6)).sum()).backward()
    optimizer.step()
    return [name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)]


@pytest.mark.parametrize("name", BACKBONES)
def test_invariant_2_every_trainable_tensor_changes_in_one_step(name):
    assert one_step(build(name)) == []


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("vit_tiny_patch16_224", "token"),
        ("vit_tiny_patch16_224", "avg"),
        ("vit_small_patch16_dinov3", "avg"),
        ("eva02_tiny_patch14_224", "token"),
        ("eva02_tiny_patch14_224", "avg"),
        ("vit_base_patch16_siglip_224", "avg"),
    ],
)
def test_invariant_2_every_trainable_tensor_changes_whatever_the_pooling(name, pooling):
    assert one_step(build(name, pooling=pooling)) == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_invariant_2_freeze_backbone_leaves_the_backbone_and_trains_the_rest(name):
    model = build(name)
    assert model.freeze_backbone() is model
    unchanged = one_step(model)
    assert unchanged == [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_gradient_does_not_depend_on_the_path_through_features():
    model = build("vit_tiny_patch16_224")
    gradients = []
    for inputs in ({"pixel_values": pixels(model)}, {"features": model.get_image_features(pixels(model))}):
        model.zero_grad()
        model(**inputs).embeddings[:, 0].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# gradient checkpointing


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "resnet10t"])
def test_gradient_checkpointing_changes_neither_output_nor_gradient(name):
    results = []
    for enable in (False, True):
        model = build(name).train()
        if enable:
            model.activation_checkpointing_enable()
            assert any(getattr(module, "grad_checkpointing", False) for module in model.backbone.modules())
        output = model(pixels(model))
        output.assignments.square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        results.append((output, gradients))
    (plain, expected), (saved, gradients) = results
    assert same(plain, saved)
    # The recomputed forward is the same arithmetic: bit-equal.
    assert [key for key in expected if not torch.equal(expected[key], gradients[key])] == []


def test_gradient_checkpointing_can_be_read_and_turned_off_again():
    model = build("vit_tiny_patch16_224")
    assert model.supports_gradient_checkpointing
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert not model.backbone.grad_checkpointing


def test_gradient_checkpointing_is_refused_for_a_backbone_without_it():
    model = TCQModel(TCQConfig(backbone="legacy_seresnet18", image_size=32, **SMALL))
    assert not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="TCQModel does not support activation checkpointing"):
        model.activation_checkpointing_enable()


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_outputs_float32_and_the_quantizer_exact(model, dtype):
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        features = model.get_image_features(pixels(model))
        output, from_features = model(pixels(model)), model(features=features)
    assert same(output, from_features)
    assert same(from_features, model(features=features))
    assert {value.dtype for key, value in output.items() if key != "codes"} == {torch.float32}
    norms = output.embeddings.view(-1, 4, 8).norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=10 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "resnet10t"])
def test_loading_in_half_precision_keeps_quantizer_and_projection_float32_and_bit_equal(tmp_path, name, dtype):
    model = build(name)
    model.save_pretrained(tmp_path)
    half = TCQModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.backbone.parameters()} == {dtype}
    assert {p.dtype for p in (*half.projection.parameters(), *half.quantizer.parameters())} == {torch.float32}
    assert np.array_equal(half.codebooks(), model.codebooks())
    assert torch.equal(half.projection.weight, model.projection.weight)
    features = draw(10, model.projection.in_features)
    assert same(half(features=features), model(features=features))
    output = half(pixels(model))  # float32 pixels
    assert output.embeddings.dtype == torch.float32
    assert output.embeddings.isfinite().all()
    assert half.get_image_features(pixels(model)).dtype == dtype


def test_model_cast_to_bfloat16_takes_float32_pixels_and_gives_float32(model):
    cast = model.to(torch.bfloat16)
    output = cast(pixels(model))
    assert output.embeddings.dtype == output.reconstruction.dtype == output.assignments.dtype == torch.float32
    norms = output.embeddings.view(-1, 4, 8).norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=10 * EPS)
    assert cast.codebooks().dtype == np.float32


def test_compiled_model_gives_the_same_codes(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert same(compiled(pixels(model)), model(pixels(model)))


def test_construction_on_the_meta_device_allocates_nothing():
    for name, (kwargs, side, _) in BACKBONES.items():
        with torch.device("meta"):
            model = TCQModel(TCQConfig(backbone=name, backbone_kwargs=kwargs, image_size=side, **SMALL))
        assert {p.device.type for p in model.parameters()} == {"meta"}, name


# saving and loading

LOAD = """
import sys, torch, safetensors.torch
from tcq_hf import TCQModel
torch.set_num_threads(int(sys.argv[1]))
for folder in sys.argv[2:]:
    model, info = TCQModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert not model.training
    given = safetensors.torch.load_file(folder + "/inputs.safetensors")
    with torch.no_grad():
        outputs = {f"{name}.{key}": value for name in given for key, value in model(**{name: given[name]}).items()}
    outputs["codebooks"] = torch.from_numpy(model.codebooks())
    safetensors.torch.save_file(outputs, folder + "/outputs.safetensors")
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every backbone saved here and run in one fresh process: name -> (outputs here, outputs there, folder)."""
    here, folders = {}, {}
    for name in BACKBONES:
        model, folders[name] = build(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        given = {"pixel_values": pixels(model), "features": draw(5, model.projection.in_features)}
        safetensors.torch.save_file(given, folders[name] / "inputs.safetensors")
        with torch.no_grad():
            here[name] = {f"{i}.{key}": value for i in given for key, value in model(**{i: given[i]}).items()}
        here[name]["codebooks"] = torch.from_numpy(model.codebooks())
    command = [sys.executable, "-c", LOAD, str(torch.get_num_threads()), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    there = {name: safetensors.torch.load_file(folder / "outputs.safetensors") for name, folder in folders.items()}
    return {name: (here[name], there[name], folders[name]) for name in BACKBONES}


@pytest.mark.parametrize("info", [False, True])
def test_loaded_weights_begin_on_cache_lines_as_those_of_a_new_model(model, tmp_path, info):
    # BLAS rounds by where a row begins; what a file is mapped to begins anywhere.
    model.save_pretrained(tmp_path)
    found = TCQModel.from_pretrained(tmp_path, output_loading_info=info)
    loaded = found[0] if info else found
    places = {name: tensor.data_ptr() % 64 for name, tensor in loaded.state_dict().items()}
    assert places == dict.fromkeys(model.state_dict(), 0)
    assert same(loaded(pixels(model)), model(pixels(model)))


@pytest.mark.parametrize("name", BACKBONES)
def test_invariant_3_a_fresh_process_gives_the_same_bits_with_no_missing_keys(reloaded, name):
    here, there, _ = reloaded[name]
    assert here.keys() == there.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []
    assert all(value.isfinite().all() for value in there.values())


def test_invariant_3_nothing_saved_is_a_pickle(reloaded):
    for *_, folder in reloaded.values():
        suffixes = {path.suffix for path in folder.iterdir()}
        assert suffixes <= {".safetensors", ".json", ".py"}
        json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", BUFFERED)
def test_invariant_3_buffers_outside_the_checkpoint_come_back(tmp_path, name):
    model = build(name)
    persistent = model.state_dict().keys()
    tables = {key: value for key, value in model.named_buffers() if key not in persistent}
    assert tables  # otherwise this test holds nothing
    model.save_pretrained(tmp_path)
    loaded = dict(TCQModel.from_pretrained(tmp_path).named_buffers())
    assert [key for key in tables if not torch.equal(tables[key], loaded[key])] == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_invariant_3_a_trained_model_reloads_bit_equal(tmp_path, name):
    model = build(name)
    one_step(model)
    model.eval().save_pretrained(tmp_path)
    loaded, info = TCQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert [key for key, value in loaded.state_dict().items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("vit_tiny_patch16_224", "avg"), ("eva02_tiny_patch14_224", "token"), ("vit_base_patch16_siglip_224", "avg")],
)
def test_invariant_3_a_model_with_named_pooling_reloads_bit_equal(tmp_path, name, pooling):
    model = build(name, pooling=pooling)
    model.save_pretrained(tmp_path)
    loaded, info = TCQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(loaded(pixels(model)), model(pixels(model)))


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"no weights" * 500, "empty": b""}[how])


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty"])
def test_damaged_model_file_raises_on_load_with_its_name(model, tmp_path, how):
    model.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors", how)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        TCQModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_model_file_raises_with_its_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TCQModel.from_pretrained(tmp_path)


def test_loading_weights_of_another_codebook_size_raises(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        TCQModel.from_pretrained(tmp_path, codebook_size=32)


# from_timm

TEST_VIT = {"image_size": 32, **SMALL}


def timm_file(folder, name="test_vit", dtype=torch.float32, **kwargs):
    torch.manual_seed(11)
    state = timm.create_model(name, **kwargs).to(dtype).state_dict()
    safetensors.torch.save_file(state, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors", state


@pytest.mark.parametrize(
    ("name", "heads", "kwargs"),
    [
        ("test_vit", {"head.weight", "head.bias"}, {"img_size": 32}),
        ("test_resnet", {"fc.weight", "fc.bias"}, {}),
        ("test_efficientnet", {"classifier.weight", "classifier.bias"}, {}),
        ("test_convnext", {"head.fc.weight", "head.fc.bias"}, {}),
    ],
)
@pytest.mark.parametrize("as_string", [False, True])
def test_from_timm_takes_every_tensor_of_a_local_file_bit_by_bit(tmp_path, name, heads, kwargs, as_string):
    path, state = timm_file(tmp_path, name, **kwargs)
    model = TCQModel.from_timm(name, weights=str(path) if as_string else path, **TEST_VIT)
    loaded = model.backbone.state_dict()
    assert state.keys() - loaded.keys() == heads
    assert [key for key, value in loaded.items() if not torch.equal(value, state[key])] == []
    assert not model.training
    assert model.config.backbone == name


def test_from_timm_keeps_the_tensors_after_save_and_load(tmp_path):
    path, state = timm_file(tmp_path, img_size=32)
    TCQModel.from_timm("test_vit", weights=path, **TEST_VIT).save_pretrained(tmp_path / "saved")
    loaded = TCQModel.from_pretrained(tmp_path / "saved").backbone.state_dict()
    assert [key for key, value in loaded.items() if not torch.equal(value, state[key])] == []


def test_from_timm_gives_the_features_that_timm_gives(tmp_path):
    path, state = timm_file(tmp_path, img_size=32)
    model = TCQModel.from_timm("test_vit", weights=path, **TEST_VIT)
    theirs = timm.create_model("test_vit", img_size=32).eval()
    theirs.load_state_dict(state)
    expected = theirs.forward_head(theirs.forward_features(pixels(model)), pre_logits=True)
    assert torch.equal(model.get_image_features(pixels(model)), expected)


def test_from_timm_reads_float16_files_into_float32(tmp_path):
    path, state = timm_file(tmp_path, dtype=torch.float16, img_size=32)
    loaded = TCQModel.from_timm("test_vit", weights=path, **TEST_VIT).backbone.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert [key for key, value in loaded.items() if not torch.equal(value, state[key].float())] == []


def test_from_timm_of_a_grey_backbone_sums_the_colours_of_the_first_layer(tmp_path):
    path, state = timm_file(tmp_path, img_size=32)
    model = TCQModel.from_timm("test_vit", weights=path, num_channels=1, **TEST_VIT)
    expected = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.allclose(model.backbone.patch_embed.proj.weight, expected, rtol=3 * EPS, atol=3 * EPS)


def test_from_timm_of_another_image_size_resamples_the_position_table(tmp_path):
    path, state = timm_file(tmp_path, img_size=32)
    model = TCQModel.from_timm("test_vit", weights=path, **{**TEST_VIT, "image_size": 64})
    assert model(pixels(model)).codes.shape == (3, 4)
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_from_timm_with_pooling_loads_the_same_tensors(tmp_path, pooling):
    path, state = timm_file(tmp_path, img_size=32)
    loaded = TCQModel.from_timm("test_vit", weights=path, pooling=pooling, **TEST_VIT).backbone.state_dict()
    assert [key for key, value in loaded.items() if not torch.equal(value, state[key])] == []


def test_from_timm_with_average_pooling_reads_a_file_with_an_attention_pool(tmp_path):
    name = "vit_base_patch16_siglip_224"
    path, state = timm_file(tmp_path, name, img_size=32, **WIDTH)
    model = TCQModel.from_timm(name, weights=path, backbone_kwargs=WIDTH, pooling="avg", **TEST_VIT)
    loaded = model.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert all(key.startswith(("attn_pool.", "head.")) for key in state.keys() - loaded.keys())


def test_from_timm_passes_backbone_kwargs_on(tmp_path):
    kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    path, state = timm_file(tmp_path, img_size=32, **kwargs)
    model = TCQModel.from_timm("test_vit", weights=path, backbone_kwargs=kwargs, **TEST_VIT)
    assert [key for key, value in model.backbone.state_dict().items() if not torch.equal(value, state[key])] == []


def test_from_timm_refuses_a_missing_file_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        TCQModel.from_timm("test_vit", weights=tmp_path / "absent.safetensors", **TEST_VIT)


def test_from_timm_refuses_another_file_type_by_name(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file, got weights\.pth"):
        TCQModel.from_timm("test_vit", weights=tmp_path / "weights.pth", **TEST_VIT)


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty"])
def test_from_timm_refuses_a_damaged_file_by_name(tmp_path, how):
    path, _ = timm_file(tmp_path, img_size=32)
    damage(path, how)
    with pytest.raises(ValueError, match=r"test_vit\.safetensors is damaged"):
        TCQModel.from_timm("test_vit", weights=path, **TEST_VIT)


@pytest.mark.parametrize("change", ["other architecture", "one tensor less", "one tensor more", "other shape"])
def test_from_timm_refuses_a_file_that_does_not_fit_by_name_and_tensor(tmp_path, change):
    path, state = timm_file(tmp_path, img_size=32)
    changed = {
        "other architecture": lambda: timm.create_model("test_resnet").state_dict(),
        "one tensor less": lambda: {key: value for key, value in state.items() if key != "norm.weight"},
        "one tensor more": lambda: {**state, "norm.weight.extra": torch.zeros(3)},
        "other shape": lambda: {**state, "norm.weight": torch.zeros(5)},
    }[change]()
    safetensors.torch.save_file(changed, path)
    with pytest.raises(ValueError, match=r"test_vit\.safetensors does not fit backbone 'test_vit'") as caught:
        TCQModel.from_timm("test_vit", weights=path, **TEST_VIT)
    assert "norm.weight" in str(caught.value)


@pytest.mark.parametrize("name", ["test_vit", "test_vit.r160_in1k"])
def test_from_timm_without_weights_offline_raises_the_error_of_the_hub_client(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # not what the machine has cached
    with pytest.raises((LocalEntryNotFoundError, OfflineModeIsEnabled)):
        TCQModel.from_timm(name, **TEST_VIT)


def test_from_timm_refuses_an_unknown_name_before_it_looks_at_the_weights():
    with pytest.raises(ValueError, match="unknown to timm"):
        TCQModel.from_timm("vit_tiny_patch16_2244", weights="absent.safetensors")


def test_from_timm_loads_the_real_weights_bit_by_bit(data):
    path = data / "vit_tiny_patch16_224" / "model.safetensors"
    model, state = TCQModel.from_timm("vit_tiny_patch16_224", weights=path), safetensors.torch.load_file(path)
    loaded = model.backbone.state_dict()
    assert state.keys() - loaded.keys() == {"head.weight", "head.bias"}
    assert [key for key, value in loaded.items() if not torch.equal(value, state[key].float())] == []
