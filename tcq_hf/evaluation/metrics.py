"""Scores and relevance in, figures out. NumPy only."""

from typing import Literal

import numpy as np


def mean_average_precision(
    scores: np.ndarray,
    relevant: np.ndarray,
    k: int = 1000,
    denominator: Literal["hits", "relevant"] = "hits",
    seed: int = 0,
) -> float:
    """Mean over queries of the average precision of the k best rows, mAP@k.

    `AP@k = sum_{r<=k} P(r) rel(r) / denominator`, where P(r) is the share of relevant rows among the first r. `"hits"`
    divides by the relevant rows found within k (the usual figure of the hashing literature), `"relevant"` by
    min(k, relevant rows in the database). A query without any relevant row counts 0. Equal scores are ordered at random
    by `seed`, never by position: rows with one code have exactly one score.

    Args:
        scores: Float `[Q, N]`, larger is closer.
        relevant: bool `[Q, N]`.
        k: Cut-off; the whole ranking if larger than N.
        denominator: See above.
        seed: Seed of the tie order.

    Raises:
        ValueError: If the shapes differ, k is below 1, a score is NaN or the denominator is unknown.
    """
    scores, relevant = _check(scores, relevant, k)
    if denominator not in ("hits", "relevant"):
        raise ValueError(f"denominator must be 'hits' or 'relevant', got {denominator!r}")
    generator = np.random.default_rng(seed)
    return float(
        np.mean([_average_precision(*row, k, denominator, generator) for row in zip(scores, relevant, strict=True)])
    )


def precision_at_k(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int = 0) -> float:
    """Mean over queries of the share of relevant rows among the k best.

    Args:
        scores: Float `[Q, N]`, larger is closer.
        relevant: bool `[Q, N]`.
        k: Cut-off, at most N.
        seed: Seed of the tie order.
    """
    scores, relevant = _check(scores, relevant, k)
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most {scores.shape[1]}, the rows to rank, got {k}")
    generator = np.random.default_rng(seed)
    return float(
        np.mean([hits[_ranking(row, k, generator)].mean() for row, hits in zip(scores, relevant, strict=True)])
    )


def _check(scores: np.ndarray, relevant: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, relevant = np.asarray(scores), np.asarray(relevant, dtype=bool)
    if scores.ndim != 2 or scores.shape != relevant.shape or not scores.size:
        raise ValueError(f"scores and relevant must have one shape [Q, N], got {scores.shape} and {relevant.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    broken = np.isnan(scores).any(axis=1)
    if broken.any():
        raise ValueError(f"scores must not be NaN, query {int(broken.argmax())} has one")
    return scores, relevant


def _ranking(scores: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    shuffled = generator.permutation(len(scores))
    return shuffled[np.argsort(-scores[shuffled], kind="stable")[:k]]


def _average_precision(
    scores: np.ndarray, relevant: np.ndarray, k: int, denominator: str, generator: np.random.Generator
) -> float:
    hits = relevant[_ranking(scores, k, generator)]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    total = hits.sum() if denominator == "hits" else min(k, relevant.sum())
    return float((precision * hits).sum() / max(1, total))
