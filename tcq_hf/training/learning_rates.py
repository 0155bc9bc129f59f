"""An optimiser in, the same with the layers of the backbone in groups of their own, at their own learning rates."""

import torch
from timm.optim import param_groups_layer_decay
from torch import nn


def set_backbone_rates(optimizer: torch.optim.Optimizer, backbone: nn.Module, rate: float, layer_decay: float) -> None:
    """Move the parameters of the backbone into groups of their own, one a layer and former group.

    The last layer learns at `rate`, each one before it at `layer_decay` times the rate of the next (BEiT, Bao et al.
    2021, arXiv 2106.08254). timm knows what the layers of its backbones are: the stem, and each block.

    Args:
        optimizer: Its groups keep everything else, and what is decayed stays decayed.
        backbone: A timm model whose trainable parameters are in the optimiser.
        rate: Learning rate of the last layer.
        layer_decay: Above 0; 1 gives all layers the same rate.
    """
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(backbone, layer_decay=layer_decay)
        for parameter in group["params"]
    }
    for group in list(optimizer.param_groups):
        layers: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) in scales:
                layers.setdefault(scales[id(parameter)], []).append(parameter)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]
        for scale, parameters in layers.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": rate * scale})
