"""Sparse matrices in; the same with rows of unit norm, with the largest entries of each row, or in less memory out."""

import numpy as np
from scipy import sparse


def unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    """Rows at unit norm, float32 `[m, n]`; empty rows stay empty.

    Args:
        matrix: Float `[m, n]`.
    """
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    data = matrix.data / np.repeat(np.where(norms > 0, norms, 1), np.diff(matrix.indptr))
    return sparse.csr_array((data.astype(np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)


def largest_entries(matrix: sparse.csr_array, keep: int) -> sparse.csr_array:
    """The `keep` largest stored entries of each row; of equal ones at the limit, those stored first.

    Args:
        matrix: float32 `[m, n]`, no entry stored twice.
        keep: At least 1.
    """
    lengths, starts = np.diff(matrix.indptr), matrix.indptr
    if not len(lengths) or lengths.max() <= keep:
        return matrix
    padded = np.full((len(lengths), lengths.max()), -np.inf, np.float32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = matrix.data
    limits = np.repeat(np.partition(padded, -keep, axis=1)[:, -keep], lengths)
    above, ties = matrix.data > limits, matrix.data == limits
    room = keep - _counts(above, starts)
    if (_counts(ties, starts) > room).any():
        counted = ties.cumsum()
        before = np.concatenate([[0], counted])[starts[:-1]]
        ties &= counted <= np.repeat(before + room, lengths)
    kept = above | ties
    ends = np.concatenate([[0], kept.cumsum()])[starts]
    return narrow(sparse.csr_array((matrix.data[kept], matrix.indices[kept], ends), shape=matrix.shape))


def narrow(matrix: sparse.sparray) -> sparse.csr_array:
    """The same in float32, its columns in 32-bit numbers: SciPy copies the other factor of a product to the wider ones.

    Args:
        matrix: Float `[m, n]`.
    """
    matrix = matrix.tocsr()
    number = np.int32 if matrix.nnz < 2**31 else np.int64
    indices, starts = matrix.indices.astype(number), matrix.indptr.astype(number)
    return sparse.csr_array((matrix.data.astype(np.float32), indices, starts), shape=matrix.shape)


def _counts(flags: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many of the flags `[nnz]` of each row are set, int64 `[m]`."""
    return np.diff(np.concatenate([[0], flags.cumsum()])[starts])
