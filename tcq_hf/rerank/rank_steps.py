"""The steps of Rank Flow Embedding: lists of all rows in; better lists, hyperedges, components out.

Lists are int32 `[n, L]`, the row itself first, -1 behind all others where there are fewer. Formulas: `RankFlow`.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from tqdm.auto import tqdm

from .graph import KNNGraph, rows_to
from .sparse_rows import largest_entries, narrow

# Numbers in one dense block of rows: 16 MiB of float32.
_NUMBERS_AT_ONCE = 2**22
# Slope of the sigmoid that makes scores of places.
_SLOPE = 0.1


def start_lists(graph: KNNGraph, depth: int) -> np.ndarray:
    """Each row itself and its `depth - 1` nearest."""
    own = np.arange(len(graph))[:, None]
    return np.concatenate([own, graph.neighbours[:, : depth - 1]], axis=1).astype(np.int32)


def ranked_both_ways(rankers: list[np.ndarray], k: int) -> np.ndarray:
    """Step 1: the lists of one ranker sorted, or those of several, of one shape, fused."""
    scored = [place_scores(lists, k) for lists in rankers]
    if len(rankers) == 1:
        return _sorted(rankers[0], scored[0], 0)
    pairs = [narrow(rows_to(lists, scores + 1)) for lists, scores in zip(rankers, scored, strict=True)]
    fused = sum(pairs[1:], start=pairs[0]).tocsr()
    return widened(rankers[0], lambda rows: fused[rows])[0]


def place_scores(lists: np.ndarray, k: int) -> np.ndarray:
    """Scores of step 1, float64 `[n, L]`."""
    depth = lists.shape[1]
    places = np.arange(1, depth + 1)
    named = narrow(rows_to(lists, np.broadcast_to(places, lists.shape))).T.tocsr()
    scores, forth = np.empty(lists.shape), _sigmoid(places, k) ** 2
    for rows in _blocks(lists, "Comparing places"):
        back = _at(_dense(named[rows]), lists[rows]).astype(np.float64)
        scores[rows] = forth * _sigmoid(np.where(back > 0, back, depth + 2), k)
    return scores


def hyperedge_weights(k: int) -> np.ndarray:
    """`1 - ln p / ln k` of the places p from 1 to k, float32."""
    return (1 - np.log(np.arange(1, k + 1)) / np.log(k)).astype(np.float32)


def hyperedges(lists: np.ndarray, k: int) -> sparse.csr_array:
    """E of step 2, symmetric float32 `[n, n]`."""
    near = lists[:, :k]
    first = narrow(rows_to(near, np.tile(hyperedge_weights(k)[: near.shape[1]], (len(near), 1))))
    # Place k has the weight 0.
    first.eliminate_zeros()
    reached = first + first @ first
    edges = reached.multiply(reached.T).tocsr()
    edges.sort_indices()
    return edges


def sorted_by_hyperedges(lists: np.ndarray, edges: sparse.csr_array) -> np.ndarray:
    """Step 2: lists by `<E_q, E_i> / pos_q(i)`."""
    result, places = np.empty_like(lists), np.arange(1, lists.shape[1] + 1)
    for rows in _blocks(lists, "Comparing hyperedges"):
        shared = _at(_dense(edges[rows] @ edges), lists[rows])
        result[rows] = _sorted(lists[rows], shared / places, rows.start)
    return result


def confidences(edges: sparse.csr_array, k: int) -> np.ndarray:
    """The confidences c of step 3, at most 1, float32 `[n]`."""
    sums = largest_entries(edges, k).sum(axis=1)
    return sums / sums.max()


def widened(
    lists: np.ndarray, scores_of: Callable[[slice], sparse.csr_array], by_place: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Lists sorted by new scores, rows that have one but were not listed taken in, and cut at their length.

    Args:
        lists: int32 `[n, L]`.
        scores_of: Some rows in, their new scores `[m, n]`, none below 0, out.
        by_place: Divide a score by the place in the list, L + 2 outside of it.

    Returns:
        Lists, and their scores float32 `[n, L]`: of a row itself the largest of its list, 0 of rows that have none.
    """
    depth, result, best = lists.shape[1], np.empty_like(lists), np.empty(lists.shape, np.float32)
    for rows in _blocks(lists, "Widening lists"):
        listed, scores = lists[rows], scores_of(rows)
        dense = _dense(scores)
        known = np.where(listed < 0, -np.inf, _at(dense, listed))
        np.put_along_axis(dense, listed, 0, axis=1)
        more, gained = _left(scores, dense)
        if by_place:
            known, gained = known / np.arange(1, depth + 1), gained / (depth + 2)
        ids, values = np.concatenate([listed, more], axis=1), np.concatenate([known, gained], axis=1)
        values[:, 0] = values.max(axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :depth]
        result[rows], best[rows] = (np.take_along_axis(each, order, axis=1) for each in (ids, values))
    return result, best


