"""Similarities of a batch in, a mask of the negatives that leave the denominator out. torch only.

A negative filter takes the similarities of N images, float `[N, N]`, detached, row = anchor, and gives a bool `[N, N]`:
True where the image is dropped from the anchor's denominator. Its diagonal is False: the positive is never dropped.
Larger similarity is closer. `same_group` gives such a mask from the groups of the images (`pseudo_labels.py`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch

NegativeFilter = Callable[[torch.Tensor], torch.Tensor]
FilterName = Literal["auto", "none", "fraction", "topk", "threshold", "margin"]


def negative_filter(
    name: FilterName, *, share: float = 0.1, count: int = 0, threshold: float = 1.0, margin: float = 0.0
) -> NegativeFilter:
    """The filter of a name, with the one value that it uses.

    Args:
        name: `"none"`, `"fraction"` (uses `share`), `"topk"` (`count`), `"threshold"` (`threshold`), `"margin"`
            (`margin`), or `"auto"`, where similarities of a batch drop none: `same_group` does.
        share: Share of the negatives to drop, at least 0 and below 1.
        count: Number of negatives to drop, at least 0.
        threshold: Similarity above which a negative is dropped, -1 to 1.
        margin: A negative is dropped when it is less than this below the positive, at least 0.

    Raises:
        ValueError: For an unknown name or a value out of its range.
    """
    if name not in get_args(FilterName):
        raise ValueError(f"negative_filter must be one of {', '.join(get_args(FilterName))}, got {name!r}")
    if not 0 <= share < 1:
        raise ValueError(f"negative_share must be at least 0 and below 1, got {share}")
    if count < 0:
        raise ValueError(f"negative_count must be at least 0, got {count}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"negative_threshold must be a cosine from -1 to 1, got {threshold}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"negative_margin must be at least 0 and finite, got {margin}")
    return {
        "auto": keep_all,
        "none": keep_all,
        "fraction": partial(drop_fraction, share=share),
        "topk": partial(drop_topk, count=count),
        "threshold": partial(drop_above, threshold=threshold),
        "margin": partial(drop_near_positive, margin=margin),
    }[name]


def image_similarity(similarity: torch.Tensor) -> torch.Tensor:
    """Mean of the two cross-view cosines of every two images, detached: what the filters look at.

    Args:
        similarity: float `[2N, 2N]`, cosines of all views; row and column i and N + i are the views of image i.

    Returns:
        float `[N, N]`; the diagonal holds each image's positive.
    """
    count = len(similarity) // 2
    similarity = similarity.detach()
    return (similarity[:count, count:] + similarity[count:, :count]) / 2


def keep_all(similarity: torch.Tensor) -> torch.Tensor:
    """No negative is dropped: plain contrastive learning."""
    return torch.zeros_like(similarity, dtype=torch.bool)


def same_group(groups: torch.Tensor) -> torch.Tensor:
    """Negatives of the anchor's own group are dropped; an anchor may lose all.

    Args:
        groups: int64 `[N]`, -1 for an image that is of no group.

    Returns:
        bool `[N, N]`.
    """
    same = (groups[:, None] == groups) & (groups >= 0)
    return same & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)


def drop_topk(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` most similar negatives of each anchor are dropped.

    Raises:
        ValueError: If no negative would be left.
    """
    negatives = len(similarity) - 1
    if count >= max(negatives, 1):
        raise ValueError(
            f"the negative filter drops {count} of {negatives} negatives of a batch of {len(similarity)} images: "
            "none is left; lower negative_count or negative_share, or raise the batch size"
        )
    drop = keep_all(similarity)
    closest = _without_positive(similarity).topk(count, dim=1).indices
    return drop.scatter_(1, closest, True)


def drop_fraction(similarity: torch.Tensor, share: float) -> torch.Tensor:
    """The most similar floor(share (N - 1)) negatives of each anchor are dropped."""
    # A share like 0.1 has no exact float: 0.1 of 30 negatives are three.
    return drop_topk(similarity, math.floor(share * (len(similarity) - 1) + 1e-9))


def drop_above(similarity: torch.Tensor, threshold: float) -> torch.Tensor:
    """Negatives with a similarity above the threshold are dropped; an anchor may lose all."""
    return _without_positive(similarity) > threshold


def drop_near_positive(similarity: torch.Tensor, margin: float) -> torch.Tensor:
    """Negatives with a similarity above the anchor's own positive, less the margin, are dropped."""
    return _without_positive(similarity) > similarity.diagonal()[:, None] - margin


def _without_positive(similarity: torch.Tensor) -> torch.Tensor:
    positive = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(positive, -math.inf)
