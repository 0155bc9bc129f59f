"""Large batches in chunks: the gradient of the whole batch, the same random draws in both passes, bounded memory."""

import copy

import pytest
import torch

from tcq_hf import FeatureCache, TCQModel, TCQOutput
from tcq_hf.training.chunked import in_chunks

# Gradients are sums of at most some thousand float32 terms (2n views, 17 tokens) in another order: each sum is off by
# some 1e-7 of its largest terms, which cancel to a sum some ten times smaller.
CLOSE = 1e-5


@pytest.fixture
def random_model(tiny_config, started):
    """The started model with dropout, stochastic depth and attention dropout."""
    config = copy.deepcopy(tiny_config)
    config.backbone_kwargs = {
        **config.backbone_kwargs,
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "pos_drop_rate": 0.1,
    }
    model = TCQModel(config)
    model.load_state_dict(started.state_dict())
    return model


def batch(run):
    return next(iter(run.get_train_dataloader()))


def gradients(run, inputs):
    """Gradient of every trainable tensor after one training step, and the loss."""
    model, run.current_gradient_accumulation_steps = run.model, 1  # what train() sets before each step
    model.zero_grad()
    loss = run.training_step(model, dict(inputs))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}, loss


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= CLOSE * gradient.abs().max(), name


# --- The gradient of the plain step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("form", ["soft", "cross"])
def test_the_gradient_is_that_of_the_plain_step(trainer, size, form):
    options = {"loss_form": form, "usage_weight": 0.1, "diversity_weight": 0.1, "negative_share": 0.3}
    plain, chunked = trainer(**options), trainer(loss_chunk_size=size, **options)
    inputs = batch(plain)
    expected, loss = gradients(plain, inputs)
    found, same = gradients(chunked, inputs)
    assert float(same) == pytest.approx(float(loss), rel=1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_features_and_their_dropout(trainer, started, dataset, processor, size):
    cache = FeatureCache(dataset, started.freeze_backbone(), processor, views=3)
    plain, chunked = (
        trainer(train_dataset=cache, feature_dropout=0.5, loss_chunk_size=given) for given in (None, size)
    )
    inputs = batch(plain)
    torch.manual_seed(3)
    expected, _ = gradients(plain, inputs)
    torch.manual_seed(3)
    found, _ = gradients(chunked, inputs)
    assert set(found) == {"projection.weight", "projection.bias", "quantizer.codebooks"}
    assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_dropout_and_stochastic_depth_are_the_same_in_both_passes(trainer, random_model, size, monkeypatch):
    # A plain step draws for all rows layer by layer: the reference is the same chunks, all remembered.
    run = trainer(model=random_model, loss_chunk_size=size)
    inputs = batch(run)
    torch.manual_seed(3)
    found, _ = gradients(run, inputs)
    state = torch.get_rng_state()

    def remembered(embed, tensors, rows, _):
        outputs = [embed(*chunk) for chunk in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]
        return TCQOutput(**{name: torch.cat([output[name] for output in outputs]) for name in outputs[0]})

    monkeypatch.setattr("tcq_hf.training.trainer.in_chunks", remembered)
    torch.manual_seed(3)
    expected, _ = gradients(run, inputs)
    assert_close(found, expected)
    # The second pass leaves the random state where the first had brought it.
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    with pytest.raises(AssertionError):
        assert_close(gradients(run, inputs)[0], expected)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_ends_at_the_weights_of_plain_training(trainer, started, accumulated):
    start, other = copy.deepcopy(started.state_dict()), copy.deepcopy(started)
    # Plain gradient descent: Adam's first steps would blow rounding of a tiny gradient up to the learning rate.
    options = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.5,
        "backbone_learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": accumulated,
    }
    trainer(model=started, **options).train()
    trainer(model=other, loss_chunk_size=3, **options).train()
    for name, tensor in started.state_dict().items():
        moved = (tensor - start[name]).abs().max()
        assert moved > 0
        # Four steps, each with the rounding of one gradient and that of adding it to weights of order one.
        assert (other.state_dict()[name] - tensor).abs().max() <= 1e-4 * moved + 4e-7, name


def test_bf16_takes_the_same_autocast_in_both_passes(trainer):
    plain, chunked = trainer(bf16=True), trainer(bf16=True, loss_chunk_size=3)
    inputs = batch(plain)
    expected, _ = gradients(plain, inputs)
    found, _ = gradients(chunked, inputs)
    for name, gradient in expected.items():
        # Weight gradients of a chunk are rounded to the 8 bits of bfloat16 before they are added.
        assert (found[name] - gradient).abs().max() <= 0.05 * gradient.abs().max(), name


def test_gradient_checkpointing_inside_the_chunks(trainer):
    plain, chunked = trainer(), trainer(loss_chunk_size=3)
    inputs = batch(plain)
    expected, _ = gradients(plain, inputs)
    chunked.model.backbone.set_grad_checkpointing()
    assert_close(gradients(chunked, inputs)[0], expected)


# --- What is in memory, what is computed -----------------------------------------------------------------------------


def test_one_chunk_is_remembered_at_a_time():
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows):
            ctx.save_for_backward(rows)
            return rows * rows

        @staticmethod
        def backward(ctx, gradient):
            (rows,) = ctx.saved_tensors
            return 2 * rows * gradient

    weight = torch.ones(4, requires_grad=True)
    alive = []

    def embed(rows):
        hidden = rows * weight
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(hidden.untyped_storage()))
        counts.append(sum(not each.expired() for each in alive))
        return TCQOutput(embeddings=Counted.apply(hidden))

    counts = []
    rows = torch.arange(40.0).view(10, 4)
    in_chunks(embed, (rows,), 2)["embeddings"].sum().backward()
    assert len(alive) == 10  # five chunks, twice
    assert max(counts) <= 2  # the one that runs, and at most the one before it
    torch.testing.assert_close(weight.grad, 2 * rows.square().sum(dim=0))


def test_the_first_pass_keeps_no_graph_of_the_model(started):
    output = in_chunks(lambda pixels: started(pixel_values=pixels), (torch.randn(12, 3, 32, 32),), 2)
    found, ahead = set(), [output.embeddings.grad_fn]
    while ahead:
        node = ahead.pop()
        found.add(node)
        ahead += [following for following, _ in node.next_functions if following not in {None, *found}]
    # The concatenation, and for each of the six chunks its function and the leaf that this hangs on.
    assert len(found) == 1 + 2 * 6


def test_evaluation_runs_through_the_model_once(trainer, dataset, monkeypatch):
    sizes, forward = [], TCQModel.forward
    monkeypatch.setattr(
        TCQModel, "forward", lambda model, pixel_values: sizes.append(len(pixel_values)) or forward(model, pixel_values)
    )
    trainer(loss_chunk_size=2, eval_dataset=dataset.select(range(8))).evaluate()
    assert sizes == [16]


def test_a_step_runs_through_the_model_twice(trainer, monkeypatch):
    sizes, forward = [], TCQModel.forward
    monkeypatch.setattr(
        TCQModel, "forward", lambda model, pixel_values: sizes.append(len(pixel_values)) or forward(model, pixel_values)
    )
    trainer(loss_chunk_size=3, max_steps=1).train()
    assert sizes == [6, 6, 4, 4, 6, 6]


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_sizes_are_refused(arguments, size):
    with pytest.raises(ValueError, match=rf"loss_chunk_size must be at least 1 picture, or None, got {size}"):
        arguments(loss_chunk_size=size)