def components(lists: np.ndarray, edges: sparse.csr_array, confidence: np.ndarray, k: int) -> sparse.csr_array:
    """Step 4: the rows of each component of more than one row, as ones, float32 `[C, n]`; edges of 0 tie nothing."""
    near = lists[:, 1:k]
    scores = np.empty(near.shape, np.float32)
    for rows in _blocks(lists, "Comparing neighbours"):
        scores[rows] = _at(_dense(edges[rows] @ edges), near[rows])
    own, place = np.nonzero(near >= 0)
    other = near[own, place]
    scores = scores[own, place] * confidence[own] * confidence[other]
    best = np.argsort(-scores, kind="stable")[: int(np.ceil(len(scores) * confidence.mean() / 2))]
    best = best[scores[best] > 0]
    ties = sparse.csr_array((np.ones(len(best)), (own[best], other[best])), shape=edges.shape)
    labels = connected_components(ties, directed=False)[1]
    sizes = np.bincount(labels)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)[labels]
    return narrow(rows_to(numbers[:, None], np.ones((len(numbers), 1)), numbers.max() + 1).T)


def pairs_of_components(strengths: sparse.csr_array, embedding: sparse.csr_array, k: int) -> sparse.csr_array:
    """Step 5: `1 + sqrt(i j) <Z_a, Z_b>` of pairs of the k strongest rows of each component, summed, `[n, n]`.

    Args:
        strengths: e, float32 `[C, n]`.
        embedding: Z, float32 `[n, C]`.
        k: Rows of a component.
    """
    n, pairs = len(embedding.indptr) - 1, []
    for component in tqdm(range(strengths.shape[0]), desc="Pairing within components", unit="component", delay=2):
        part = slice(*strengths.indptr[component : component + 2])
        found = strengths.indices[part]
        rows = found[np.lexsort((found, -strengths.data[part]))[:k]]
        near, places = embedding[rows], np.sqrt(np.arange(1, len(rows) + 1))
        values = 1 + np.outer(places, places) * (near @ near.T).toarray()
        pairs.append((values.ravel(), np.repeat(rows, len(rows)), np.tile(rows, len(rows))))
    if not pairs:
        return sparse.csr_array((n, n), dtype=np.float32)
    values, first, second = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return narrow(sparse.coo_array((values, (first, second)), shape=(n, n)))


def _sigmoid(places: np.ndarray, k: int) -> np.ndarray:
    return np.where(places == 1, 1, expit(-_SLOPE * (places - k // 2)))


def _sorted(lists: np.ndarray, scores: np.ndarray, start: int) -> np.ndarray:
    """Lists `[m, L]` of the rows from `start` on by scores, the row itself changing places with the first."""
    order = np.argsort(np.where(lists < 0, np.inf, -scores), axis=1, kind="stable")
    result, rows = np.take_along_axis(lists, order, axis=1), np.arange(len(lists))
    result[rows, (result == start + rows[:, None]).argmax(axis=1)] = result[:, 0]
    result[:, 0] = start + rows
    return result


def _blocks(lists: np.ndarray, what: str) -> Iterator[slice]:
    """Rows of lists, as many at a time as one dense block holds."""
    step = max(1, _NUMBERS_AT_ONCE // len(lists))
    for start in tqdm(range(0, len(lists), step), desc=what, unit="block", delay=2):
        yield slice(start, min(start + step, len(lists)))


def _dense(matrix: sparse.csr_array) -> np.ndarray:
    """`[m, n + 1]`, the last column 0: the one of the row -1."""
    m, n = matrix.shape
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(m, n + 1)).toarray()


def _at(dense: np.ndarray, lists: np.ndarray) -> np.ndarray:
    return np.take_along_axis(dense, lists, axis=1)


def _left(matrix: sparse.csr_array, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns int32 `[m, w]` of entries that are not 0 in `dense`, by number, and its values; -1 and -inf behind."""
    matrix.sort_indices()
    rows = np.repeat(np.arange(len(dense)), np.diff(matrix.indptr))
    values = dense[rows, matrix.indices]
    kept = values != 0
    counts = np.bincount(rows[kept], minlength=len(dense))
    there = np.arange(counts.max(initial=0)) < counts[:, None]
    columns, gained = np.full(there.shape, -1, np.int32), np.full(there.shape, -np.inf, np.float32)
    columns[there], gained[there] = matrix.indices[kept], values[kept]
    return columns, gained
