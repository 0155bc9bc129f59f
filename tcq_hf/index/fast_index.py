"""FastIndex: codes in, the best rows with their exact scores out, at the speed of memory. FAISS and NumPy only."""

import functools
import time
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .code_index import CodeIndex, LearnedIndex, check_codes, check_search_type, check_vectors, codebooks_of
from .sample_queries import noisy_rows
from .shadow import Shadow, make_shadow, restore_shadow
from .stored_codes import faiss, packed_codes, unpack_codes

# Rows that FAISS packs together, and rows that are packed in one go.
_GROUP, _BLOCK_ROWS = 32, 1 << 20
# FAISS's ways to scan groups of 32 rows and keep many, and how they are tried.
_IMPLEMENTATIONS, _TRIAL_ROWS, _TRIALS = (13, 15), 1 << 17, 5
# The depth is measured for the first 100 rows, and fewer than 100 get that of 100: what pushes a good row down in the
# scan are the rows around it, however few are asked for.
_RANK, _SAMPLE_ROWS, _SAMPLE_QUERIES, _OVERLAP, _MARGIN, _DEEPEST = 100, 1 << 20, 256, 0.99, 1.6, 64


class FastIndex(LearnedIndex, faiss.IndexRefine):
    """4-bit codes that FAISS scans at the speed of memory, and the exact codes that score what the scan finds.

    Scores are those of `CodeIndex`; about one in a hundred of the k best rows is missed. For K <= 16 the scan reads
    the codes themselves, for larger K the sums of two words that come near the codewords (`shadow.py`). How many
    candidates are scored is measured on the rows: `k_factor` times the larger of k and 100. `faiss.write_index` stores
    a plain `IndexRefine`, which takes `k_factor` times k.

    Args:
        exact: The rows. The index takes them over.
    """

    def __init__(self, exact: CodeIndex) -> None:
        rows = exact.ntotal
        base = _empty_scan(codebooks_of(exact))
        base.ntotal = rows  # IndexRefine wants members of one size; the scan is filled below
        super().__init__(base, exact)
        self.own_fields = self.own_refine_index = True
        base.this.disown()
        exact.this.disown()
        self._rebuild()

    @property
    def exact(self) -> CodeIndex:
        """The member with the learned codebooks; rows are changed through the index that holds it."""
        member = faiss.downcast_index(self.refine_index)
        member.__class__ = CodeIndex
        member.referenced_objects = [self]  # which frees it
        return member

    @property
    def scan(self) -> faiss.IndexPQFastScan:
        """The member of 4-bit codes."""
        member = scan_of(self.base_index)
        member.referenced_objects = [self]
        return member

    def add(self, x: np.ndarray) -> None:
        """Encode float embeddings `[n, D]` with the learned codebooks and store their codes."""
        pq = self.exact.pq
        packed = self.exact.sa_encode(check_vectors(x, self.d, "embeddings"))
        self.add_codes(unpack_codes(packed, pq.M, pq.nbits))

    def add_codes(self, codes: Any) -> None:
        """Append codes, integers `[n, M]` below K; all are checked before any is added."""
        codes = check_codes(codes, self.exact.pq.M, self.exact.pq.ksub)
        with self._lock.write():
            before = self.ntotal
            self.exact.add_codes(codes)
            # What few rows said about words and depth is soon out of date.
            if self.exact.ntotal >= 2 * before:
                self._rebuild()
            else:
                self._fill(before)

    def range_search(self, x: np.ndarray, thresh: float, **kwargs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Limits int64 `[Q + 1]`, scores and ids of all rows that score above `thresh`, from the exact member."""
        with self._lock.read():
            return self.exact.range_search(x, thresh, **kwargs)

    def reset(self) -> None:
        """Remove all rows."""
        with self._lock.write():
            self.exact.reset()
            self._rebuild()

    def codes_array(self) -> np.ndarray:
        """The codes as uint8 `[ntotal, M]`, a copy."""
        with self._lock.read():
            return self.exact.codes_array()

    def reconstruct_n(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The stored codewords of rows, float32 `[n, D]`."""
        with self._lock.read():
            return self.exact.reconstruct_n(*args, **kwargs)

    def check(self, path: Any) -> None:
        """Refuse what was read from a file and is no index of this kind, or whose members do not belong together.

        The scan of one that is gets the way that is the fastest here; the file has that of the machine that wrote it.

        Raises:
            ValueError: Naming `path`.
        """
        exact, base = faiss.downcast_index(self.refine_index), faiss.downcast_index(self.base_index)
        if type(exact) is not faiss.IndexPQ or type(scan_of(base)) is not faiss.IndexPQFastScan:
            raise ValueError(f"{path} holds an IndexRefine of other members than a fast index has")
        check_search_type(exact, path)
        expected = _empty_scan(codebooks_of(self))
        alike = type(base) is type(expected) and {exact.ntotal, base.ntotal, scan_of(base).ntotal} == {self.ntotal}
        if not alike or not _same_layout(base, expected) or not self._scans_its_rows():
            raise ValueError(f"the two members of the fast index {path} do not belong together: build it again")
        self.scan.implem = _fastest_implementation(self.scan.M)

    def _look(self, method: str, x: np.ndarray, k: int, **kwargs: Any) -> Any:
        if getattr(kwargs.get("params"), "sel", None) is not None:
            raise ValueError(
                "a fast index does not take the selector in params; tcq_hf.search(filters=...) does, or an ivf index"
            )
        depth = self.k_factor * max(1, _RANK / k)
        if depth * k >= self.ntotal and not kwargs:
            return self.exact._look(method, x, k)
        return super()._look(method, x, k, **({"params": faiss.IndexRefineSearchParameters(k_factor=depth)} | kwargs))

    def _remove(self, x: Any) -> int:
        removed = self.exact.remove_ids(x)
        self._rebuild()
        return removed

    def _scans_its_rows(self) -> bool:
        """Whether the scan has the words of the exact codes, on up to 64 groups of rows."""
        scan, groups = self.scan, -(-self.ntotal // _GROUP)
        if not groups:
            return True
        stored = faiss.rev_swig_ptr(scan.codes.get(), scan.codes.size()).reshape(-1, _GROUP * scan.M2 // 2)
        for group in np.unique(np.linspace(0, groups - 1, min(groups, 64)).astype(int)):
            codes = self.exact.codes_array(group * _GROUP, min((group + 1) * _GROUP, self.ntotal))
            if not np.array_equal(_scanned(scan.pq, self._words().packed(codes)), stored[group]):
                return False
        return True

    def _rebuild(self) -> None:
        """Make the scan anew from the exact member, and measure how deep it has to look."""
        exact = self.exact
        step = max(1, exact.ntotal // _SAMPLE_ROWS)
        sample = exact.codes_array(step=step)
        usage = np.stack([np.bincount(column, minlength=exact.pq.ksub) for column in sample.T])
        self.__dict__["_shadow"] = make_shadow(codebooks_of(exact), usage)
        self._fill(0)
        self.k_factor = self._measured(sample, step)

    def _measured(self, sample: np.ndarray, step: int) -> float:
        """`_depth` of this index; of a large one that of every `step`-th row, its sample, at the rank 100 / step."""
        if self.ntotal <= 10 * _RANK:
            return max(1.0, self.ntotal / _RANK)  # every row is a candidate
        if step == 1:
            return _depth(self.exact, self.base_index, _RANK)
        exact = CodeIndex.of(codebooks_of(self))
        exact.add_codes(sample)
        base = _empty_scan(codebooks_of(exact))
        _fill(base, exact, self._words(), 0)
        return _depth(exact, base, -(-_RANK // step))

    def _fill(self, start: int) -> None:
        """Bring the scan up to the rows of the exact member, whose first `start` it has."""
        _fill(faiss.downcast_index(self.base_index), self.exact, self._words(), start)
        self.ntotal = self.exact.ntotal

    def _words(self) -> Shadow:
        """The shadow; for an index that was read from a file, made again from its books."""
        if "_shadow" not in self.__dict__:
            quantizer, codebooks = self.scan.pq, codebooks_of(self.exact)
            books = faiss.vector_to_array(quantizer.centroids).reshape(quantizer.M, quantizer.ksub, quantizer.dsub)
            self.__dict__["_shadow"] = restore_shadow(codebooks, books)
        return self.__dict__["_shadow"]


def scan_of(base: faiss.Index) -> faiss.IndexPQFastScan:
    """The 4-bit index inside the first member of a `FastIndex`."""
    base = faiss.downcast_index(base)
    return faiss.downcast_index(base.index) if isinstance(base, faiss.IndexPreTransform) else base


def _empty_scan(codebooks: np.ndarray) -> faiss.Index:
    """A scan without rows; where each codeword is the sum of two words, with each sub-vector of the query twice."""
    num_codebooks, codebook_size, sub_dim = codebooks.shape
    levels, width = 1 if codebook_size <= 16 else 2, num_codebooks * sub_dim
    scan = faiss.IndexPQFastScan(levels * width, levels * num_codebooks, 4, faiss.METRIC_INNER_PRODUCT)
    scan.is_trained = True
    scan.implem = _fastest_implementation(scan.M)
    if levels == 1:
        return scan
    twice = faiss.LinearTransform(width, levels * width, False)
    eye = np.eye(width, dtype=np.float32).reshape(num_codebooks, 1, sub_dim, width)
    faiss.copy_array_to_vector(np.repeat(eye, levels, axis=1).ravel(), twice.A)
    twice.is_trained = True
    base = faiss.IndexPreTransform(twice, scan)
    base.own_fields = True
    twice.this.disown()
    scan.this.disown()
    return base


@functools.cache
def _fastest_implementation(words: int) -> int:
    """FAISS's way to scan codes of so many words that is the fastest here: it depends on the processor, by a third."""
    scan = faiss.IndexPQFastScan(4 * words, words, 4, faiss.METRIC_INNER_PRODUCT)
    scan.is_trained = True
    scan.codes.resize(_TRIAL_ROWS * scan.M2 // 2)
    scan.ntotal2 = scan.ntotal = _TRIAL_ROWS
    generator = np.random.default_rng(0)
    stored = faiss.rev_swig_ptr(scan.codes.get(), scan.codes.size())
    stored[:] = generator.integers(256, size=len(stored), dtype=np.uint8)
    books = generator.standard_normal(scan.pq.centroids.size()).astype(np.float32)
    faiss.copy_array_to_vector(books, scan.pq.centroids)
    query, seconds = generator.standard_normal((1, scan.d)).astype(np.float32), {}
    for implementation in 2 * _IMPLEMENTATIONS:
        scan.implem = implementation
        for _ in range(_TRIALS):
            start = time.perf_counter()
            scan.search(query, _RANK)
            seconds[implementation] = min(time.perf_counter() - start, seconds.get(implementation, np.inf))
    return min(seconds, key=seconds.get)


def _scanned(quantizer: faiss.ProductQuantizer, packed: np.ndarray) -> np.ndarray:
    """Packed 4-bit codes in the order in which FAISS scans them: bytes."""
    flat = faiss.IndexPQ(quantizer.d, quantizer.M, 4, faiss.METRIC_INNER_PRODUCT)
    flat.is_trained = True
    flat.add_sa_codes(packed)
    scan = faiss.IndexPQFastScan(flat)
    return faiss.rev_swig_ptr(scan.codes.get(), scan.codes.size()).copy()


def _same_layout(base: faiss.Index, expected: faiss.Index) -> bool:
    """Whether two scans read queries and codes alike."""
    scans = [scan_of(each) for each in (base, expected)]
    if len({(scan.pq.M, scan.d, scan.bbs, scan.metric_type) for scan in scans}) > 1:
        return False
    if isinstance(base, faiss.IndexPreTransform):
        maps = [faiss.downcast_VectorTransform(each.chain.at(0)) for each in (base, expected)]
        return np.array_equal(*(faiss.vector_to_array(each.A) for each in maps))
    return True


def _fill(base: faiss.Index, exact: CodeIndex, shadow: Shadow, start: int) -> None:
    """Give a scan the rows of the exact index, whose first `start` it has."""
    scan, count = scan_of(base), exact.ntotal
    faiss.copy_array_to_vector(shadow.books.ravel(), scan.pq.centroids)
    width, rows = scan.M2 // 2, -(-count // _GROUP) * _GROUP
    scan.codes.resize(rows * width)
    if count:
        stored = faiss.rev_swig_ptr(scan.codes.get(), scan.codes.size())
    for first in tqdm(range(start // _GROUP * _GROUP, count, _BLOCK_ROWS), desc="4-bit words", delay=2):
        part = _scanned(scan.pq, shadow.packed(exact.codes_array(first, first + _BLOCK_ROWS)))
        stored[first * width : first * width + part.size] = part
    scan.ntotal2, scan.ntotal, base.ntotal = rows, count, count


def _depth(exact: CodeIndex, base: faiss.Index, rank: int) -> float:
    """Candidates of the scan for each of the `rank` best rows, so that 99 % of these are among them."""
    generator = np.random.default_rng(0)
    drawn = packed_codes(exact)[generator.integers(exact.ntotal, size=_SAMPLE_QUERIES)]
    queries = noisy_rows(codebooks_of(exact), unpack_codes(drawn, exact.pq.M, exact.pq.nbits), generator)
    limits = exact.search(queries, rank)[0][:, -1:] - 1e-6
    _, rows = base.search(queries, min(exact.ntotal, _DEEPEST * rank))
    found = np.minimum((_scores(exact, queries, rows) >= limits).cumsum(axis=1), rank).mean(axis=0) / rank
    enough = np.flatnonzero(found >= _OVERLAP)
    return _MARGIN * (1 + (enough[0] if len(enough) else len(found))) / rank


def _scores(exact: CodeIndex, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact scores float32 of the given rows `[Q, n]` of each query."""
    codebooks, packed = codebooks_of(exact), packed_codes(exact)
    tables = np.einsum("qmd,mkd->qmk", queries.reshape(len(queries), len(codebooks), -1), codebooks)
    scores = np.empty(rows.shape, np.float32)
    for query, (table, wanted) in enumerate(zip(tables, rows, strict=True)):
        codes = unpack_codes(packed[wanted], exact.pq.M, exact.pq.nbits)
        scores[query] = sum(column[code] for column, code in zip(table, codes.T, strict=True))
    return scores
