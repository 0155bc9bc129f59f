"""A config in, a timm backbone out, with random or pretrained weights."""

from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import nn

from .configuration_tcq import TCQConfig, timm_defaults


def rest_frozen(module: nn.Module) -> None:
    """Put the largest parts without a trainable parameter into evaluation mode."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
    elif not all(parameter.requires_grad for parameter in parameters):
        for child in module.children():
            rest_frozen(child)


def _backbone_arguments(config: TCQConfig) -> dict[str, Any]:
    arguments = dict(config.backbone_kwargs or {}, num_classes=0, in_chans=config.num_channels)
    if timm_defaults(config.backbone).fixed_input_size:
        arguments["img_size"] = config.image_size
    return arguments


def create_backbone(config: TCQConfig) -> nn.Module:
    """The timm backbone that a config names, with random weights; ValueError if it cannot be what the config asks."""
    try:
        backbone = timm.create_model(config.backbone, pretrained=False, **_backbone_arguments(config))
    except TypeError as error:
        raise ValueError(
            f"backbone {config.backbone!r} refuses backbone_kwargs={config.backbone_kwargs}: {error}"
        ) from error
    if config.pooling is not None:
        if not hasattr(backbone, "num_prefix_tokens"):
            raise _impossible(config, "no tokens")
        if config.pooling == "token" and getattr(backbone, "cls_token", None) is None:
            raise _impossible(config, "no class token")
        # A pooling by attention that nothing uses would be weights that nothing trains.
        if getattr(backbone, "attn_pool", None) is not None:
            backbone.attn_pool = None
    return backbone


def _impossible(config: TCQConfig, lack: str) -> ValueError:
    return ValueError(
        f"pooling={config.pooling!r} is impossible for backbone {config.backbone!r}, which has {lack}; "
        "leave pooling unset"
    )


def feature_width(backbone: nn.Module, config: TCQConfig) -> int:
    """Width F of the pooled features."""
    return backbone.head_hidden_size if config.pooling is None else backbone.num_features


def supports_checkpointing(backbone: nn.Module) -> bool:
    """Whether timm can trade the activations of this backbone for a second forward pass."""
    # Some timm models have the method only to assert that they cannot do it.
    try:
        backbone.set_grad_checkpointing(enable=False)
        backbone.set_grad_checkpointing(enable=True)
    except (AssertionError, AttributeError):
        return False
    backbone.set_grad_checkpointing(enable=False)
    return True


def pretrained_backbone(config: TCQConfig, weights: Path | None) -> nn.Module:
    """The backbone with pretrained weights: those of a safetensors file, or timm's from the Hub or its cache."""
    arguments = _backbone_arguments(config)
    if weights is None:
        return timm.create_model(config.backbone, pretrained=True, **arguments)
    return _create_from_file(config.backbone, weights, arguments)


def _create_from_file(name: str, weights: Path, arguments: dict[str, Any]) -> nn.Module:
    if not weights.is_file():
        raise FileNotFoundError(f"weights: no file {weights}")
    if weights.suffix != ".safetensors":
        raise ValueError(f"weights must be a .safetensors file, got {weights.name}")
    try:
        state = load_state_dict(str(weights))
    except Exception as error:
        raise ValueError(f"weights file {weights} is damaged or no safetensors file: {error}") from error
    classifier = timm_defaults(name).classifier or ()
    for head in [classifier] if isinstance(classifier, str) else classifier:
        state.pop(f"{head}.weight", None)
        state.pop(f"{head}.bias", None)
    # With equal class counts on both sides timm loads strictly; otherwise it would only log what does not fit.
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except RuntimeError as error:
        raise ValueError(f"weights file {weights} does not fit backbone {name!r}: {error}") from error
