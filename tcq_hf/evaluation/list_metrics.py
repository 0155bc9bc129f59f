"""Ranked lists of row numbers, as an index or a re-ranker gives them, and labels in, mAP out. NumPy only."""

from typing import Any, Literal

import numpy as np

# Pairs of a query and a row of the database that are looked at together: 64 MB.
_PAIRS_AT_ONCE = 2**26


def mean_average_precision_of_lists(
    ids: Any,
    query_labels: Any,
    database_labels: Any,
    k: int = 1000,
    denominator: Literal["hits", "relevant"] = "hits",
    exclude_self: bool = False,
) -> float:
    """mAP@k of lists whose order is given: what `evaluate` computes from vectors, without its rules for ties.

    Args:
        ids: Integers `[Q, L]`, rows of the database, best first; -1 where there is none.
        query_labels: Integers `[Q]`, or 0/1 `[Q, C]` where pictures have several labels; relevant is what shares one.
        database_labels: Integers `[N]`, or 0/1 `[N, C]`; a negative integer is no label.
        k: Cut-off; the whole list if it is shorter.
        denominator: `"hits"` divides by the relevant rows within k, and a query without any counts 0; `"relevant"` by
            min(k, relevant rows in the database), and a query without any is left out.
        exclude_self: The queries are the database: query i is struck from its own list before ranks are counted.

    Raises:
        ValueError: If shapes do not fit, an id is no row or stands twice in a list, k is below 1 or the denominator is
            unknown.
    """
    ids, query_labels, database_labels = np.asarray(ids), np.asarray(query_labels), np.asarray(database_labels)
    _check(ids, query_labels, database_labels, k, denominator, exclude_self)
    values = []
    for start in range(0, len(ids), step := max(1, _PAIRS_AT_ONCE // len(database_labels))):
        block = slice(start, start + step)
        relevant = _alike(query_labels[block], database_labels)
        listed = ids[block]
        hits = np.take_along_axis(relevant, np.maximum(listed, 0), axis=1) & (listed >= 0)
        if exclude_self:
            own = np.arange(start, start + len(listed))
            relevant[np.arange(len(listed)), own] = False
            hits = _moved_up(hits, listed == own[:, None])
        hits = hits[:, :k]
        precisions = hits * hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
        divisors = hits.sum(axis=1) if denominator == "hits" else np.minimum(k, relevant.sum(axis=1))
        counted = divisors > 0 if denominator == "relevant" else np.ones(len(hits), bool)
        values.append(precisions.sum(axis=1)[counted] / np.maximum(1, divisors[counted]))
    found = np.concatenate(values)
    if not len(found):
        raise ValueError("no query has a relevant row in the database")
    return float(found.mean())


def _alike(labels: np.ndarray, base_labels: np.ndarray) -> np.ndarray:
    """Which rows share a label with each query, bool `[Q, N]`."""
    if labels.ndim == 2:
        return labels.astype(np.float32) @ base_labels.T.astype(np.float32) > 0
    return (labels[:, None] == base_labels) & (labels[:, None] >= 0)


def _moved_up(hits: np.ndarray, struck: np.ndarray) -> np.ndarray:
    """Hits `[Q, L]` with the struck places taken out and the places behind them moved up."""
    order = np.argsort(struck, axis=1, kind="stable")
    return np.take_along_axis(hits & ~struck, order, axis=1)


def _check(
    ids: np.ndarray, labels: np.ndarray, base_labels: np.ndarray, k: int, denominator: str, exclude_self: bool
) -> None:
    if denominator not in ("hits", "relevant"):
        raise ValueError(f"denominator must be 'hits' or 'relevant', got {denominator!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"ids must be integers [Q, L], got {ids.dtype} {list(ids.shape)}")
    if len(labels) != len(ids) or labels.ndim != base_labels.ndim or labels.shape[1:] != base_labels.shape[1:]:
        raise ValueError(
            f"query_labels must be [{len(ids)}] and database_labels [N], or both with C columns, got "
            f"{list(labels.shape)} and {list(base_labels.shape)}"
        )
    wrong = ((ids < -1) | (ids >= len(base_labels))).any(axis=1)
    if wrong.any():
        raise ValueError(
            f"the list of query {wrong.argmax()} has an id that is no row from 0 to {len(base_labels) - 1}"
        )
    ordered = np.sort(ids, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"the list of query {twice.argmax()} has one id twice")
    if exclude_self and len(ids) != len(base_labels):
        raise ValueError(f"exclude_self needs the queries to be the database, got {len(ids)} and {len(base_labels)}")
