"""Average precisions of the same queries under two searches in, their mean difference and its interval out. NumPy."""

from dataclasses import dataclass

import numpy as np

# Draws of queries held at a time.
_DRAWS = 2**22


@dataclass(frozen=True)
class Difference:
    """Mean difference of two searches on the same queries.

    Args:
        mean: First less second.
        low: Lower end of the interval.
        high: Upper end.
        standard_error: Standard deviation of the mean over the draws.
    """

    mean: float
    low: float
    high: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """Percentile interval of the mean difference, over queries drawn with replacement (Efron and Tibshirani 1993).

    The same queries are drawn for both, so that what makes a query hard for both does not widen the interval.

    Args:
        first: Float `[Q]`, average precision of each query; of several runs, their mean.
        second: Float `[Q]`, the same queries in the same order.
        samples: Draws of Q queries.
        seed: Seed of the draws.
        level: Share of the draws in the interval.

    Raises:
        ValueError: If the lengths differ, there is no query, a value is not finite or an option is out of range.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if np.shape(first) != np.shape(second) or differences.ndim != 1 or not len(differences):
        raise ValueError(f"both must be [Q] of the same queries, got {np.shape(first)} and {np.shape(second)}")
    if not np.isfinite(differences).all():
        raise ValueError(f"values must be finite, query {int(np.isfinite(differences).argmin())} is not")
    if samples < 2 or not 0 < level < 1:
        raise ValueError(f"samples must be at least 2 and level between 0 and 1, got {samples} and {level}")
    generator, count, means = np.random.default_rng(seed), len(differences), []
    for start in range(0, samples, step := max(1, _DRAWS // count)):
        drawn = generator.integers(count, size=(min(step, samples - start), count))
        means.append(differences[drawn].mean(axis=1))
    found = np.concatenate(means)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(differences.mean()), float(low), float(high), float(found.std()))
