"""Queries and lists as FAISS takes and gives them in; checked, or newly ranked lists of the same shape, out."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

_QUERIES_AT_ONCE = 1024


def check_lists(scores: Any, ids: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of a search as float32 and int64 `[Q, k]`; places that hold no row, with the id -1, get the score -inf.

    Args:
        scores: Numbers `[Q, k]`, larger is closer, best first.
        ids: Integers `[Q, k]`, -1 behind all others where the search found fewer rows.
        rows: Rows n of the gallery.

    Raises:
        TypeError: If ids are no integers or scores no numbers.
        ValueError: If the shapes differ, an id is no row or stands twice in a list, a score of a row is NaN, or -1
            stands before a row, naming the query.
    """
    scores, ids = np.asarray(scores), np.asarray(ids)
    if ids.dtype.kind not in "iu" or scores.dtype.kind not in "fiu":
        raise TypeError(f"scores must be numbers and ids integers, got {scores.dtype} and {ids.dtype}")
    if ids.ndim != 2 or ids.shape != scores.shape:
        raise ValueError(f"scores and ids must have one shape [Q, k], got {list(scores.shape)} and {list(ids.shape)}")
    missing = ids == -1
    _refuse((ids < -1) | (ids >= rows), f"has an id that is no row from 0 to {rows - 1}")
    _refuse(missing[:, :-1] & ~missing[:, 1:], "has the id -1 before a row")
    ordered = np.sort(ids, axis=1)
    _refuse((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), "has one id twice")
    _refuse(np.isnan(scores) & ~missing, "has a score that is NaN")
    return np.where(missing, -np.inf, scores).astype(np.float32), ids.astype(np.int64)


def rank_by(similarity: sparse.csr_array, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the gallery that are most similar to each query, and behind them, in their order, rows of its list.

    Rows of equal similarity stand in the order of the list, those that are not in it behind, by number.

    Args:
        similarity: `[Q, n]`; what is not stored, or not above 0, is not similar.
        scores: float32 `[Q, k]`, from `check_lists`.
        ids: int64 `[Q, k]`.

    Returns:
        Similarities float32 `[Q, k]`, 0 for rows that only the list has and -inf where there is no row, and ids int64.
    """
    count = ids.shape[1]
    best, rows = np.full(ids.shape, -np.inf, np.float32), np.full(ids.shape, -1, np.int64)
    for query, listed in enumerate(ids):
        listed = listed[listed >= 0]
        part = slice(*similarity.indptr[query : query + 2])
        values, found = similarity.data[part], similarity.indices[part]
        found, values = found[values > 0], values[values > 0]
        places = np.full(similarity.shape[1], len(listed), np.int64)
        places[listed] = np.arange(len(listed))
        order = np.lexsort((found, places[found], -values))[:count]
        places[found] = -1
        rest = listed[places[listed] >= 0][: count - len(order)]
        end = len(order) + len(rest)
        rows[query, :end] = np.concatenate([found[order], rest])
        best[query, :end] = np.concatenate([values[order], np.zeros(len(rest))])
    return best, rows


def rank_in_blocks(
    similarity: Callable[[slice], sparse.csr_array], scores: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`rank_by` for a block of queries after the other; `similarity` gives that of a block."""
    best, rows = np.empty(ids.shape, np.float32), np.empty(ids.shape, np.int64)
    for start in tqdm(range(0, len(ids), _QUERIES_AT_ONCE), desc="Ranking anew", unit="block", delay=2):
        block = slice(start, start + _QUERIES_AT_ONCE)
        best[block], rows[block] = rank_by(similarity(block), scores[block], ids[block])
    return best, rows


def unit_queries(queries: Any, count: int, width: int) -> np.ndarray:
    """Queries as float32 `[count, width]` of unit norm; zeros stay zeros.

    Raises:
        ValueError: If they are no floats, of another shape, or not finite, naming the query.
    """
    queries = np.asarray(queries)
    if queries.dtype.kind != "f" or queries.shape != (count, width):
        raise ValueError(
            f"queries must be float [{count}, {width}], one for each list and as wide as the vectors of the graph, got "
            f"{queries.dtype} {list(queries.shape)}"
        )
    unfit = ~np.isfinite(queries).all(axis=1)
    if unfit.any():
        raise ValueError(f"queries must be finite, query {unfit.argmax()} is not")
    return unit_vectors(queries)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Rows of floats at unit norm, float32 `[n, D]`; zeros stay zeros."""
    # In double precision no length of a float32 vector is out of range.
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def _refuse(wrong: np.ndarray, message: str) -> None:
    if wrong.any():
        raise ValueError(f"the list of query {wrong.any(axis=1).argmax()} {message}")
