"""Vectors in, the graph of their nearest neighbours and how well it hangs together out. NumPy, SciPy and torch only."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

# One block of scores: 64 MiB of float32.
_SCORES_AT_ONCE = 2**24
# Rows whose paths of two edges are held at a time.
_ROWS_AT_ONCE = 8192
# Above the rounding of a cosine in float32, below any difference that means something.
_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class KNNGraph:
    """The k nearest neighbours of each of n rows; no row is its own neighbour.

    Args:
        neighbours: int64 `[n, k]`, best first.
        scores: float32 `[n, k]`, inner products, larger is closer.

    Raises:
        ValueError: If the shapes differ, a neighbour is no row, or a row its own neighbour.
    """

    neighbours: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        shape, rows = self.neighbours.shape, np.arange(len(self.neighbours))
        if len(shape) != 2 or shape != self.scores.shape:
            raise ValueError(f"neighbours and scores must have one shape [n, k], got {shape} and {self.scores.shape}")
        wrong = (self.neighbours < 0) | (self.neighbours >= shape[0]) | (self.neighbours == rows[:, None])
        if wrong.any():
            raise ValueError(
                f"neighbours must be other rows, from 0 to {shape[0] - 1}, those of row {wrong.any(axis=1).argmax()} "
                "are not"
            )

    @classmethod
    def build(cls, vectors: np.ndarray, k: int, seed: int = 0) -> "KNNGraph":
        """Exact nearest neighbours by cosine, the inner product of rows scaled to unit norm.

        Scores within 1e-6 are a tie, and each row draws the order of its ties. Were it the order of the rows, equal
        vectors would all name the same neighbours, and vectors that are all equal would make the best graph of all.

        Args:
            vectors: Float `[n, D]`, compared in float32; a row of zeros has score 0 with all others.
            k: Neighbours of a row, from 1 to n - 1.
            seed: Seed of the order of ties.

        Raises:
            ValueError: If shape, type or k is impossible, or a row is not finite or too long for float32.
        """
        rows = F.normalize(_checked(vectors, k), dim=1)
        n = len(rows)
        generator = torch.Generator().manual_seed(seed)
        # A row draws where in one list of random numbers it begins: a number for each pair would take most of the time.
        drawn = (_TIE * torch.rand(2 * n, generator=generator)).unfold(0, n, 1)
        begins = torch.randperm(n, generator=generator)
        neighbours, scores = [], []
        for start in range(0, n, step := max(1, _SCORES_AT_ONCE // n)):
            block = rows[start : start + step] @ rows.T
            own = torch.arange(len(block))
            block[own, start + own] = -torch.inf
            # Cosines of equal vectors are near 1, where float32 is too coarse for what is added; near 0 it is not.
            best = (block - 1).add_(drawn[begins[start : start + step]]).topk(k, dim=1).indices
            neighbours.append(best)
            scores.append(block.gather(1, best))
        return cls(torch.cat(neighbours).numpy(), torch.cat(scores).numpy())

    def adjacency(self, mutual: bool = False) -> sparse.csr_array:
        """Edges between rows that name each other, symmetric float32 `[n, n]`: scores, negative ones as 0.

        An edge of score 0 keeps the smallest normal number as its weight: sparse arithmetic would drop a zero, and with
        it the edge, while so small a number changes no sum.

        Args:
            mutual: Only where both name the other; by default where one does.
        """
        directed = _rows_to(self.neighbours, np.maximum(self.scores, np.finfo(np.float32).tiny))
        return directed.minimum(directed.T).tocsr() if mutual else directed.maximum(directed.T).tocsr()


def quality(graph: KNNGraph, kind: Literal["authority", "reciprocal"] = "authority") -> float:
    """How well neighbourhoods agree with those of their members: the effectiveness of a search, without labels.

    N_q is q itself followed by its neighbours, so k, its size, is one more than the neighbours that the graph holds:
    the usual k = 20 is a graph of 19. Authority is `1 / (n k^2) sum_q sum_{i in N_q} |N_i n N_q|`, at most 1.
    Reciprocal counts each j of the intersection as one over its position in N_q, so that it is at most
    `(1 + 1/2 + ... + 1/k) / k` (Valem and Pedronette, PRL 2020). Only figures of one k on one set of rows compare.

    Args:
        graph: Neighbours of each row.
        kind: Which of both.

    Raises:
        ValueError: For another kind.
    """
    if kind not in ("authority", "reciprocal"):
        raise ValueError(f"kind must be 'authority' or 'reciprocal', got {kind!r}")
    n = len(graph.neighbours)
    ranked = np.concatenate([np.arange(n)[:, None], graph.neighbours], axis=1)
    k = ranked.shape[1]
    weights = np.ones(k) if kind == "authority" else 1 / np.arange(1, k + 1)
    members, weighted = _rows_to(ranked, np.ones((n, k))), _rows_to(ranked, np.tile(weights, (n, 1)))
    total = 0.0
    for start in range(0, n, _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        # Entry (q, j) of the product counts the i in N_q that have j in N_i.
        total += weighted[block].multiply(members[block] @ members).sum()
    return float(total / (n * k * k))


def _rows_to(columns: np.ndarray, values: np.ndarray) -> sparse.csr_array:
    """Sparse `[n, n]` with `values` `[n, k]` at `columns` `[n, k]` of each row."""
    n, k = columns.shape
    return sparse.csr_array((values.ravel(), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))


def _checked(vectors: np.ndarray, k: int) -> torch.Tensor:
    """Vectors as float32 `[n, D]`."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind != "f":
        raise ValueError(
            f"vectors must be float [n, D], codes restored first, got {vectors.dtype} {list(vectors.shape)}"
        )
    if not 1 <= k < len(vectors):
        raise ValueError(f"k must be from 1 to {len(vectors) - 1}, the other rows, got {k}")
    rows = torch.from_numpy(vectors.astype(np.float32))
    fit = rows.norm(dim=1).isfinite()
    if not fit.all():
        raise ValueError(f"vectors must be finite and shorter than 1e19, row {int((~fit).nonzero()[0])} is not")
    return rows
