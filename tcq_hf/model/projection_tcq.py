"""Backbone features in, embeddings before they are normalized out; where their affine map starts."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Projection(nn.Linear):
    """Affine map of features at one length: each row `[F]` is scaled to root mean square 1 before.

    How long a feature is says little of what a picture shows, and differs between backbones by orders of magnitude.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 `[N, D]` of features `[N, F]`."""
        return super().forward(_at_one_length(features))


def _at_one_length(features: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(features, features.shape[-1:], eps=1e-12)


def rotated_pca(rows: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[D, F]` and bias `[D]` of the centred PCA map followed by a random matrix with orthonormal columns.

    The rows are those of features, at any length; the map is one of rows at one length.
    """
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(16384):
        mean += _at_one_length(block.double()).sum(dim=0) / len(rows)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(16384):
        centred = _at_one_length(block.double()) - mean
        covariance += centred.T @ centred
    rank = min(width, rows.shape[1])
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -rank:].flip(1).T
    # The sign of an eigenvector is arbitrary: fix it, so that one seed gives one map on every machine.
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    weight = _rotation(width, rank, seed).to(rows.device) @ directions
    return weight.float(), -(weight @ mean).float()


def rotated_transform(transform: Any, rows: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[D, F]` and bias `[D]` of a transform, rotated unless it is, for features at root mean square 1."""
    if not callable(getattr(transform, "linear", None)):
        raise TypeError(f"transform must be fitted, with a method linear(), as from fit_chain; got {transform!r:.80}")
    weight, bias = (torch.as_tensor(part, dtype=torch.float64, device=rows.device) for part in transform.linear())
    if weight.shape != (width, rows.shape[1]) or bias.shape != (width,):
        raise ValueError(
            f"transform must take features of width {rows.shape[1]} to embedding_dim={width}, this one has a weight "
            f"{list(weight.shape)} and a bias {list(bias.shape)}"
        )
    if not (weight.isfinite().all() and bias.isfinite().all() and weight.any()):
        raise ValueError("transform must have finite weights, not all of them zero")
    if hasattr(transform, "apply") and not isinstance(transform, nn.Module):
        expected = torch.as_tensor(transform.apply(rows[:1000].cpu().numpy()), device=rows.device).double()
        found = F.normalize(rows[:1000].double(), dim=1) @ weight.T + bias
        if not F.cosine_similarity(found, expected).median() > 0.99:
            raise ValueError(
                "transform depends on the lengths of the features, which the projection does not see: fit it with "
                "Step('l2') as its first step"
            )
    if not getattr(transform, "rotated", False):
        rotation = _rotation(width, width, seed).to(rows.device)
        weight, bias = rotation @ weight, rotation @ bias
    # One learning rate fits weights of one size, here that of orthonormal rows.
    scale = math.sqrt(min(weight.shape)) / weight.norm()
    return (scale * weight).float(), (scale * math.sqrt(rows.shape[1]) * bias).float()


def _rotation(width: int, rank: int, seed: int) -> torch.Tensor:
    """Random matrix with orthonormal columns, float64 `[width, rank]`."""
    gaussian = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q
