"""Codes as FAISS stores them: packed, in a row or in lists. FAISS and NumPy only."""

from collections.abc import Iterator

import numpy as np

try:
    import faiss
except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises RuntimeError
    raise ImportError(
        "tcq_hf needs FAISS to index and search: pip install 'tcq_hf[cpu]' (faiss-cpu) or 'tcq_hf[gpu]' (faiss-gpu)"
    ) from error


def packed_codes(index: faiss.IndexPQ) -> np.ndarray:
    """The stored bytes of an index, uint8 `[ntotal, code_size]`: a view that the next change of the index ends."""
    if not index.ntotal:
        return np.empty((0, index.code_size), np.uint8)
    return faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).reshape(index.ntotal, index.code_size)


def listed_codes(index: faiss.IndexIVFPQ) -> np.ndarray:
    """The stored bytes of an inverted index by the number of the row, uint8 `[ntotal, code_size]`.

    Raises:
        ValueError: If the rows are not numbered from 0 on.
    """
    stored, seen = np.empty((index.ntotal, index.code_size), np.uint8), np.zeros(index.ntotal, bool)
    for ids, codes in row_lists(index):
        if ids.min() < 0 or ids.max() >= index.ntotal:
            break
        stored[ids], seen[ids] = codes, True
    if not seen.all():
        raise ValueError("the rows of the index are not numbered by their place")
    return stored


def row_lists(index: faiss.IndexIVFPQ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 `[n]` and codes uint8 `[n, code_size]` of each list that has rows, as views."""
    lists = index.invlists
    for number in range(index.nlist):
        size = lists.list_size(number)
        if size:
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
            yield faiss.rev_swig_ptr(lists.get_ids(number), size), codes.reshape(size, -1)


def behind_lists(index: faiss.IndexIVFPQ, lists: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Packed codes uint8 `[n, code_size]`, each behind the number of its list, as an inverted index is given rows."""
    numbers = lists.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : index.coarse_code_size()]
    return np.ascontiguousarray(np.hstack([numbers, codes]))


def pack_codes(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Codes `[n, M]` as FAISS stores them: a little-endian string of bits a row, uint8 `[n, ceil(M num_bits / 8)]`."""
    if num_bits == 8:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    if num_bits == 4 and codes.shape[1] % 2 == 0:  # as pack_bitstrings does, many times faster
        low, high = codes[:, 0::2].astype(np.uint8), codes[:, 1::2].astype(np.uint8)
        return np.ascontiguousarray(low | high << 4)
    return faiss.pack_bitstrings(np.ascontiguousarray(codes, dtype=np.int32), num_bits)


def unpack_codes(packed: np.ndarray, num_codebooks: int, num_bits: int) -> np.ndarray:
    """Codes uint8 `[n, M]`, a copy, from what `pack_codes` gives."""
    if num_bits == 8:
        return packed.copy()
    if num_bits == 4 and num_codebooks % 2 == 0:
        return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), num_codebooks)
    return faiss.unpack_bitstrings(np.ascontiguousarray(packed), num_codebooks, num_bits).astype(np.uint8)
