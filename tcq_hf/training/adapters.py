"""A model and a rank in, the model with low-rank adapters (LoRA) in its backbone out, for `TCQTrainer`.

The adapters are those of peft, in a `PeftModel` as everywhere else in transformers: one made by hand with
`peft.get_peft_model` trains as well. What is saved is a plain `TCQModel` with the adapters merged into its weights, so
that neither loading nor search needs peft; the folder `adapters` of a checkpoint holds what training goes on from.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tcq_hf.index.inference import evaluation_mode
from tcq_hf.model.modeling_tcq import TCQModel

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: TCQModel, rank: int = 8, **config: Any) -> "PeftModel":
    """Freeze the backbone and put an adapter of low rank beside each of its linear layers.

    An adapter adds `B A x` to what its layer makes of x; B starts at zero, so the model is what it was. Projection and
    codebooks stay trainable as a whole. What this returns has all methods of the model; its `merge_and_unload` gives a
    plain `TCQModel`.

    Args:
        model: Best one whose projection and codebooks `initialize` has set.
        rank: Rank of the adapters.
        **config: Further arguments of `peft.LoraConfig`; `lora_alpha` is twice the rank by default.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the rank is below 1 or the backbone has no linear layers.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    check_peft()
    from peft import LoraConfig, get_peft_model

    targets = _linear_layers(model)
    if not targets:
        raise ValueError(
            f"the backbone {model.config.backbone!r} has no linear layers for adapters: train all of it, or none"
        )
    defaults = {"lora_alpha": 2 * rank, "target_modules": targets, "modules_to_save": ["projection", "quantizer"]}
    return get_peft_model(model, LoraConfig(r=rank, **(defaults | config)))


def check_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        ImportError: If it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need peft, which is not installed: pip install 'tcq_hf[peft]'")


def _linear_layers(model: TCQModel) -> list[str]:
    """Names of the linear layers of the backbone that run as modules.

    Some backbones of timm take the weights out of a layer and multiply by themselves: an adapter there would have no
    effect. So one image runs through, and the layers say which of them were called.
    """
    config, called = model.config, []
    linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, layer in linear
        if name.startswith("backbone.")
    ]
    image = torch.zeros(1, config.num_channels, config.image_size, config.image_size, device=model.device)
    with evaluation_mode(model), torch.no_grad():
        model.get_image_features(image)
    for hook in hooks:
        hook.remove()
    return sorted(set(called))
