"""CodeIndex: codes of learned codebooks in, exact scores out. FAISS and NumPy only."""

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .locks import SharedLock
from .row_ids import check_ids
from .stored_codes import faiss, listed_codes, pack_codes, packed_codes, unpack_codes

_BLOCK_ROWS = 1 << 20


class LearnedIndex:
    """What all modes have in common: codebooks that stay, rows numbered by their place, checked input, one lock.

    Many threads may search while one changes the rows: a search sees all of a change or nothing of it.
    """

    ntotal: int
    d: int

    @property
    def _lock(self) -> SharedLock:
        return self.__dict__.setdefault("_shared_lock", SharedLock())

    def codebooks(self) -> np.ndarray:
        """The learned codebooks, float32 `[M, K, d]`, a copy."""
        return codebooks_of(self)

    def train(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Always raises: training would overwrite the learned codebooks."""
        raise RuntimeError("this index holds learned codebooks; train() would overwrite them (leave train_size unset)")

    def add_with_ids(self, x: Any, ids: Any) -> None:
        """Always raises: rows are numbered by their place."""
        raise RuntimeError("rows are numbered by their place and take no ids; use add(embeddings) or add_codes(codes)")

    def add_sa_codes(self, codes: np.ndarray, ids: None = None) -> None:
        """Append rows as FAISS stores them, uint8 `[n, sa_code_size()]`; `ids` are refused as by `add_with_ids`."""
        if ids is not None:
            self.add_with_ids(codes, ids)
        self._refuse_if_mapped()
        with self._lock.write():
            super().add_sa_codes(codes)

    def search(self, x: np.ndarray, k: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[Q, k]`, larger is closer, and row ids int64 `[Q, k]` of the k best rows of each query."""
        return self._find("search", x, k, kwargs)

    def search_and_reconstruct(self, x: np.ndarray, k: int, **kwargs: Any) -> tuple[np.ndarray, ...]:
        """Scores and row ids of `search`, and the stored codewords of these rows, float32 `[Q, k, D]`."""
        return self._find("search_and_reconstruct", x, k, kwargs)

    def assign(self, x: np.ndarray, k: int) -> np.ndarray:
        """The row ids of `search` alone."""
        return self.search(x, k)[1]

    def remove_ids(self, x: Any) -> int:
        """Remove rows by number, integers `[n]` or a FAISS selector; those behind move up. Gives how many went.

        Raises:
            TypeError: If the numbers are not integers; a mask goes through `np.flatnonzero`.
            ValueError: If there is no such row, or the index is memory-mapped.
        """
        self._refuse_if_mapped()
        with self._lock.write():
            return self._remove(x if isinstance(x, faiss.IDSelector) else check_rows(x, self.ntotal))

    def merge_from(self, other: "LearnedIndex", add_id: int = 0) -> None:
        """Move all rows of another index of the same codebooks behind the rows of this one.

        Raises:
            ValueError: If its codebooks are others, one of the two is memory-mapped, or `add_id` is not 0: rows are
                numbered by their place.
        """
        if add_id:
            raise ValueError(f"add_id must be 0, got {add_id}: rows are numbered by their place")
        if other is self or not np.array_equal(codebooks_of(self), codebooks_of(other)):
            raise ValueError("only the rows of another index with the same codebooks can be moved")
        other._refuse_if_mapped()
        self.add_codes(other.codes_array())
        other.reset()

    def check(self, path: Any) -> None:
        """Raise ValueError, naming `path`, unless what was read from there is an index of this kind."""

    def _refuse_if_mapped(self) -> None:
        """Raise ValueError if the rows cannot be changed."""

    def _find(self, method: str, x: np.ndarray, k: int, kwargs: dict[str, Any]) -> Any:
        x = check_vectors(x, self.d, "queries")
        with self._lock.read():
            return self._look(method, x, self._check_k(k), **kwargs)

    def _look(self, method: str, x: np.ndarray, k: int, **kwargs: Any) -> Any:
        """Arrays `[Q, k, ...]` that FAISS's method of this name gives, asked as the mode needs."""
        return getattr(super(), method)(x, k, **kwargs)

    def _remove(self, x: Any) -> int:
        return super().remove_ids(x)

    def _check_k(self, k: Any) -> int:
        try:
            k = operator.index(k)
        except TypeError:
            raise TypeError(f"k must be an integer, got {k!r}") from None
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > self.ntotal:
            raise ValueError(f"k={k} is larger than the index, which holds {self.ntotal} rows")
        return k


class CodeIndex(LearnedIndex, faiss.IndexPQ):
    """An exhaustive FAISS index over learned codes whose codebooks cannot be trained away.

    Scores are inner products of the float query with the stored codewords: larger is closer, at most M. `add(x)`
    encodes float embeddings with the learned codebooks, as the model does; `add_codes` takes the model's own codes.
    `faiss.write_index` stores a plain `IndexPQ`.
    """

    @classmethod
    def of(cls, codebooks: np.ndarray) -> "CodeIndex":
        """An empty index of checked codebooks, float32 `[M, K, d]`."""
        num_codebooks, codebook_size, sub_dim = codebooks.shape
        num_bits = codebook_size.bit_length() - 1
        index = cls(num_codebooks * sub_dim, num_codebooks, num_bits, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
        index.is_trained = True
        return index

    def add(self, x: np.ndarray, *args: Any, **kwargs: Any) -> None:
        """Encode float embeddings `[n, D]` with the learned codebooks and store their codes."""
        x = check_vectors(x, self.d, "embeddings")
        self._refuse_if_mapped()
        with self._lock.write():
            super().add(x, *args, **kwargs)

    def add_codes(self, codes: Any) -> None:
        """Append codes, integers `[n, M]` below K; all are checked before any is added.

        Raises:
            TypeError: If they are not integers.
            ValueError: If the shape does not fit, a code is not below K, or the index is memory-mapped.
        """
        codes = check_codes(codes, self.pq.M, 1 << self.pq.nbits)
        self._refuse_if_mapped()
        with self._lock.write():
            self._append(codes)

    def range_search(self, x: np.ndarray, thresh: float, **kwargs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Limits int64 `[Q + 1]`, scores and ids of all rows that score above `thresh`."""
        x = check_vectors(x, self.d, "queries")
        with self._lock.read():
            return super().range_search(x, thresh, **kwargs)

    def reset(self) -> None:
        """Remove all rows."""
        self._refuse_if_mapped()
        with self._lock.write():
            super().reset()

    def codes_array(self, start: int = 0, stop: int | None = None, step: int = 1) -> np.ndarray:
        """Codes of the rows `[start:stop:step]` as uint8 `[n, M]`, a copy."""
        with self._lock.read():
            return unpack_codes(packed_codes(self)[start:stop:step], self.pq.M, self.pq.nbits)

    def check(self, path: Any) -> None:
        """Raise ValueError, naming `path`, if what was read from there searches otherwise than by the codewords."""
        check_search_type(self, path)

    def _append(self, codes: np.ndarray) -> None:
        # A vector that grows step by step holds up to three times its bytes; this one is made large enough at once.
        width, start = self.code_size, self.ntotal
        if not len(codes):
            return
        self.codes.resize((start + len(codes)) * width)
        stored = faiss.rev_swig_ptr(self.codes.data(), self.codes.size()).reshape(-1, width)
        for block in range(0, len(codes), _BLOCK_ROWS):
            packed = pack_codes(codes[block : block + _BLOCK_ROWS], self.pq.nbits)
            stored[start + block : start + block + len(packed)] = packed
        self.ntotal = start + len(codes)

    def _refuse_if_mapped(self) -> None:
        if not self.codes.is_owned:
            raise ValueError("a memory-mapped index is read-only; load it without mmap=True to change it")


def codebooks_of(index: faiss.IndexPQ | faiss.IndexRefine | faiss.IndexIVFPQ) -> np.ndarray:
    """Codebooks inside an index, float32 `[M, K, d]`, a copy."""
    member = faiss.downcast_index(index.refine_index) if isinstance(index, faiss.IndexRefine) else index
    quantizer = member.pq
    return faiss.vector_to_array(quantizer.centroids).reshape(quantizer.M, quantizer.ksub, quantizer.dsub)


def select_rows(index: faiss.IndexPQ | faiss.IndexRefine | faiss.IndexIVFPQ, rows: np.ndarray) -> CodeIndex:
    """An exact index of some rows, int64 `[n]`, of an index: what a filter leaves to be searched."""
    member = faiss.downcast_index(index.refine_index) if isinstance(index, faiss.IndexRefine) else index
    chosen = CodeIndex.of(codebooks_of(index))
    with held(index):
        stored = listed_codes(member) if isinstance(member, faiss.IndexIVFPQ) else packed_codes(member)
        chosen.add_sa_codes(np.ascontiguousarray(stored[rows]))
    return chosen


def held(index: Any) -> AbstractContextManager[None]:
    """Keep an index as it is while it is read; one that FAISS made has no lock."""
    return index._lock.read() if isinstance(index, LearnedIndex) else nullcontext()


def check_search_type(index: faiss.IndexPQ, path: Any) -> None:
    """Raise ValueError, naming `path`, unless an index compares queries with codewords: FAISS has Hamming codes too."""
    if index.search_type != faiss.IndexPQ.ST_PQ:
        raise ValueError(f"{path} holds an IndexPQ of search_type {index.search_type}; expected 0, ST_PQ")


def check_codebooks(codebooks: Any) -> np.ndarray:
    """Codebooks of an array or of an object with `codebooks()`, float32 `[M, K, d]`.

    Raises:
        ValueError: If the shape is impossible or a codeword has no unit norm.
    """
    codebooks = codebooks.codebooks() if hasattr(codebooks, "codebooks") else codebooks
    codebooks = np.ascontiguousarray(codebooks, dtype=np.float32)
    if codebooks.ndim != 3 or not codebooks.size:
        raise ValueError(f"codebooks must have shape [M, K, d], got {list(codebooks.shape)}")
    size = codebooks.shape[1]
    if not 2 <= size <= 256 or size & (size - 1):
        raise ValueError(f"codebook_size must be a power of two from 2 to 256, got {size}")
    deviation = np.abs(np.linalg.norm(codebooks, axis=-1) - 1).max()
    if not deviation <= 1e-5:
        raise ValueError(
            f"codewords must have unit norm (the norms deviate by up to {deviation:.3g}); use model.codebooks()"
        )
    return codebooks


def check_codes(codes: Any, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """Codes as an integer array `[n, M]` below K.

    Raises:
        TypeError: If they are not integers.
        ValueError: If the shape does not fit or a code is not below K, naming its row.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != num_codebooks:
        raise ValueError(f"codes must have shape [N, {num_codebooks}], got {list(codes.shape)}")
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes must be integers, got {codes.dtype}; floats go through index.add(embeddings)")
    # Any uint8 is below 256: nothing to look at.
    if codes.size and not (codes.dtype == np.uint8 and codebook_size == 256):
        if not 0 <= codes.min() <= codes.max() < codebook_size:
            row, book = np.argwhere((codes < 0) | (codes >= codebook_size))[0]
            raise ValueError(f"codes must be below codebook_size={codebook_size}, got {codes[row, book]} in row {row}")
    return codes


def check_rows(rows: Any, count: int) -> np.ndarray:
    """Numbers of rows as int64 `[n]`.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one is not from 0 to `count` - 1.
    """
    rows = check_ids(rows)
    if len(rows) and rows.max() >= count:
        raise ValueError(f"there is no row {rows.max()} in the index, which holds {count} rows")
    return rows


def check_vectors(vectors: Any, width: int, name: str) -> np.ndarray:
    """Vectors as float32 `[n, width]`.

    Raises:
        TypeError: If they are not floats.
        ValueError: If the shape does not fit or a value is not finite, naming its row.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"{name} must have shape [n, {width}], got {list(vectors.shape)}")
    if vectors.dtype.kind != "f":
        raise TypeError(f"{name} must be floats, got {vectors.dtype}; codes go through index.add_codes or build_index")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, row {int(np.argmin(finite))} is not")
    return vectors
