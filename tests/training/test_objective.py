"""objective: the loss against a loop over pairs and against its parts, its figures in closed form, its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from tcq_hf import TCQTrainingArguments
from tcq_hf.model.modeling_tcq import TCQOutput
from tcq_hf.model.quantization_tcq import ProductQuantizer
from tcq_hf.training import objective
from tcq_hf.training.losses import contrastive_loss, diversity_loss, usage_loss, view_similarity
from tcq_hf.training.negatives import image_similarity, negative_filter
from tcq_hf.training.objective import Objective, gather_views

# Losses of order one to ten in float32, sums of at most some hundred terms.
TOLERANCE = 1e-5

BOOKS, WORDS, SUB_DIM = 3, 8, 4


@pytest.fixture
def make(tmp_path):
    """Makes objectives; the arguments that are left out have their defaults."""

    def made(**values):
        given = {"use_cpu": True, "report_to": "none", "negative_filter": "fraction", "temperature": 0.3} | values
        return Objective(TCQTrainingArguments(output_dir=str(tmp_path), **given))

    return made


@pytest.fixture
def quantizer():
    made = ProductQuantizer(BOOKS, WORDS, SUB_DIM, softmax_scale=10.0)
    torch.nn.init.normal_(made.codebooks, generator=torch.Generator().manual_seed(0))
    return made


def output_of(quantizer, vectors):
    """What a model gives for these projected features."""
    embeddings = quantizer.normalize(vectors)
    table = quantizer.lookup_table(embeddings)
    codes = quantizer.codes(table)
    return TCQOutput(embeddings, codes, quantizer.reconstruct(codes), quantizer.assignments(table))


def views_of(images, seed=0):
    """Two views of images, as projected features `[2N, D]`: the second is the first with noise."""
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, images, BOOKS * SUB_DIM, generator=generator)
    return torch.cat([first, first + 0.5 * noise])


def loop(output, quantizer, form, temperature, share, prior=None):
    """The loss of a batch from its definition, pair by pair, in Python floats."""
    books = quantizer.codebooks.detach().double()
    books = books / books.norm(dim=-1, keepdim=True)
    restored = [
        torch.cat([sum(a.item() * word for a, word in zip(book_a, book, strict=True)) for book_a, book in pairs])
        for pairs in (list(zip(row, books, strict=True)) for row in output.assignments)
    ]
    anchors = [row.double() for row in output.embeddings] if form == "cross" else restored

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    views = len(restored)
    images = views // 2
    s = [[cosine(anchor, target) for target in restored] for anchor in anchors]
    alike = [[(s[i][images + j] + s[images + i][j]) / 2 for j in range(images)] for i in range(images)]
    most = math.floor(share * (images - 1) + 1e-9)
    losses = []
    for i in range(views):
        own = i % images
        others = sorted((j for j in range(images) if j != own), key=lambda j: -alike[own][j])
        kept = [math.exp(s[i][j] / temperature) for j in range(views) if j % images in others[most:]]
        positive = math.exp(s[i][(i + images) % views] / temperature)
        total = sum(kept)
        if prior is not None:
            total = max((total - prior * len(kept) * positive) / (1 - prior), len(kept) * math.exp(-1 / temperature))
        losses.append(-math.log(positive / (positive + total)))
    return sum(losses) / views


# --- Loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["soft", "cross"])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("prior", [None, 0.1])
def test_the_loss_equals_the_loop_over_pairs(make, quantizer, form, share, prior):
    made = make(loss_form=form, negative_share=share, debias_prior=prior, temperature=0.4)
    output = output_of(quantizer, views_of(9))
    loss, _ = made(output, quantizer, 0.0, joint=False)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loop(output, quantizer, form, 0.4, share, prior), abs=TOLERANCE)


@pytest.mark.parametrize("form", ["soft", "cross"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"negative_filter": "none"},
        {"negative_filter": "topk", "negative_count": 4},
        {"negative_filter": "threshold", "negative_threshold": 0.1},
        {"negative_filter": "margin", "negative_margin": 0.3},
        {"temperature": 0.1, "debias_prior": 0.2},
    ],
)
def test_the_loss_equals_its_parts_called_by_hand(make, quantizer, form, values):
    output = output_of(quantizer, views_of(12))
    loss, figures = make(loss_form=form, **values)(output, quantizer, 0.0, joint=False)
    restored = quantizer.soft_reconstruct(output.assignments)
    similarity = view_similarity(output.embeddings if form == "cross" else restored, restored)
    names = {f"negative_{name}": name for name in ("share", "count", "threshold", "margin")}
    chosen = negative_filter(
        values.get("negative_filter", "fraction"), **{names[name]: values[name] for name in names if name in values}
    )
    drop = chosen(image_similarity(similarity))
    assert drop.any() == (values.get("negative_filter") != "none")
    expected = contrastive_loss(similarity, values.get("temperature", 0.3), drop, values.get("debias_prior")).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    assert float(figures["dropped_share"]) == pytest.approx(float(drop.sum()) / (12 * 11), abs=1e-6)


@pytest.mark.parametrize("form", ["soft", "cross"])
@pytest.mark.parametrize("images", [2, 16])
def test_equal_images_have_the_logarithm_of_the_kept_terms_as_loss(make, quantizer, form, images):
    # One positive among 1 + 2 x (kept images) equal terms.
    output = output_of(quantizer, torch.ones(2 * images, BOOKS * SUB_DIM))
    loss, _ = make(loss_form=form, negative_share=0.2)(output, quantizer, 0.0, joint=False)
    kept = images - 1 - math.floor(0.2 * (images - 1))
    assert loss.item() == pytest.approx(math.log(1 + 2 * kept), abs=TOLERANCE)


@pytest.mark.parametrize("form", ["soft", "cross"])
def test_the_order_of_the_images_plays_no_part(make, quantizer, form):
    vectors, order = views_of(10), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    made = make(loss_form=form, negative_share=0.3)
    (a, figures), (b, permuted) = (
        made(output_of(quantizer, given), quantizer, 0.0, joint=False)
        for given in (vectors, vectors[torch.cat([order, order + 10])])
    )
    assert a.item() == pytest.approx(b.item(), abs=TOLERANCE)
    assert torch.equal(figures["chosen"], permuted["chosen"])
    for name in ("dropped_share", "embedding_spread"):
        assert float(figures[name]) == pytest.approx(float(permuted[name]), abs=1e-6)


@pytest.mark.parametrize("form", ["soft", "cross"])
def test_the_two_views_are_alike(make, quantizer, form):
    vectors, made = views_of(10), make(loss_form=form)
    outputs = [output_of(quantizer, given) for given in (vectors, vectors.roll(10, 0))]
    losses = [made(output, quantizer, 0.0, joint=False)[0].item() for output in outputs]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


@pytest.mark.parametrize(("epoch", "works"), [(0.0, False), (1.0, False), (1.99, False), (2.0, True), (2.01, True)])
def test_the_filter_works_from_its_epoch_on(make, quantizer, epoch, works):
    output = output_of(quantizer, views_of(12))
    loss, figures = make(clip_start=2.0, negative_share=0.5)(output, quantizer, epoch, joint=False)
    expected, _ = make(negative_share=0.5 if works else 0.0)(output, quantizer, 0.0, joint=False)
    assert loss.item() == expected.item()
    assert float(figures["dropped_share"]) == pytest.approx(5 / 11 if works else 0, abs=1e-6)


def test_with_the_filter_the_loss_is_smaller(make, quantizer):
    output = output_of(quantizer, views_of(12))
    shares = [0.0, 0.2, 0.5, 0.9]
    losses = [make(negative_share=share)(output, quantizer, 0.0, joint=False)[0].item() for share in shares]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_the_regularisers_add_with_their_weights(make, quantizer):
    output = output_of(quantizer, views_of(12))
    bare, _ = make()(output, quantizer, 0.0, joint=False)
    usage = usage_loss(output.assignments.mean(dim=0)).item()
    diversity = diversity_loss(quantizer.normalized_codebooks()).item()
    assert usage < -0.1
    assert diversity > 0.01
    for weights in ((0.5, 0.0), (0.0, 2.0), (0.7, 0.3)):
        loss, _ = make(usage_weight=weights[0], diversity_weight=weights[1])(output, quantizer, 0.0, joint=False)
        expected = bare.item() + weights[0] * usage + weights[1] * diversity
        assert loss.item() == pytest.approx(expected, abs=TOLERANCE)


def test_one_process_is_the_joint_batch(make, quantizer):
    output = output_of(quantizer, views_of(6))
    alone, joint = (make(usage_weight=1.0)(output, quantizer, 0.0, joint=joint)[0] for joint in (False, True))
    assert alone.item() == joint.item()


def test_views_of_all_processes_stay_apart(monkeypatch):
    # Process 0 has the images a and b, process 1 has c, d and e: capital letters are second views.
    names = {"a": 0, "b": 1, "A": 10, "B": 11, "c": 2, "d": 3, "e": 4, "C": 12, "D": 13, "E": 14}
    parts = [torch.tensor([[float(names[letter])] for letter in text]) for text in ("abAB", "cdeCDE")]
    monkeypatch.setattr(objective, "_gather", lambda _: parts)
    assert gather_views(parts[0]).flatten().tolist() == [names[letter] for letter in "abcdeABCDE"]


# --- Figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [2, 3, 11, 31])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.9])
def test_the_dropped_share_is_the_floor_of_the_fraction(make, quantizer, images, share):
    _, figures = make(negative_share=share)(output_of(quantizer, views_of(images)), quantizer, 0.0, joint=False)
    expected = math.floor(round(share * (images - 1), 6)) / (images - 1)
    assert float(figures["dropped_share"]) == pytest.approx(expected, abs=1e-6)


def test_chosen_counts_every_code_of_every_view(make, quantizer):
    output = output_of(quantizer, views_of(20))
    _, figures = make()(output, quantizer, 0.0, joint=False)
    expected = torch.zeros(BOOKS, WORDS, dtype=torch.long)
    for row in output.codes.tolist():
        for book, code in enumerate(row):
            expected[book, code] += 1
    assert torch.equal(figures["chosen"], expected)
    assert figures["chosen"].sum(dim=1).tolist() == [40] * BOOKS


def test_the_spread_is_0_for_one_embedding_and_1_less_1_in_n_for_orthogonal_ones(make, quantizer):
    def spread(embeddings):
        output = output_of(quantizer, torch.ones(len(embeddings), BOOKS * SUB_DIM))
        output.embeddings = embeddings
        return float(make()(output, quantizer, 0.0, joint=False)[1]["embedding_spread"])

    assert spread(torch.ones(8, 12)) == pytest.approx(0, abs=1e-6)
    # n orthogonal embeddings: n of n^2 pairs are a vector with itself.
    assert spread(3 * torch.eye(12)) == pytest.approx(1 - 1 / 12, abs=1e-6)
    assert spread(torch.eye(12)[:4].repeat(2, 1)) == pytest.approx(1 - 1 / 4, abs=1e-6)
    assert spread(torch.cat([torch.eye(12), -torch.eye(12)])) == pytest.approx(1, abs=1e-6)


def test_the_spread_equals_the_loop_over_pairs(make, quantizer):
    output = output_of(quantizer, views_of(7))
    _, figures = make()(output, quantizer, 0.0, joint=False)
    z = output.embeddings.double()
    pairs = [1 - float(F.cosine_similarity(z[i], z[j], dim=0)) for i in range(14) for j in range(14)]
    assert float(figures["embedding_spread"]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_the_figures_need_no_gradient(make, quantizer):
    vectors = views_of(5).requires_grad_()
    loss, figures = make()(output_of(quantizer, vectors), quantizer, 0.0, joint=False)
    assert loss.requires_grad
    assert set(figures) == {"dropped_share", "chosen", "embedding_spread"}
    assert not any(value.requires_grad for value in figures.values())


# --- Batches that teach nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1])
def test_a_batch_without_negatives_is_refused(make, images):
    with pytest.raises(ValueError, match=f"at least 2 images, got {images}.*raise per_device_train_batch_size"):
        make().check_batch(images)


@pytest.mark.parametrize("images", [2, 5, 6])
def test_a_filter_that_leaves_no_negative_is_refused(make, images):
    with pytest.raises(ValueError, match=rf"drops 5 of {images - 1} negatives of a batch of {images} images: none"):
        make(negative_filter="topk", negative_count=5).check_batch(images)


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ({}, 2),
        ({"negative_share": 0.99}, 2),
        ({"negative_filter": "topk", "negative_count": 5}, 7),
        ({"negative_filter": "threshold", "negative_threshold": -1.0}, 2),
        ({"negative_filter": "margin", "negative_margin": 3.0}, 2),
        ({"negative_filter": "none"}, 128),
    ],
)
def test_a_batch_with_a_negative_left_is_taken(make, values, images):
    assert make(**values).check_batch(images) is None


# --- Gradients -------------------------------------------------------------------------------------------------------


def gradients(model, make, processor, pictures, **values):
    """Size of the largest gradient of each tensor of a model, by name, after one backward pass of the loss."""
    pixel_values = processor(pictures[:16], return_tensors="pt")["pixel_values"]
    model.train()
    loss, _ = make(**values)(model(pixel_values=pixel_values), model.quantizer, 0.0, joint=True)
    loss.backward()
    return {
        name: 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("values", [{"loss_form": "soft"}, {"loss_form": "cross"}, {"debias_prior": 0.1}])
def test_defect_1_the_gradient_reaches_backbone_projection_and_every_codebook(model, make, processor, pictures, values):
    found = gradients(model, make, processor, pictures, **values)
    assert {name.split(".")[0] for name in found} == {"backbone", "projection", "quantizer"}
    assert {name for name, largest in found.items() if not largest} == set()
    assert (model.quantizer.codebooks.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(math.isfinite(largest) for largest in found.values())


def test_a_frozen_backbone_gets_no_gradient(model, make, processor, pictures):
    found = gradients(model.freeze_backbone(), make, processor, pictures)
    assert all((largest > 0) == (not name.startswith("backbone.")) for name, largest in found.items())


def test_the_gradient_equals_finite_differences(make, quantizer):
    vectors, step, made = views_of(5).requires_grad_(), 1e-2, make(temperature=1.0, negative_filter="none")

    def loss(given):
        return made(output_of(quantizer, given), quantizer, 0.0, joint=False)[0]

    loss(vectors).backward()
    direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = (loss(vectors + step * direction) - loss(vectors - step * direction)) / (2 * step)
    # Third derivatives of order 10 times step^2 / 6, and 1e-6 / (2 step) of rounding.
    assert float(found) == pytest.approx(float((vectors.grad * direction).sum()), abs=1e-3)
    assert abs(float(found)) > 1e-2


def test_descent_along_the_gradient_lowers_the_loss(make, quantizer):
    vectors, made = views_of(8).requires_grad_(), make()
    loss, _ = made(output_of(quantizer, vectors), quantizer, 0.0, joint=False)
    loss.backward()
    with torch.no_grad():
        quantizer.codebooks -= 0.01 * quantizer.codebooks.grad
        vectors -= 0.01 * vectors.grad
        lower, _ = made(output_of(quantizer, vectors), quantizer, 0.0, joint=False)
    assert lower.item() < loss.item() - 1e-4
