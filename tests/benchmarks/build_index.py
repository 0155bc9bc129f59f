"""Speed of building an index from codes, checks included, against what FAISS does with floats."""

import argparse
import time
from collections.abc import Callable

import datasets
import faiss
import numpy as np
import pyarrow as pa
from page import write_page

from tcq_hf import add_code_index, build_index

TEXT = """{count:,} rows, D = 128, random codes and codebooks (speed does not depend on them). Median of {repeats}
rounds, one way after the other in each round."""

NOTES = """`build_index` checks shape, type, range of every code and the norm of every codeword before it adds. With
K = 256 and uint8 no code can be out of range; with K = 16 each is looked at and two are packed into a byte. Codes of a
dataset are read straight from Arrow. FAISS's own way encodes floats, after a training that is not counted here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    ways = make_ways(arguments.count)
    seconds = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            index = run()
            seconds[way].append(time.perf_counter() - start)
            assert index.ntotal == arguments.count
    rows = [
        {
            "way": way,
            "seconds": f"{np.median(seconds[way]):.4f}",
            "million rows a second": f"{arguments.count / np.median(seconds[way]) / 1e6:.2f}",
        }
        for way in ways
    ]
    text = TEXT.format(count=arguments.count, repeats=arguments.repeats)
    write_page("build_index", "Speed of building an index", [text, rows, NOTES])


def make_ways(count: int) -> dict[str, Callable]:
    rng = np.random.default_rng(0)
    codes = {size: rng.integers(0, size, (count, books), dtype=np.uint8) for books, size in ((8, 256), (16, 16))}
    codebooks = {size: unit(rng.standard_normal((books, size, 128 // books))) for books, size in ((8, 256), (16, 16))}
    column = pa.FixedSizeListArray.from_arrays(pa.array(codes[256].ravel()), 8)
    features = datasets.Features({"codes": datasets.List(datasets.Value("uint8"), length=8)})
    table = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"codes": column}, schema=features.arrow_schema)))
    floats = unit(rng.standard_normal((count, 8, 16))).reshape(count, 128)
    trained = build_index(codebooks[256])

    def from_dataset() -> faiss.Index:
        add_code_index(table, "codes", codebooks[256])
        index = table.get_index("codes").faiss_index
        table.drop_index("codes")
        return index

    def bare() -> faiss.Index:
        index = faiss.clone_index(trained)
        index.add_sa_codes(codes[256])
        return index

    def from_floats() -> faiss.Index:
        index = faiss.clone_index(trained)
        index.add(floats)
        return index

    return {
        "build_index, 8 x 256, NumPy": lambda: build_index(codebooks[256], codes[256]),
        "build_index, 16 x 16, NumPy": lambda: build_index(codebooks[16], codes[16]),
        "add_code_index, 8 x 256, dataset column": from_dataset,
        "FAISS add_sa_codes alone, 8 x 256": bare,
        "FAISS add of floats, 8 x 256, already trained": from_floats,
    }


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
