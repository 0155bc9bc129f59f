"""Ranked lists of several rankers in, one list out; and which rankers to fuse, found without labels.

A ranker is whatever answers a query with a list: another model, layer, pooling or number of bits. Lists are pairs
`(scores, ids)` as FAISS gives them, `[Q, k]`, each of a k of its own.
"""

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

from .graph import KNNGraph, quality, rows_to
from .lists import check_lists

logger = logging.getLogger(__name__)

Ranking = tuple[np.ndarray, np.ndarray]
Lists = Sequence[Ranking]
Graphs = Mapping[Any, KNNGraph] | Sequence[KNNGraph]

# Places that are sorted at a time: about 50 MiB. Sets of rankers that grow by one more.
_PLACES_AT_ONCE, _SETS_KEPT = 2**20, 100


def reciprocal_rank_fusion(lists: Lists, k: int | None = None, constant: float = 60) -> tuple[np.ndarray, np.ndarray]:
    """Each list gives the row at its place r, counted from 1, `1 / (constant + r)` points (Cormack et al., SIGIR 2009).

    Scores play no part, so that lists of any scale fuse. Rows of equal points stand in the order of the first list,
    those that are not in it behind, by number.

    Args:
        lists: Scores and ids `[Q, k_j]` of each ranker, for the same queries and gallery, best first; -1 is no row.
        k: Rows to give; by default as many as the longest list has.
        constant: The larger, the less the first places stand out; 60 is the paper's.

    Returns:
        Points float32 `[Q, k]`, -inf where there is no row, and ids int64 `[Q, k]`, -1 there.

    Raises:
        TypeError: If ids are no integers or scores no numbers.
        ValueError: If there is no list, shapes differ, a list is impossible, or k or constant is out of range.
    """
    checked, k = _checked(lists, k)
    if not 0 <= constant < math.inf:
        raise ValueError(f"constant must be at least 0 and finite, got {constant}")
    points = [np.broadcast_to(1 / (constant + np.arange(1, ids.shape[1] + 1)), ids.shape) for _, ids in checked]
    return _fused([ids for _, ids in checked], points, k)


