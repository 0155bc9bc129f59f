"""Ids of rows, as an index keeps them."""

from typing import Any

import numpy as np

# Where the ids of later rows begin must be an int64 too.
LARGEST_ID = 2**63 - 2


def check_ids(ids: Any, count: int | None = None) -> np.ndarray:
    """Ids as int64 `[n]`.

    Args:
        ids: Integers `[n]` from 0 to 2**63 - 2.
        count: Number of rows that are to have these ids, each its own; None where ids name rows that are there.

    Raises:
        TypeError: If they are not integers.
        ValueError: If an id is out of range, given twice, or there is not one for each row.
    """
    ids = np.asarray(ids)
    ids = ids if ids.size else ids.astype(np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"ids must be integers [n], got {ids.dtype} {list(ids.shape)}")
    if count is not None and len(ids) != count:
        raise ValueError(f"there are {count} rows but {len(ids)} ids")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"ids must be at least 0, got {ids.min()}")
    if len(ids) and ids.max() > LARGEST_ID:
        raise ValueError(f"ids must be at most 2**63 - 2, got {ids.max()}")
    ids = ids.astype(np.int64)
    if count is not None:
        _check_all_different(ids)
    return ids


def _check_all_different(ids: np.ndarray) -> None:
    ordered = np.sort(ids)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        raise ValueError(f"id {again[0]} is given twice; ids must be all different")
