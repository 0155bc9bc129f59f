"""Vectors and labels in, the ranking of each query and what ties leave open in it out. NumPy only.

A ranking is two ascending arrays: the scores of all rows, and those of the relevant rows alone. Where a row stands in
the database is not in them, so no figure can depend on it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

Ties = Literal["random", "expected"]

# One block of scores: at most 64 MiB of float32.
_QUERIES_AT_ONCE, _SCORES_AT_ONCE = 256, 2**24


class TieGroups(NamedTuple):
    """The rows of equal score around each of some ranks.

    Args:
        ranks: int64 `[P]`, from 1.
        before: int64 `[P]`, rows ahead of the group.
        size: int64 `[P]`, rows in the group.
        hits_before: int64 `[P]`, relevant rows ahead of the group.
        hits: int64 `[P]`, relevant rows in the group.
    """

    ranks: np.ndarray
    before: np.ndarray
    size: np.ndarray
    hits_before: np.ndarray
    hits: np.ndarray


def score_blocks(queries: np.ndarray, rows: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """First query and scores, float32 `[B, R]`, of one block of queries after the other, in one buffer.

    Every product has the same shape, for BLAS may round another shape in another way.
    """
    size = max(1, min(_QUERIES_AT_ONCE, _SCORES_AT_ONCE // count))
    block, scores = np.zeros((size, queries.shape[1]), np.float32), np.empty((size, len(rows)), np.float32)
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        block[: len(part)] = part
        yield start, np.matmul(block, rows.T, out=scores)[: len(part)]


def distinct_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows `[R, D]` in the order of their bytes, place of each row among them `[N]`, copies of each `[R]`."""
    rows = np.ascontiguousarray(vectors + np.float32(0))  # makes -0 a 0
    as_bytes = rows.view(np.dtype((np.void, rows.strides[0]))).ravel()
    distinct, places, copies = np.unique(as_bytes, return_inverse=True, return_counts=True)
    return distinct.view(np.float32).reshape(-1, rows.shape[1]), places, copies


def relevant_rows(labels: np.ndarray, base_labels: np.ndarray, places: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function of the number of a query that gives `places` of the rows that share a label with it."""
    if labels.ndim == 2:
        return lambda query: places[base_labels @ labels[query] > 0]
    order = np.argsort(base_labels, kind="stable")
    by_label, ordered = places[order], base_labels[order]
    starts, ends = (np.searchsorted(ordered, labels, side) for side in ("left", "right"))
    ends[labels < 0] = starts[labels < 0]
    return lambda query: by_label[starts[query] : ends[query]]


def sort_scores(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranking of one query: scores `[N]` of all rows and `[R]` of the relevant ones, ascending."""
    return np.sort(scores), np.sort(scores[relevant])


def without_one(ascending: np.ndarray, score: np.floating) -> np.ndarray:
    """`ascending` without one of its entries equal to `score`; as it is, where there are none."""
    place = np.searchsorted(ascending, score)
    return np.delete(ascending, slice(place, min(place + 1, np.searchsorted(ascending, score, "right"))))


def tie_groups(scores: np.ndarray, hits: np.ndarray, ranks: np.ndarray) -> TieGroups:
    """The groups around `ranks` of a ranking: `scores` `[N]` of all rows and `hits` `[R]` of the relevant ones."""
    # Keys in ascending order are found three times as fast.
    keys = scores[len(scores) - ranks[::-1]]

    def above(ascending: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        return len(ascending) - np.searchsorted(ascending, keys, side)[::-1]

    before, hits_before = above(scores, "right"), above(hits, "right")
    return TieGroups(ranks, before, above(scores, "left") - before, hits_before, above(hits, "left") - hits_before)


def hits_within(groups: TieGroups) -> np.ndarray:
    """Relevant rows among the first, at each rank, float64 `[P]`, on average over the tie orders."""
    return groups.hits_before + groups.hits * (groups.ranks - groups.before) / groups.size


def average_precision(groups: TieGroups, count: int | None, ties: Ties, seed: tuple[int, int] | None = None) -> float:
    """AP at ranks 1 to k over min(k, `count`), or over the relevant rows found where `count` is None."""
    ranks, before, size, hits_before, hits = groups
    if ties == "expected":
        # Of the group's other rows each place ahead of a relevant one holds a relevant one with this probability.
        others = (hits - 1) / np.maximum(1, size - 1)
        precisions = hits / size * (hits_before + 1 + (ranks - before - 1) * others) / ranks
    else:
        hit = draw_hits(groups, seed)
        precisions = hit * np.cumsum(hit) / ranks
    total = hit.sum() if count is None else min(len(ranks), count)
    return float(precisions.sum() / max(1, total))


def draw_hits(groups: TieGroups, seed: tuple[int, int] | None) -> np.ndarray:
    """Whether the row at each of the ranks 1 to k is relevant, bool `[k]`, with ties in random order."""
    ranks, before, size, _, hits = groups
    if not ((hits > 0) & (hits < size)).any():
        return hits > 0
    generator = np.random.default_rng(seed)
    # Of the last group only some rows lie within k.
    last = before == before[-1]
    hits = np.where(last, generator.hypergeometric(hits[-1], size[-1] - hits[-1], last.sum()), hits)
    return (ranks - before <= hits)[np.argsort(before + generator.random(len(ranks)))]


def curve_ranks(rows: int) -> np.ndarray:
    """Ranks evenly spaced in number, for the end, and in logarithm, for the start of the curve."""
    return np.unique(np.rint([np.geomspace(1, rows, 100), np.linspace(1, rows, 100)]).astype(np.int64))
