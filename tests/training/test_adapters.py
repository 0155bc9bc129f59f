"""Adapters in the backbone: what is trained, what is saved, resuming; the user's own peft model; bad input."""

import copy
import importlib.util
import subprocess
import sys

import numpy as np
import peft
import pytest
import timm
import torch

from tcq_hf import FeatureCache, TCQConfig, TCQModel, encode_dataset, hub
from tcq_hf.training.adapters import add_lora

LOADED_WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import numpy as np
from tcq_hf import TCQImageProcessor, TCQModel
model = TCQModel.from_pretrained(sys.argv[1]).eval()
pixel_values = np.load(sys.argv[2])
import torch
with torch.inference_mode():
    np.save(sys.argv[3], model(pixel_values=torch.from_numpy(pixel_values)).embeddings.numpy())
"""


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def embeddings(model, pixel_values):
    with torch.inference_mode():
        return model.eval()(pixel_values=pixel_values).embeddings


@pytest.fixture
def pixel_values(processor, pictures):
    return processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.fixture
def adapted(started):
    torch.manual_seed(1)
    return add_lora(started, rank=2)


# Adapters learn nothing in one step (B is zero at its start, so A gets no gradient), hence two; and fast, to be seen.
FAST = {"max_steps": 2, "backbone_learning_rate": 1e-2, "lr_scheduler_type": "constant"}


# --- What is trained -------------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing(started, pixel_values):
    before = embeddings(started, pixel_values)
    assert torch.equal(before, embeddings(add_lora(started, rank=2), pixel_values))


def test_adapters_projection_and_codebooks_are_trained_alone(trainer, adapted):
    before = weights(adapted)
    trainer(model=adapted, **FAST).train()
    moved = changed(before, weights(adapted))
    assert moved == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    own = {name for name in moved if ".lora_" in name}
    assert {name.rsplit(".modules_to_save.default.")[0] for name in moved - own} == {
        "base_model.model.projection",
        "base_model.model.quantizer",
    }
    # qkv, proj and both layers of the MLP, of two blocks, A and B of each.
    assert len(own) == 4 * 2 * 2
    assert {parameter.shape[0] for name, parameter in adapted.named_parameters() if ".lora_A." in name} == {2}


def test_layers_that_the_backbone_multiplies_by_itself_get_no_adapter(trainer, tiny_config):
    config = TCQConfig(
        **{**tiny_config.to_dict(), "backbone": "beit_base_patch16_224"}
        | {"backbone_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}}
    )
    adapted = add_lora(TCQModel(config), rank=2)
    before = weights(adapted)
    trainer(model=adapted, **FAST).train()
    moved = changed(before, weights(adapted))
    assert moved == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not [name for name in moved if "qkv" in name]
    assert [name for name in moved if "attn.proj" in name]


def test_adapters_learn_at_a_tenth_by_default(trainer, adapted):
    run = trainer(model=adapted, learning_rate=1e-3, weight_decay=0.1)
    groups = run.create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1e-4 if ".lora_" in name else 1e-3)
    (group,) = [each for each in groups if any(p is run.core.quantizer.codebooks for p in each["params"])]
    assert group["weight_decay"] == 0.0


def test_more_fields_of_the_adapters(started):
    adapted = add_lora(started, 3, lora_alpha=5, lora_dropout=0.1, target_modules=["qkv"])
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 5, 0.1, {"qkv"})


def test_large_batches_neighbours_and_evaluation(trainer, adapted, dataset):
    found = {"negative_filter": "auto", "positives": "neighbours"}
    run = trainer(model=adapted, eval_dataset=dataset, loss_chunk_size=3, eval_strategy="epoch", bf16=True, **found)
    run.train()
    assert {"eval_map", "eval_loss"} <= set(run.evaluate())


# --- What is saved ---------------------------------------------------------------------------------------------------


def test_the_saved_model_is_plain_and_encodes_as_the_trained_one(
    trainer, adapted, started, processor, pixel_values, tmp_path
):
    start = embeddings(adapted, pixel_values)
    run = trainer(model=adapted, **FAST)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    trained = embeddings(adapted, pixel_values)
    plain = hub.save(TCQModel(started.config), processor, tmp_path / "plain")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in plain.iterdir()} | {"training_args.bin"}
    np.save(tmp_path / "pixels.npy", pixel_values.numpy())
    places = [str(tmp_path / name) for name in ("saved", "pixels.npy", "found.npy")]
    subprocess.run([sys.executable, "-c", LOADED_WITHOUT_PEFT, *places], check=True, capture_output=True)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    # W + BA is rounded once to 24 bits instead of two products being added: a few 1e-7 a layer, eight layers.
    assert (found - trained).abs().max() < 2e-5
    assert (start - trained).abs().max() > 1e-3
    merged = hub.merged(adapted)
    assert type(merged) is TCQModel
    assert not changed(weights(merged), weights(TCQModel.from_pretrained(tmp_path / "saved")))
    assert isinstance(adapted, peft.PeftModel)  # and goes on as it was
    assert torch.equal(embeddings(adapted, pixel_values), trained)


def test_hub_save_and_encode_dataset_take_a_model_with_adapters(trainer, adapted, processor, dataset, tmp_path):
    trainer(model=adapted, **FAST).train()
    loaded = TCQModel.from_pretrained(hub.save(adapted, processor, tmp_path / "saved"))
    columns = [
        encode_dataset(dataset, model, processor, embeddings=True).with_format("numpy") for model in (adapted, loaded)
    ]
    one, other = (np.float32(each["embedding"][:]) for each in columns)
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_plain_model_is_merged_already(started):
    assert hub.merged(started) is started


# --- Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 5])
def test_resumed_training_ends_at_the_weights_of_an_uninterrupted_run(trainer, started, tmp_path, stop, stop_at):
    def made():
        torch.manual_seed(1)
        return add_lora(copy.deepcopy(started), rank=2, lora_dropout=0.2)

    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1000, "backbone_learning_rate": 1e-2}
    whole, resumed = made(), made()
    trainer(model=whole, **options).train()
    cut = str(tmp_path / "cut")
    trainer(model=made(), callbacks=[stop_at(stop)], output_dir=cut, **options).train()
    trainer(model=resumed, output_dir=cut, **options).train(resume_from_checkpoint=True)
    assert changed(weights(whole), weights(resumed)) == set()
    # A checkpoint is also a plain model of its own.
    checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    assert type(TCQModel.from_pretrained(checkpoint)) is TCQModel
    assert (checkpoint / "adapters" / "adapter_model.safetensors").is_file()


def test_the_best_checkpoint_is_loaded(trainer, adapted, dataset, tmp_path):
    run = trainer(
        model=adapted,
        num_train_epochs=3,
        eval_dataset=dataset,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="quantization_error",
        greater_is_better=False,
        learning_rate=1e-2,
    )
    run.train()
    best = TCQModel.from_pretrained(run.state.best_model_checkpoint)
    assert run.state.best_model_checkpoint != str(tmp_path / "run" / "checkpoint-12")
    assert not changed(weights(hub.merged(adapted)), weights(best))


# --- The user's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [["projection", "quantizer"], None])
def test_a_model_from_get_peft_model_trains_and_saves(trainer, started, pixel_values, tmp_path, saved):
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=saved)
    adapted = peft.get_peft_model(started, config)
    before = weights(adapted)
    run = trainer(model=adapted, **FAST)
    run.train()
    moved = changed(before, weights(adapted))
    assert moved == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("codebooks" in name for name in moved) == bool(saved)
    run.save_model(str(tmp_path / "saved"))
    loaded = TCQModel.from_pretrained(tmp_path / "saved")
    assert (embeddings(loaded, pixel_values) - embeddings(adapted, pixel_values)).abs().max() < 2e-5


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_without_peft_the_pip_line_is_given(started, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ImportError, match=r"adapters need peft, which is not installed: pip install 'tcq_hf\[peft\]'"):
        add_lora(started)


@pytest.mark.parametrize("rank", [0, -1])
def test_impossible_ranks_are_refused(started, rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        add_lora(started, rank)


def test_a_backbone_without_linear_layers_is_refused():
    assert not [m for m in timm.create_model("test_resnet", num_classes=0).modules() if isinstance(m, torch.nn.Linear)]
    with pytest.raises(ValueError, match="the backbone 'test_resnet' has no linear layers for adapters"):
        add_lora(TCQModel(TCQConfig(backbone="test_resnet", image_size=64)))


def test_adapters_that_could_not_be_saved_are_refused_before_training(trainer, started, processor, tmp_path):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"]), started)
    for refused in (lambda: hub.save(started, processor, tmp_path / "saved"), lambda: trainer(model=started)):
        with pytest.raises(ValueError, match=r"pass the PeftModel that peft.get_peft_model or .*add_lora gives"):
            refused()
    assert not (tmp_path / "saved").exists()


def test_features_of_a_frozen_backbone_do_not_train_adapters(trainer, started, dataset, processor):
    cache = FeatureCache(dataset, started.freeze_backbone(), processor)
    with pytest.raises(ValueError, match="a FeatureCache holds the features of a frozen backbone"):
        trainer(model=add_lora(started, 2), train_dataset=cache)
