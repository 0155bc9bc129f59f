"""Learning rates of the layers of the backbone: per layer, along the schedule, beside weight decay; bad input."""

import copy
import itertools
import re

import pytest
import torch
from transformers import TrainerCallback

from tcq_hf import TCQConfig, TCQModel
from tcq_hf.training.learning_rates import set_backbone_rates


def groups_of(run):
    """The group of the optimiser that each trainable tensor is in, by name."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    found = [(names[id(p)], group) for group in run.create_optimizer().param_groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def depth(name):
    """Layer of a tensor of the tiny ViT, the stem being 0; the last norm belongs to the last block."""
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else 2 if name.startswith("backbone.norm.") else 0


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_each_layer_learns_at_its_share(trainer, started, decay):
    found = groups_of(trainer(backbone_learning_rate=1e-4, layer_decay=decay))
    assert set(found) == set(dict(started.named_parameters()))
    for name, group in found.items():
        expected = 1e-4 * decay ** (2 - depth(name)) if name.startswith("backbone.") else 1e-3
        assert group["lr"] == pytest.approx(expected, rel=1e-12), name


def test_the_ratio_of_two_layers_is_constant_along_the_schedule(trainer):
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append(sorted({group["lr"] for group in optimizer.param_groups if group["params"]}))

    trainer(num_train_epochs=3, warmup_steps=2, layer_decay=0.5, callbacks=[Watch()]).train()
    assert len({head for *_, head in rates}) > 6  # the schedule moves
    for stem, first, last, head in rates[:-1]:  # and ends at zero
        assert first / stem == pytest.approx(2)
        assert last / first == pytest.approx(2)
        assert head / last == pytest.approx(100)


def test_weight_decay_is_what_it_was(trainer, started):
    plain = groups_of(trainer(weight_decay=0.1, model=copy.deepcopy(started)))
    layered = groups_of(trainer(weight_decay=0.1, layer_decay=0.7))
    decays = {name: group["weight_decay"] for name, group in layered.items()}
    assert decays == {name: group["weight_decay"] for name, group in plain.items()}
    assert set(decays.values()) == {0.0, 0.1}


def test_frozen_layers_are_in_no_group(trainer, started):
    started.freeze_backbone().backbone.blocks[-1:].requires_grad_(True)
    found = groups_of(trainer(layer_decay=0.5, backbone_learning_rate=1e-4))
    rates = {group["lr"] for name, group in found.items() if name.startswith("backbone.")}
    assert rates == {1e-4}  # the last block, whose norm is frozen here
    assert not [name for name in found if name.startswith("backbone.blocks.0.")]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_backbones_without_blocks_have_layers_too(name):
    model = TCQModel(TCQConfig(backbone=name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    set_backbone_rates(optimizer, model.backbone, rate=1e-2, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.projection.weight)] == 1.0
    # In the order of the forward pass, each layer twice the one before.
    ordered = list(dict.fromkeys(rates[id(parameter)] for parameter in model.backbone.parameters()))
    assert len(ordered) > 4
    assert ordered == sorted(ordered)
    assert ordered[-1] == 1e-2
    assert {after / before for before, after in itertools.pairwise(ordered)} == {2.0}


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_impossible_decays_are_refused(arguments, decay):
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got"):
        arguments(layer_decay=decay)
