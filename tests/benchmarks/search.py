"""Queries a second, bytes a row and what is found: exact and fast codes beside what FAISS offers."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from datasets.utils import tqdm
from page import write_page

from tcq_hf import build_index
from tcq_hf.index.fast_index import FastIndex
from tcq_hf.model.quantization_tcq import spherical_kmeans

TEXT = """{rows:,} rows of {dim} dimensions: a Gaussian mixture of 500 clusters in 32 latent dimensions (standard
deviation of a cluster half of that between them), mapped at random to {dim}, each of the M sub-vectors at unit norm;
1,000 queries of the same distribution, k = {k}, inner product, {threads} threads, seed 0. The codewords are those of
spherical k-means on 50,000 other rows. *Batch* is all queries at once, the best of three runs; *single* one query
after another, the median. *Of the exact codes* is the share of returned rows whose exact score is at least the exact
{k}-th score less 1e-6. *Recall* is the share of the {k} rows of the largest float inner product. Times the figure of
`exact` at the same bytes stand in brackets."""
LATENT, CLUSTERS, SPREAD, TRAIN = 32, 500, 0.5, 50_000


@dataclass(frozen=True)
class Found:
    """Speed and results of one index."""

    name: str
    bytes: float
    batch: float
    single: float
    scores: np.ndarray
    ids: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bytes", type=int, nargs="+", default=[8, 16], help="bytes of a row: M codebooks of 256")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--hnsw", action="store_true", help="build an HNSW graph too: minutes a million rows")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.bytes:
        rows += compare(size, arguments)
    text = TEXT.format(**vars(arguments), threads=faiss.omp_get_max_threads())
    write_page("search", "Speed of search", [text, rows])


def compare(num_codebooks: int, arguments: argparse.Namespace) -> list[dict]:
    """Rows of the table of one number of bytes."""
    queries = vectors(1000, 1, num_codebooks, arguments.dim)
    words = codewords(vectors(TRAIN, 2, num_codebooks, arguments.dim), num_codebooks)
    exact, flat = build_index(words), faiss.IndexFlatIP(arguments.dim)
    for block in blocks(arguments.rows, num_codebooks, arguments.dim):
        flat.add(block)
        exact.add(block)
    truth = measure("IndexFlatIP", flat, 4 * arguments.dim, queries, arguments.k)
    base = measure("tcq_hf, exact", exact, num_codebooks, queries, arguments.k)
    found = [truth, base]
    fast = build_index(words, exact.codes_array(), mode="fast")
    found.append(measure(f"tcq_hf, fast (depth {fast.k_factor:.0f})", fast, scanned_bytes(fast), queries, arguments.k))
    trained = faiss.IndexPQ(arguments.dim, num_codebooks, 8, faiss.METRIC_INNER_PRODUCT)
    trained.train(flat.reconstruct_n(0, TRAIN))
    add(trained, flat)
    found.append(measure("FAISS IndexPQ, trained on the rows", trained, num_codebooks, queries, arguments.k))
    small = faiss.IndexPQFastScan(arguments.dim, 2 * num_codebooks, 4, faiss.METRIC_INNER_PRODUCT)
    small.train(flat.reconstruct_n(0, TRAIN))
    add(small, flat)
    found.append(measure("FAISS IndexPQFastScan, trained on the rows", small, num_codebooks, queries, arguments.k))
    if arguments.hnsw:
        graph = faiss.IndexHNSWFlat(arguments.dim, 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = 128
        add(graph, flat)
        found.append(measure("FAISS HNSW32, ef 128", graph, 4 * arguments.dim + 264, queries, arguments.k))
    return [row(each, num_codebooks, base, truth, exact, queries) for each in found]


def measure(name: str, index: faiss.Index, size: float, queries: np.ndarray, k: int) -> Found:
    batch = min(seconds(lambda: index.search(queries, k)) for _ in range(3))
    single = float(np.median([seconds(lambda i=i: index.search(queries[i : i + 1], k)) for i in range(50)]))
    scores, ids = index.search(queries, k)
    return Found(name, size, len(queries) / batch, single, scores, ids)


def row(each: Found, num_codebooks: int, base: Found, truth: Found, exact: faiss.Index, queries: np.ndarray) -> dict:
    coded = each.name.startswith("tcq_hf")
    limits = base.scores[:, -1:] - 1e-6
    if coded and not np.abs(rescored(exact, queries, each.ids) - each.scores).max() <= 1e-5:
        raise RuntimeError(f"{each.name} returns scores that are not those of the codes")
    recall = np.mean([len(np.intersect1d(*pair)) / len(pair[0]) for pair in zip(each.ids, truth.ids, strict=True)])
    return {
        "bytes": num_codebooks,
        "index": each.name,
        "bytes a row": f"{each.bytes:g}",
        "batch, queries/s": f"{each.batch:,.0f} ({each.batch / base.batch:.1f})",
        "single, ms": f"{1e3 * each.single:.2f} ({base.single / each.single:.1f})",
        "of the exact codes": f"{(each.scores >= limits).mean():.4f}" if coded else "",
        "recall": f"{recall:.3f}",
    }


def rescored(exact: faiss.Index, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Inner products of the queries with what the codes of the rows restore."""
    restored = [exact.reconstruct_batch(found) @ query for query, found in zip(queries, ids, strict=True)]
    return np.stack(restored)


def scanned_bytes(fast: FastIndex) -> float:
    """Bytes a row of both members."""
    return (fast.scan.codes.size() + fast.exact.codes.size()) / fast.ntotal


def add(index: faiss.Index, flat: faiss.Index, step: int = 100_000) -> None:
    for start in tqdm(range(0, flat.ntotal, step), desc=type(index).__name__):
        index.add(flat.reconstruct_n(start, min(step, flat.ntotal - start)))


def blocks(rows: int, num_codebooks: int, dim: int, step: int = 100_000) -> Iterator[np.ndarray]:
    for number, start in enumerate(tqdm(range(0, rows, step), desc="Rows")):
        yield vectors(min(step, rows - start), 10 + number, num_codebooks, dim)


def vectors(count: int, part: int, num_codebooks: int, dim: int) -> np.ndarray:
    """Rows of the mixture, each sub-vector at unit norm, float32 `[count, dim]`; `part` draws others of the same."""
    fixed, drawn = np.random.default_rng(0), np.random.default_rng((0, part))
    centres = fixed.standard_normal((CLUSTERS, LATENT), dtype=np.float32)
    mix = fixed.standard_normal((LATENT, dim), dtype=np.float32)
    noise = drawn.standard_normal((count, LATENT), dtype=np.float32)
    mixed = (centres[drawn.integers(CLUSTERS, size=count)] + SPREAD * noise) @ mix
    parts = mixed.reshape(count, num_codebooks, -1)
    return (parts / np.linalg.norm(parts, axis=2, keepdims=True)).reshape(count, dim)


def codewords(train: np.ndarray, num_codebooks: int) -> np.ndarray:
    """Spherical k-means of each sub-space, float32 `[M, 256, d]`."""
    parts = torch.from_numpy(train).reshape(len(train), num_codebooks, -1)
    generator = torch.Generator().manual_seed(0)
    words = [spherical_kmeans(parts[:, book], 256, generator, iterations=15) for book in range(num_codebooks)]
    return F.normalize(torch.stack(words), dim=2).numpy()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
