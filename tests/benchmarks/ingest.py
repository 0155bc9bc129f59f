"""Time and memory of building, saving, opening and growing an index of millions of rows."""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import nanopq
import numpy as np
import torch
from page import write_page
from search import TRAIN, blocks, codewords, vectors

from tcq_hf import build_index, load_index, save_index
from tcq_hf.index.segments import SegmentedIndex

TEXT = """{rows:,} rows of 128 dimensions from the generator of [search](search.md), codes of {bytes} bytes,
{threads} threads. Each line is a process of its own. *Memory* is the most that it held (VmHWM), less what it held
before: the input codes, the index and all in between, as multiples of the codes' {megabytes:.0f} MB."""

NOTES = """The index of floats is what FAISS does with vectors where there are no codes; its training on
{train:,} rows is not counted, and it was given blocks of 100,000, whose making is not counted either. nanopq encodes
{nanopq:,} rows here, with the same codewords. Opening checks sizes and codebooks and maps the codes; the search after
it reads them all. The scan of K = 16 reads codes of as many bytes, two to a byte, chosen at random. FAISS scans one
query in one thread, which stays behind a plain read by more than a tenth; several queries go in one pass over the
codes, and together are ahead of it."""

NANOPQ_ROWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--bytes", type=int, default=16, help="bytes of a row: M codebooks of 256")
    arguments = parser.parse_args()
    words = codewords(vectors(TRAIN, 2, arguments.bytes, 128), arguments.bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "words.npy", words)
        queries = vectors(100, 1, arguments.bytes, 128)
        np.save(folder / "queries.npy", queries)
        rows = [from_floats(folder, words, arguments), with_nanopq(words, arguments)]
        for way in (exact, fast, native, ivf, living):
            rows += alone(way, folder, arguments)
    values = {"threads": faiss.omp_get_max_threads(), "megabytes": arguments.rows * arguments.bytes / 1e6}
    text = TEXT.format(**vars(arguments), **values)
    write_page("ingest", "Millions of rows", [text, rows, NOTES.format(train=TRAIN, nanopq=NANOPQ_ROWS)])


def from_floats(folder: Path, words: np.ndarray, arguments: argparse.Namespace) -> dict:
    """FAISS encodes the rows; their codes are what the other ways begin with."""
    index, seconds = build_index(words), 0.0
    for block in blocks(arguments.rows, arguments.bytes, 128):
        start = time.perf_counter()
        faiss.IndexPQ.add(index, block)
        seconds += time.perf_counter() - start
    np.save(folder / "codes.npy", index.codes_array())
    return line("FAISS IndexPQ.add of floats", seconds, arguments.rows)


def with_nanopq(words: np.ndarray, arguments: argparse.Namespace) -> dict:
    quantizer = nanopq.PQ(M=arguments.bytes, Ks=256, verbose=False)
    quantizer.codewords, quantizer.Ds = words, words.shape[2]
    floats = vectors(NANOPQ_ROWS, 3, arguments.bytes, 128)
    return line("nanopq encode of floats", timed(quantizer.encode, floats)[0], len(floats))


def exact(folder: Path, memory: Callable[[], float]) -> list[dict]:
    words, codes = np.load(folder / "words.npy"), np.load(folder / "codes.npy")
    seconds, index = timed(build_index, words, codes)
    rows = [line("build_index, exact", seconds, len(codes), memory())]
    path = folder / "exact.faiss"
    rows.append(line("save_index", timed(save_index, index, path)[0], len(codes)))
    del index, codes
    seconds, index = timed(load_index, path, words)
    rows.append(line("load_index", seconds, index.ntotal))
    del index
    seconds, index = timed(load_index, path, words, True)
    rows.append(line("load_index, mmap=True", seconds, index.ntotal))
    queries = np.load(folder / "queries.npy")
    rows.append(line("its first search", timed(index.search, queries[:1], 100)[0], index.ntotal))
    return rows


def fast(folder: Path, memory: Callable[[], float]) -> list[dict]:
    words, codes = np.load(folder / "words.npy"), np.load(folder / "codes.npy")
    seconds, index = timed(build_index, words, codes, "fast")
    rows = [line("build_index, fast", seconds, len(codes), memory())]
    return [*rows, found("fast", index, build_index(words, codes), np.load(folder / "queries.npy"))]


