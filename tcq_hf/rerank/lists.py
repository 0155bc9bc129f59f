"""Ranked lists as FAISS gives them, scores and ids, in; checked or newly ranked lists of the same shape out."""

from typing import Any

import numpy as np
from scipy import sparse


def check_lists(scores: Any, ids: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of a search as float32 and int64 `[Q, k]`; of places with the id -1, which hold no row, the score is -inf.

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


def _refuse(wrong: np.ndarray, message: str) -> None:
    if wrong.any():
        raise ValueError(f"the list of query {wrong.any(axis=1).argmax()} {message}")
