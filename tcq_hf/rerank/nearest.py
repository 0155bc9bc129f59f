"""Vectors in, the exact nearest of each by cosine out, ties in an order that each row draws. NumPy and torch only."""

import numpy as np
import torch

# One block of scores: 64 MiB of float32.
_SCORES_AT_ONCE = 2**24
# Above the rounding of a cosine in float32, below any difference that means something.
TIE = 1e-6


def nearest(
    rows: torch.Tensor, base: torch.Tensor, k: int, own: torch.Tensor | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `base` `[n, D]` to each row, int64 and float32 `[m, k]`.

    Args:
        rows: float32 `[m, D]` of unit norm.
        base: float32 `[n, D]` of unit norm.
        k: Neighbours of a row, at most n, and n - 1 where rows are in the base.
        own: Number in the base of each row, int64 `[m]`, which is not its own neighbour; None where the rows are not in
            it.
        seed: Seed of the order of ties, scores within 1e-6.
    """
    n = len(base)
    generator = torch.Generator().manual_seed(seed)
    # A row draws where in one list of random numbers it begins: a number for each pair would take most of the time.
    drawn = (TIE * torch.rand(2 * n, generator=generator)).unfold(0, n, 1)
    if own is None:
        begins = torch.randint(n + 1, (len(rows),), generator=generator)
    else:
        begins = torch.randperm(n, generator=generator)[own]
    neighbours, scores = [], []
    for start in range(0, len(rows), step := max(1, _SCORES_AT_ONCE // n)):
        block = rows[start : start + step] @ base.T
        if own is not None:
            block[torch.arange(len(block)), own[start : start + step]] = -torch.inf
        # Cosines of equal vectors are near 1, where float32 is too coarse for what is added; near 0 it is not.
        best = (block - 1).add_(drawn[begins[start : start + step]]).topk(k, dim=1).indices
        neighbours.append(best)
        scores.append(block.gather(1, best))
    return torch.cat(neighbours).numpy(), torch.cat(scores).numpy()


def checked_vectors(vectors: np.ndarray) -> torch.Tensor:
    """Vectors as float32 `[n, D]`."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind != "f":
        raise ValueError(
            f"vectors must be float [n, D], codes restored first, got {vectors.dtype} {list(vectors.shape)}"
        )
    rows = torch.from_numpy(vectors.astype(np.float32))
    fit = rows.norm(dim=1).isfinite()
    if not fit.all():
        raise ValueError(f"vectors must be finite and shorter than 1e19, row {int((~fit).nonzero()[0])} is not")
    return rows
