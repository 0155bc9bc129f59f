"""bf16 and torch.compile through the Trainer: what they train, save and evaluate, against float32 without either."""

import copy
import shutil

import pytest
import torch

from tcq_hf import TCQModel

compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler, g++ or clang++"
)


@pytest.fixture
def flat(tiny_config, started):
    """The started model with one block: what is compiled takes seconds a block."""
    config = copy.deepcopy(tiny_config)
    config.backbone_kwargs = {**config.backbone_kwargs, "depth": 1}
    model = TCQModel(config)
    model.load_state_dict(started.state_dict(), strict=False)
    return model


@pytest.mark.parametrize(
    ("options", "close"),
    [
        # bfloat16 has 8 bits, and a loss of about 2 is the difference of logarithms of sums of order ten.
        ({"bf16": True}, 0.05),
        pytest.param({"torch_compile": True, "loss_chunk_size": 4}, 1e-4, marks=compiler),
    ],
)
def test_two_steps_evaluation_and_checkpoint(trainer, flat, dataset, tmp_path, options, close):
    plain, fast = copy.deepcopy(flat), copy.deepcopy(flat)
    shared = {"max_steps": 2, "eval_dataset": dataset, "per_device_eval_batch_size": 32}
    reference = trainer(model=plain, **shared)
    reference.train()
    run = trainer(model=fast, save_strategy="steps", save_steps=1, **shared, **options)
    run.train()
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (reference, run)]
    assert losses[1] == pytest.approx(losses[0], rel=close)
    for name, tensor in fast.state_dict().items():
        assert not torch.equal(tensor, flat.state_dict()[name]), name
        assert tensor.dtype == torch.float32
    figures = [each.evaluate() for each in (reference, run)]
    for name in ("eval_loss", "eval_quantization_error"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=close)
    # The checkpoint knows nothing of how it was trained, and training goes on from it.
    saved = TCQModel.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fast.state_dict().items())
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fast.state_dict().items())
