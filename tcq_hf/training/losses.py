"""Vectors of two views in, one loss an anchor out; usage and diversity of codebooks in, regularisers out. torch only.

Rows i and N + i of every `[2N, ...]` tensor are the two views of image i. Everything runs in float32 with autocast off.
"""

import math

import torch
import torch.nn.functional as F

# Where a sum of exponentials or a probability may be 0: its logarithm and the gradient of that stay finite.
_SMALLEST = 1e-30


def view_similarity(anchors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cosine of every anchor with every target.

    Anchors and targets are the soft reconstructions of both views for the soft form (MeCoQ, arXiv 2109.05205), or the
    embeddings and the soft reconstructions for the cross-quantised form (SPQ, ICCV 2021).

    Args:
        anchors: `[2N, D]`, any float dtype.
        targets: `[2N, D]`.

    Returns:
        float32 `[2N, 2N]`, larger is closer.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.float(), dim=1) @ F.normalize(targets.float(), dim=1).T


def contrastive_loss(
    similarity: torch.Tensor,
    temperature: float,
    drop: torch.Tensor | None = None,
    debias_prior: float | None = None,
) -> torch.Tensor:
    """Contrastive loss of every anchor, without the negatives that a filter drops.

    `L_i = -log e^{s_ip / T} / (e^{s_ip / T} + g_i)` with the positive p, the other view of i's image, and the n kept
    negatives j: `g_i = sum_j e^{s_ij / T}`, or debiased with prior rho (Chuang et al., NeurIPS 2020)
    `g_i = max((sum_j e^{s_ij / T} - rho n e^{s_ip / T}) / (1 - rho), n e^{-1 / T})`. An anchor without any negative
    has loss 0.

    Args:
        similarity: float32 `[2N, 2N]`, cosines.
        temperature: T, positive.
        drop: bool `[N, N]`, True where an image leaves the denominator of an anchor image, for all its views; None
            keeps all.
        debias_prior: rho, the probability that a negative is a false one, at least 0 and below 1; None leaves the sum
            as it is.

    Returns:
        float32 `[2N]`.

    Raises:
        ValueError: If a shape, the temperature or the prior is impossible.
    """
    views = len(similarity)
    if similarity.ndim != 2 or similarity.shape[1] != views or views % 2 or not views:
        raise ValueError(f"similarity must have shape [2N, 2N], got {list(similarity.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if debias_prior is not None and not 0 <= debias_prior < 1:
        raise ValueError(f"debias_prior must be at least 0 and below 1, got {debias_prior}")
    images = torch.arange(views, device=similarity.device) % (views // 2)
    left_out = images[:, None] == images
    if drop is not None:
        if drop.shape != (views // 2, views // 2):
            raise ValueError(f"drop must have shape {[views // 2, views // 2]}, got {list(drop.shape)}")
        left_out = left_out | drop.repeat(2, 2)
    logits = similarity.float() / temperature
    positive = logits.diagonal(views // 2)
    positive = torch.cat([positive, logits.diagonal(-(views // 2))])
    negatives = logits.masked_fill(left_out, -math.inf)
    if debias_prior is not None:
        return _debiased(positive, negatives, (~left_out).sum(dim=1), temperature, debias_prior)
    # The positive in the same logsumexp keeps a row without negatives finite, and its gradient too.
    return torch.cat([positive[:, None], negatives], dim=1).logsumexp(dim=1) - positive


def _debiased(
    positive: torch.Tensor, negatives: torch.Tensor, count: torch.Tensor, temperature: float, prior: float
) -> torch.Tensor:
    """Debiased loss `[2N]`; exponentials are taken relative to the largest logit of a row."""
    largest = torch.maximum(positive, negatives.amax(dim=1)).detach()
    own = (positive - largest).exp()
    others = (negatives - largest[:, None]).exp().sum(dim=1)
    floor = count * (-1 / temperature - largest).exp()
    debiased = torch.maximum((others - prior * count * own) / (1 - prior), floor).clamp_min(_SMALLEST)
    return F.softplus(debiased.log() - (positive - largest))


def usage_loss(mean_assignments: torch.Tensor) -> torch.Tensor:
    """Negative entropy of the use of the codewords, averaged over the codebooks: -1 if all are used alike, 0 if one is.

    Args:
        mean_assignments: float32 `[M, K]`, the mean of the assignments over a batch.

    Returns:
        A scalar, to be minimised.
    """
    entropy = torch.special.entr(mean_assignments.clamp_min(_SMALLEST)).sum(dim=1)
    return -entropy.mean() / math.log(mean_assignments.shape[1])


def diversity_loss(codebooks: torch.Tensor) -> torch.Tensor:
    """Mean inner product of any two codewords of a codebook, averaged over the codebooks (Omega_C of MeCoQ).

    `1 / (M K^2) sum_m sum_ij <c_i, c_j> = 1 / M sum_m |mean_k c_k|^2`: it moves the mean of a codebook to zero and
    cannot replace `usage_loss`.

    Args:
        codebooks: float32 `[M, K, d]`, the live parameters, normalised.

    Returns:
        A scalar, to be minimised, at least 0.
    """
    return codebooks.mean(dim=1).square().sum(dim=1).mean()
