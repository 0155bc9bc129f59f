"""IVFIndex: codes in, the best rows of the nearest lists out, for tens of millions of rows. FAISS and NumPy only."""

import logging
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .code_index import CodeIndex, LearnedIndex, check_codes, check_vectors, codebooks_of
from .sample_queries import noisy_rows
from .stored_codes import behind_lists, faiss, listed_codes, pack_codes, row_lists, unpack_codes

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 1 << 16
# The number of lists to look into is the least power of two that finds this share of the 100 best rows.
_RECALL, _RANK, _SAMPLE_QUERIES = 0.95, 100, 128
# Rows that a centre of k-means is learned from.
_ROWS_PER_LIST, _ROUNDS = 64, 10


class IVFIndex(LearnedIndex, faiss.IndexIVFPQ):
    """Rows in lists around k-means centres of what their codes restore; a query looks into the nearest of them.

    The codes are the model's own, not those of residuals, so that scores are those of `CodeIndex`. How many lists are
    looked into is measured on the rows when the index is built; set `nprobe` for more or less; queries whose lists hold
    fewer than k rows look into more. Eight bytes a row more than the codes. `faiss.write_index` stores a plain
    `IndexIVFPQ`.
    """

    @classmethod
    def of(cls, exact: CodeIndex) -> "IVFIndex":
        """The rows of an exact index in about `sqrt(N)` lists.

        Raises:
            ValueError: If it has no rows, from which to learn the lists.
        """
        if not exact.ntotal:
            raise ValueError('mode="ivf" learns its lists from rows: give codes to build_index')
        codebooks = codebooks_of(exact)
        num_lists = 1 << round(np.log2(exact.ntotal) / 2)
        coarse = _centres(exact, num_lists)
        index = cls(coarse, exact.d, num_lists, len(codebooks), exact.pq.nbits, faiss.METRIC_INNER_PRODUCT)
        index.own_fields = True
        coarse.this.disown()
        index.by_residual = False
        faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
        index.is_trained = True
        index._file(exact)
        index._measure(exact)
        return index

    @property
    def recall(self) -> float | None:
        """Share of the 100 best rows that `nprobe` lists gave when the index was built; None for one from a file."""
        return self.__dict__.get("_recall")

    def add(self, x: np.ndarray) -> None:
        """Encode float embeddings `[n, D]` with the learned codebooks and store their codes."""
        packed = CodeIndex.of(codebooks_of(self)).sa_encode(check_vectors(x, self.d, "embeddings"))
        self.add_codes(unpack_codes(packed, self.pq.M, self.pq.nbits))

    def add_codes(self, codes: Any) -> None:
        """Append codes, integers `[n, M]` below K; all are checked before any is added. The centres stay."""
        codes = check_codes(codes, self.pq.M, self.pq.ksub)
        added = CodeIndex.of(codebooks_of(self))
        added.add_codes(codes)
        with self._lock.write():
            self._file(added)

    def range_search(self, x: np.ndarray, thresh: float, **kwargs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Limits int64 `[Q + 1]`, scores and ids of all rows that score above `thresh`, from all lists."""
        x = check_vectors(x, self.d, "queries")
        with self._lock.read():
            every = faiss.SearchParametersIVF(nprobe=self.nlist)
            return super().range_search(x, thresh, **({"params": every} | kwargs))

    def reset(self) -> None:
        """Remove all rows; the centres stay."""
        with self._lock.write():
            super().reset()

    def codes_array(self) -> np.ndarray:
        """The codes as uint8 `[ntotal, M]`, a copy."""
        with self._lock.read():
            return unpack_codes(listed_codes(self), self.pq.M, self.pq.nbits)

    def check(self, path: Any) -> None:
        """Refuse what was read from a file and is no index of this kind.

        Raises:
            ValueError: Naming `path`.
        """
        if self.by_residual or self.quantizer.d != self.d or self.quantizer.ntotal != self.nlist:
            raise ValueError(f"{path} holds codes of residuals to its lists; expected the codes themselves")
        try:
            listed_codes(self)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _look(self, method: str, x: np.ndarray, k: int, **kwargs: Any) -> Any:
        found, probes = super()._look(method, x, k, **kwargs), self.nprobe
        short = np.flatnonzero(found[1][:, -1] < 0)
        # Scores that are not finite are never found, not even in all lists.
        while len(short) and not kwargs and probes < self.nlist:
            probes = min(2 * probes, self.nlist)
            wider = super()._look(method, x[short], k, params=faiss.SearchParametersIVF(nprobe=probes))
            for values, more in zip(found, wider, strict=True):
                values[short] = more
            short = short[wider[1][:, -1] < 0]
        return found

    def _remove(self, x: Any) -> int:
        self.make_direct_map(False)
        before = self.ntotal
        removed = super()._remove(x)
        kept = np.zeros(before, np.int64)
        for ids, _ in row_lists(self):
            kept[ids] = 1
        places = np.cumsum(kept) - 1
        for ids, _ in row_lists(self):
            ids[:] = places[ids]
        return removed

    def _file(self, exact: CodeIndex) -> None:
        """Append the rows of an exact index, each to the list of its nearest centre."""
        # FAISS changes no rows while it keeps a map of their places, which `reconstruct` of one row asks for.
        self.make_direct_map(False)
        quantizer = faiss.downcast_index(self.quantizer)
        for first in tqdm(range(0, exact.ntotal, _BLOCK_ROWS), desc="Rows into lists", delay=2):
            count = min(_BLOCK_ROWS, exact.ntotal - first)
            _, near = quantizer.search(exact.reconstruct_n(first, count), 1)
            codes = pack_codes(exact.codes_array(first, first + count), self.pq.nbits)
            faiss.IndexIVFPQ.add_sa_codes(self, behind_lists(self, near, codes))

    def _measure(self, exact: CodeIndex) -> None:
        """Set `nprobe`, and say what share of the best rows it finds."""
        generator, k = np.random.default_rng(0), min(_RANK, self.ntotal)
        rows = np.sort(generator.integers(exact.ntotal, size=_SAMPLE_QUERIES))
        drawn = np.concatenate([exact.codes_array(row, row + 1) for row in rows])
        queries = noisy_rows(codebooks_of(self), drawn, generator)
        limits = exact.search(queries, k)[0][:, -1:] - 1e-6
        probes = 1
        while True:
            self.nprobe = probes
            found = float((self.search(queries, k)[0] >= limits).mean())
            if found >= _RECALL or probes == self.nlist:
                break
            probes = min(2 * probes, self.nlist)
        self.__dict__["_recall"] = found
        message = "%d rows in %d lists: the nearest %d hold %.3f of the %d best rows of an exhaustive search"
        logger.info(message, self.ntotal, self.nlist, probes, found, k)


def _centres(exact: CodeIndex, num_lists: int) -> faiss.IndexFlat:
    """Spherical k-means of what the codes of some rows restore."""
    step = max(1, exact.ntotal // (_ROWS_PER_LIST * num_lists))
    sample = CodeIndex.of(codebooks_of(exact))
    sample.add_codes(exact.codes_array(step=step))
    rows = sample.reconstruct_n(0, sample.ntotal)
    means = faiss.Kmeans(exact.d, num_lists, niter=1, seed=0, spherical=True, min_points_per_centroid=1, gpu=False)
    for _ in tqdm(range(_ROUNDS), desc="Centres of lists", delay=2):
        means.train(rows, init_centroids=means.centroids)
    centres = faiss.IndexFlatIP(exact.d)
    centres.add(means.centroids)
    return centres