def combined_sum(lists: Lists, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of scores (CombSUM of Fox and Shaw, TREC-2 1994), each list scaled to between 0, its last row, and 1.

    Scores of different codes have different ranges, and unscaled the widest would decide. Scaled for each query by the
    largest and the smallest score of its list (Lee, SIGIR 1997) they keep the gaps that `reciprocal_rank_fusion`
    forgets. A row counts 0 for a list that does not have it; rows of a list whose scores are all equal count 1 each.
    The order of equal sums is that of `reciprocal_rank_fusion`.

    Args:
        lists: Scores and ids `[Q, k_j]` of each ranker, for the same queries and gallery, best first; -1 is no row.
        k: Rows to give; by default as many as the longest list has.

    Returns:
        Sums float32 `[Q, k]`, -inf where there is no row, and ids int64 `[Q, k]`, -1 there.

    Raises:
        TypeError: If ids are no integers or scores no numbers.
        ValueError: If there is no list, shapes differ, a list is impossible, a score is infinite or larger than the one
            before it, as distances are, or k is out of range.
    """
    checked, k = _checked(lists, k)
    points = [_scaled(number, *each) for number, each in enumerate(checked)]
    return _fused([ids for _, ids in checked], points, k)


@dataclass(frozen=True)
class Fusion:
    """Further indexes that a search asks too, and how their lists become one.

    Args:
        others: Maps the name of each further index to the model and the image processor that made its codes.
        combine: Lists and k in, fused scores and ids out: `reciprocal_rank_fusion`, `combined_sum` or one's own.

    Raises:
        ValueError: If there is no further index, or one without model and processor.
    """

    others: Mapping[str, tuple[Any, Any]]
    combine: Callable[[Lists, int], tuple[np.ndarray, np.ndarray]] = reciprocal_rank_fusion

    def __post_init__(self) -> None:
        if not self.others or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.others.values()):
            raise ValueError(f"others must map names of indexes to (model, processor) each, got {list(self.others)}")

    def __call__(
        self,
        ask: Callable[[str, Any, Any], tuple[np.ndarray, np.ndarray]],
        scores: np.ndarray,
        ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fused scores and ids `[Q, k]`; `ask(name, model, processor)` gives those of another index."""
        asked = [ask(name, model, processor) for name, (model, processor) in self.others.items()]
        return self.combine([(scores, ids), *asked], ids.shape[1])


def rank_correlation(first: KNNGraph, second: KNNGraph, p: float = 0.9, depth: int = 20) -> float:
    """Rank-biased overlap of two rankers' neighbour lists (Webber et al., TOIS 2010), cut at `depth`, mean of all rows.

    A list is the row itself followed by its neighbours. The overlap is `(1 - p) sum_{j <= depth} p^(j - 1) c_j / j`,
    where c_j rows are among the first j of both; so equal lists have `1 - p^depth`, and lists that share the row itself
    alone have not quite nothing. Places without a neighbour overlap with nothing.

    Args:
        first: Neighbours of each row by one ranker.
        second: The same rows, by another.
        p: How much a place counts against the one before it, between 0 and 1.
        depth: Places of a list that are compared, at most one more than the neighbours in either graph.

    Raises:
        ValueError: If the graphs have different numbers of rows, or p or depth is out of range.
    """
    longest = 1 + min(graph.neighbours.shape[1] for graph in (first, second))
    if len(first) != len(second):
        raise ValueError(f"both graphs must be of the same rows, got {len(first)} and {len(second)}")
    if not 1 <= depth <= longest:
        raise ValueError(f"depth must be from 1 to {longest}, a row and its neighbours, got {depth}")
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    ranks = np.arange(1, depth + 1)
    # A row at places a and b counts at every depth from the larger on.
    weights = np.cumsum(((1 - p) * p ** (ranks - 1) / ranks)[::-1])[::-1]
    one, other = _places(first, depth), _places(second, depth)
    later = one.multiply(other.astype(bool)).maximum(other.multiply(one.astype(bool)))
    return float(weights[later.data - 1].sum() / len(first))


def select(graphs: Graphs, size: int = 2, beta: float = -1.0) -> list[Any]:
    """The rankers to fuse: those of the best set of `selection_scores`, whose score is logged.

    Args:
        graphs: Graph of the same rows by each ranker, by name or in a sequence, each of the same number of neighbours.
        size: Rankers to choose.
        beta: See `selection_scores`.

    Returns:
        Names, or numbers in the sequence, by descending quality.
    """
    chosen, score = next(iter(selection_scores(graphs, size, beta).items()))
    logger.info("of %d rankers chosen: %s, score %.4f", len(graphs), ", ".join(map(str, chosen)), score)
    return list(chosen)


def selection_scores(graphs: Graphs, size: int = 2, beta: float = -1.0) -> dict[tuple[Any, ...], float]:
    """Scores of sets of rankers, best first, without labels (after Valem and Pedronette, PRL 2020 and USRF 2020).

    A pair scores `quality_a quality_b / (1 + correlation)^beta`: `quality` by authority, `rank_correlation` over whole
    lists. The union of two sets that share all but one member scores their sum, the largest where there are
    several; of all sets of one size the hundred best seek a partner. One ranker alone scores its quality.

    Args:
        graphs: Graph of the same rows by each ranker, by name or in a sequence, each of the same number of neighbours.
        size: Rankers in a set.
        beta: Negative where good rankers that agree are to be preferred, as published; positive where those that
            differ are.

    Returns:
        Score of each set; its members are names, or numbers in the sequence, by descending quality.

    Raises:
        TypeError: If something else than a graph is given.
        ValueError: If the graphs have different numbers of rows or neighbours, or size or beta is out of range.
    """
    named = dict(graphs) if isinstance(graphs, Mapping) else dict(enumerate(graphs))
    _check_graphs(named)
    if not 1 <= size <= len(named):
        raise ValueError(f"size must be from 1 to {len(named)}, the graphs, got {size}")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, got {beta}")
    measured = tqdm(named.items(), desc="Measuring rankers", unit="ranker", delay=2)
    qualities = _best_first({name: quality(graph) for name, graph in measured})
    if size == 1:
        return {(name,): value for name, value in qualities.items()}
    depth = 1 + next(iter(named.values())).neighbours.shape[1]
    sets: dict[tuple[Any, ...], float] = {}
    for a, b in tqdm(list(combinations(qualities, 2)), desc="Comparing rankers", unit="pair", delay=2):
        correlation = rank_correlation(named[a], named[b], depth=depth)
        sets[a, b] = qualities[a] * qualities[b] / (1 + correlation) ** beta
    for _ in range(size - 2):
        sets = _unions(_best_first(sets), list(qualities))
    return _best_first(sets)


def _unions(sets: dict[tuple[Any, ...], float], names: Sequence[Hashable]) -> dict[tuple[Any, ...], float]:
    """Sets of one member more, from one of the best and any other; `sets` come best first."""
    found: dict[tuple[Any, ...], float] = {}
    for first, score in list(sets.items())[:_SETS_KEPT]:
        for second, other in sets.items():
            added = set(second).difference(first)
            if len(added) == 1:
                union = tuple(name for name in names if name in added or name in first)
                found[union] = max(found.get(union, 0.0), score + other)
    return found


def _best_first(scores: dict[Any, float]) -> dict[Any, float]:
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _places(graph: KNNGraph, depth: int) -> sparse.csr_array:
    """Place of each row in the list of each, int64 `[n, n]`, from 1, the place of the row itself, to `depth`."""
    lists = np.concatenate([np.arange(len(graph))[:, None], graph.neighbours], axis=1)[:, :depth]
    return rows_to(lists, np.tile(np.arange(1, depth + 1), (len(graph), 1)))


def _scaled(number: int, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Scores of list `number` from 0 to 1, float64 `[Q, k]`; 1 where all are equal, 0 where there is no row."""
    there = ids >= 0
    infinite = (np.isinf(scores) & there).any(axis=1)
    if infinite.any():
        raise ValueError(f"scores must be finite, list {number} has one of query {infinite.argmax()} that is not")
    rising = (scores[:, 1:] > scores[:, :-1]).any(axis=1)
    if rising.any():
        raise ValueError(
            f"scores must be best first, larger is closer, but rise in list {number} at query {rising.argmax()}; "
            "of distances give the negative"
        )
    exact = scores.astype(np.float64)
    largest = exact.max(axis=1, keepdims=True, initial=-np.inf)
    smallest = np.where(there, exact, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    return np.divide(
        exact - smallest, largest - smallest, out=there.astype(np.float64), where=there & (largest > smallest)
    )


def _fused(ids: list[np.ndarray], points: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of most points, summed over lists `[Q, k_j]`; points float32 and ids int64 `[Q, k]`."""
    best, rows = np.full((len(ids[0]), k), -np.inf, np.float32), np.full((len(ids[0]), k), -1, np.int64)
    step = max(1, _PLACES_AT_ONCE // max(1, sum(each.shape[1] for each in ids)))
    for start in tqdm(range(0, len(rows), step), desc="Fusing lists", unit="block", delay=2):
        block = slice(start, start + step)
        totals, found = _block([each[block] for each in ids], [each[block] for each in points])
        width = min(k, found.shape[1])
        best[block, :width], rows[block, :width] = totals[:, :k], found[:, :k]
    return best, rows


def _block(ids: list[np.ndarray], points: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Points and ids of all rows that a list has, best first, -inf and -1 behind them, `[Q, sum k_j]`."""
    every, given = np.concatenate(ids, axis=1), np.concatenate(points, axis=1)
    own = ids[0].shape[1]
    order = np.argsort(every, axis=1, kind="stable")
    every, given = (np.take_along_axis(each, order, axis=1) for each in (every, given))
    begins = np.ones(every.shape, bool)
    begins[:, 1:] = every[:, 1:] != every[:, :-1]
    # Compared in float32, as they are given: sums of the same points in another order tie.
    totals = np.full(every.shape, -np.inf, np.float32)
    totals[begins] = np.add.reduceat(given.ravel(), np.flatnonzero(begins))
    totals[every < 0] = -np.inf
    # Stable sorts: a row's place in the first list is that of its first copy, and rows of one place stay by number.
    best = np.lexsort((np.minimum(order, own), -totals), axis=1)
    totals, every = (np.take_along_axis(each, best, axis=1) for each in (totals, every))
    return totals, np.where(np.isneginf(totals), -1, every)


def _checked(lists: Lists, k: int | None) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Checked lists, and how many rows to give."""
    if not len(lists) or any(len(each) != 2 for each in lists):
        raise ValueError("lists must be pairs (scores, ids) of arrays [Q, k], one for each ranker, and at least one")
    # How many rows the gallery has is not known here.
    checked = [check_lists(scores, ids, np.iinfo(np.int64).max) for scores, ids in lists]
    counts = [len(ids) for _, ids in checked]
    if len(set(counts)) > 1:
        raise ValueError(f"lists must answer the same queries, got lists of {counts} queries")
    k = max(ids.shape[1] for _, ids in checked) if k is None else k
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return checked, k


def _check_graphs(named: Mapping[Any, KNNGraph]) -> None:
    others = [name for name, graph in named.items() if not isinstance(graph, KNNGraph)]
    if others:
        raise TypeError(f"graphs must be KNNGraph, that of {others[0]!r} is a {type(named[others[0]]).__name__}")
    shapes = {name: graph.neighbours.shape for name, graph in named.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"graphs must have the same rows and as many neighbours each, got [n, k] of {shapes}")