def native(folder: Path, memory: Callable[[], float]) -> list[dict]:
    """As many bytes of 4-bit codes, which the scan reads as they are, beside a plain read of the same bytes."""
    words, codes = np.load(folder / "words.npy"), np.load(folder / "codes.npy")
    width = words.shape[0] * words.shape[2]
    generator = np.random.default_rng(0)
    books = generator.standard_normal((2 * len(words), 16, width // (2 * len(words))))
    books = (books / np.linalg.norm(books, axis=2, keepdims=True)).astype(np.float32)
    halves = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
    del codes
    index = build_index(books, halves, mode="fast")
    count, scan = len(halves), index.scan
    del halves
    queries = books[np.arange(len(books)), generator.integers(16, size=(100, len(books)))].reshape(100, -1)
    stored = torch.from_numpy(faiss.rev_swig_ptr(scan.codes.get(), scan.codes.size())).view(torch.int64)
    read = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        read[threads] = min(timed(stored.sum)[0] for _ in range(20))
    one = min(timed(scan.search, queries[i : i + 1], 100)[0] for i in range(20))
    many = min(timed(scan.search, queries, 100)[0] for _ in range(3)) / len(queries)
    speed = f"{stored.nbytes / one / 1e9:.1f} GB/s, a plain read {stored.nbytes / read[1] / 1e9:.1f}"
    batch = f"{stored.nbytes / many / 1e9:.1f} GB/s, a plain read {stored.nbytes / min(read.values()) / 1e9:.1f}"
    return [
        line(f"scan of K = 16, one query, one thread ({speed})", one, count),
        line(f"scan of K = 16, each of 100 queries, all threads ({batch})", many, count),
    ]


def ivf(folder: Path, memory: Callable[[], float]) -> list[dict]:
    words, codes = np.load(folder / "words.npy"), np.load(folder / "codes.npy")
    seconds, index = timed(build_index, words, codes, "ivf")
    name = f"build_index, ivf ({index.nprobe} of {index.nlist} lists, recall {index.recall:.3f})"
    rows = [line(name, seconds, len(codes), memory())]
    return [*rows, found("ivf", index, build_index(words, codes), np.load(folder / "queries.npy"))]


def living(folder: Path, memory: Callable[[], float]) -> list[dict]:
    words, codes = np.load(folder / "words.npy"), np.load(folder / "codes.npy")
    index, place = SegmentedIndex.create(folder / "living", words), folder / "living"
    rows = [line("SegmentedIndex.append", timed(index.append, codes)[0], len(codes), memory())]
    more = codes[:10_000].copy()
    del codes
    before = {file: file.stat() for file in place.glob("*.faiss")}
    rows.append(line("append of 10,000 more", timed(index.append, more)[0], len(more)))
    for file, stat in before.items():
        if (file.stat().st_mtime_ns, file.stat().st_ino) != (stat.st_mtime_ns, stat.st_ino):
            raise RuntimeError(f"appending has written {file.name} anew")
    seconds, index = timed(SegmentedIndex.open, place, words)
    rows.append(line("SegmentedIndex.open", seconds, index.ntotal))
    seconds = timed(SegmentedIndex.open, place, words, True)[0]
    return [*rows, line("SegmentedIndex.open, verify=True", seconds, index.ntotal)]


def found(mode: str, index: faiss.Index, whole: faiss.Index, queries: np.ndarray) -> dict:
    """Time of a search of one query, and how it compares with the exhaustive one."""
    limits = whole.search(queries, 100)[0][:, -1:] - 1e-6
    share = (index.search(queries, 100)[0] >= limits).mean()
    times = [np.median([timed(each.search, queries[i : i + 1], 100)[0] for i in range(20)]) for each in (index, whole)]
    name = f"search of one query, {mode} ({times[1] / times[0]:.1f} times exact, {share:.4f} of its rows)"
    return line(name, float(times[0]), index.ntotal)


def alone(way: Callable, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Rows of one way, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (way, folder, arguments.rows * arguments.bytes))


def measured(way: Callable, folder: Path, size: int) -> list[dict]:
    words = np.load(folder / "words.npy")
    for mode in ("exact", "fast", "ivf"):  # what is loaded and started once
        build_index(words, np.zeros((2000, len(words)), np.uint8), mode)
    rest = held("VmRSS")
    return way(folder, lambda: (held("VmHWM") - rest) / size)


def held(field: str) -> int:
    """Bytes that this process holds, or has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(each.split()[1]) for each in lines if each.startswith(field))


def line(way: str, seconds: float, count: int, memory: float | None = None) -> dict:
    return {
        "way": way,
        "seconds": f"{seconds:.4f}",
        "million rows a second": f"{count / seconds / 1e6:.2f}",
        "memory / codes": "" if memory is None else f"{memory:.2f}",
    }


def timed(call: Callable, *arguments: object) -> tuple[float, object]:
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
