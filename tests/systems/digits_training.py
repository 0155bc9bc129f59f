"""An encoder of digits learnt with the loss and the filters of the package: a bench of what should leave the loss."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from tcq_hf.evaluation.metrics import evaluate
from tcq_hf.training.losses import contrastive_loss, view_similarity
from tcq_hf.training.negatives import drop_fraction, image_similarity, keep_all, same_group
from tcq_hf.training.pseudo_labels import find_groups

BATCH, TEMPERATURE, WARMUP, EVERY = 128, 0.2, 10, 10


@functools.cache
def figures(seed: int, **way) -> tuple[float, float, float]:
    """What `learn` gives for the digits after 60 epochs."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    return learn(images, labels, seed, 60, **way)


def learn(
    images: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int, share: float = 0.0, **grouping
) -> tuple[float, float, float]:
    """mAP, share of false negatives among those kept and share dropped, of one run."""
    generator = torch.Generator().manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    for layer in (encoder[0], encoder[2]):
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    optimizer, groups = torch.optim.Adam(encoder.parameters(), 1e-3), None
    for epoch in range(epochs):
        if grouping and epoch >= WARMUP and (epoch - WARMUP) % EVERY == 0:
            groups = torch.from_numpy(find_groups(embed(encoder, images), seed, grouping["groups"]))
        kept, wrong, seen = 0, 0, 0
        batches = torch.randperm(len(images), generator=generator).split(BATCH)[:-1]
        for step, rows in enumerate(batches):
            views = torch.cat([view(images[rows], generator) for _ in range(2)])
            vectors = encoder(views.flatten(1))
            similarity = view_similarity(vectors, vectors)
            drop = drop_fraction(image_similarity(similarity), share) if share else keep_all(similarity[:BATCH, :BATCH])
            drop = drop if groups is None else drop | same_group(groups[step % len(groups), rows])
            optimizer.zero_grad()
            contrastive_loss(similarity, TEMPERATURE, drop).mean().backward()
            optimizer.step()
            stays = ~drop & ~torch.eye(BATCH, dtype=torch.bool)
            same = labels[rows][:, None] == labels[rows]
            kept, wrong, seen = kept + int(stays.sum()), wrong + int((stays & same).sum()), seen + BATCH * (BATCH - 1)
    vectors = embed(encoder, images)
    found = evaluate(vectors, vectors, labels.numpy(), labels.numpy(), k=len(labels), exclude_self=True)
    return found.map_strict, wrong / kept, 1 - kept / seen


def view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by up to a pixel with wrap-around, brighter or darker, and noisy."""
    count = len(images)
    down, right = torch.randint(-1, 2, (2, count, 1, 1), generator=generator)
    axis = torch.arange(8)
    shifted = images[torch.arange(count)[:, None, None], (axis[:, None] - down) % 8, (axis - right) % 8]
    gain = 0.8 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    return shifted * gain + 0.15 * torch.randn(shifted.shape, generator=generator)


@torch.no_grad()
def embed(encoder: nn.Module, images: torch.Tensor) -> np.ndarray:
    return F.normalize(encoder(images.flatten(1)), dim=1).numpy()
