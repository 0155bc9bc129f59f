"""Queries a second, bytes a row and what is found: learned codes beside what a user would pick instead."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import faiss
import lance
import matplotlib.pyplot as plt
import nanopq
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets.utils import tqdm
from page import ROOT, write_page
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from tcq_hf import build_index
from tcq_hf.index.code_index import CodeIndex
from tcq_hf.index.fast_index import FastIndex
from tcq_hf.model.quantization_tcq import spherical_kmeans

TEXT = """{rows:,} rows of {dim} dimensions: a Gaussian mixture of 500 clusters in 32 latent dimensions (standard
deviation of a cluster half of that between them), mapped at random to {dim}, each of the M sub-vectors at unit norm;
1,000 queries of the same distribution, k = {k}, inner product, {threads} threads, seed 0. The codewords are those of
spherical k-means on 50,000 other rows. *Batch* is all queries at once, the best of three runs; *single* one query
after another, the median. *Of the exact codes* is the share of returned rows whose exact score is at least the exact
{k}-th score less 1e-6. *Recall* is the share of the {k} rows of the largest float inner product. Times the figure of
`exact` at the same bytes stand in brackets."""
NOTES = """![Recall over queries a second](search.png)

Times of one run, one after the other. nanopq compares one query after another in NumPy, with the codes of `exact`.
sentence-transformers searches signs or 8-bit values of the floats with FAISS, 4 k of them, and rescores these one by
one in Python; its 8-bit values lie as floats in the index. Lance reads the rows from a file and answers single queries.
The depth of `fast`, the probes of `ivf` and the quantizers of FAISS and Lance come from the rows; HNSW (32 links, ef
128) and the probes of the other inverted lists (those of `ivf`) were set. PQ that FAISS trains on these rows finds as
many of them as the codes of tcq_hf; what finds more at equal bytes cuts vectors into twice as many parts (FastScan), or
encodes what is left over from the centre of a list (IndexIVFPQ, Lance), which codes that are the model's own cannot."""
# Queries that a slow way answers, and candidates that sentence-transformers rescores.
FEW, RESCORED = 100, 4
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
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
    arguments = parser.parse_args()
    rows, points = [], []
    for size in arguments.bytes:
        lines, found = compare(size, arguments)
        rows += lines
        points += [(size, *each) for each in found]
    plot(points)
    text = TEXT.format(**vars(arguments), threads=faiss.omp_get_max_threads())
    write_page("search", "Speed of search", [text, rows, NOTES])


def compare(num_codebooks: int, arguments: argparse.Namespace) -> tuple[list[dict], list[tuple]]:
    """Rows of the table of one number of bytes, and name, queries a second and recall of each."""
    queries = vectors(1000, 1, num_codebooks, arguments.dim)
    words = codewords(vectors(TRAIN, 2, num_codebooks, arguments.dim), num_codebooks)
    exact, flat = build_index(words), faiss.IndexFlatIP(arguments.dim)
    for block in blocks(arguments.rows, num_codebooks, arguments.dim):
        flat.add(block)
        exact.add(block)
    truth = measure("IndexFlatIP", flat.search, 4 * arguments.dim, queries, arguments.k)
    base = measure("tcq_hf, exact", exact.search, num_codebooks, queries, arguments.k)
    found = [truth, base]
    coded, lists = learned(exact, words, queries, arguments)
    found += [*coded, *trained(flat, num_codebooks, lists, queries, arguments)]
    found += graph_and_lance(flat, num_codebooks, lists, queries, arguments)
    found.append(with_nanopq(exact, words, queries, arguments.k))
    if num_codebooks == arguments.dim // 8:  # as many bytes as signs
        found += sentence_transformers(flat, queries, arguments.k)
    lines = [row(each, num_codebooks, base, truth, exact, queries) for each in found]
    return lines, [(each.name, each.batch, recall(each, truth)) for each in found]


def learned(
    exact: CodeIndex, words: np.ndarray, queries: np.ndarray, arguments: argparse.Namespace
) -> tuple[list[Found], tuple[int, int]]:
    """The fast and the ivf index of the same codes; how many lists the latter looks into, and has."""
    codes, size, k = exact.codes_array(), len(words), arguments.k
    fast = build_index(words, codes, mode="fast")
    ivf = build_index(words, codes, mode="ivf")
    found = [
        measure(f"tcq_hf, fast (depth {fast.k_factor:.0f})", fast.search, scanned_bytes(fast), queries, k),
        measure(f"tcq_hf, ivf ({ivf.nprobe} of {ivf.nlist} lists)", ivf.search, size + 8, queries, k),
    ]
    return found, (ivf.nprobe, ivf.nlist)


def trained(
    flat: faiss.Index, num_codebooks: int, lists: tuple[int, int], queries: np.ndarray, arguments: argparse.Namespace
) -> list[Found]:
    """Quantizers that FAISS trained on the rows, the inverted lists as many as ours."""
    dim, metric, found = arguments.dim, faiss.METRIC_INNER_PRODUCT, []
    residual = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists[1], num_codebooks, 8, metric)
    residual.nprobe = lists[0]
    for name, index, size in (
        ("IndexPQ", faiss.IndexPQ(dim, num_codebooks, 8, metric), num_codebooks),
        ("IndexPQFastScan", faiss.IndexPQFastScan(dim, 2 * num_codebooks, 4, metric), num_codebooks),
        (f"IndexIVFPQ ({lists[0]} of {lists[1]} lists)", residual, num_codebooks + 8),
    ):
        index.train(flat.reconstruct_n(0, TRAIN))
        add(index, flat)
        found.append(measure(f"FAISS {name}, trained", index.search, size, queries, arguments.k))
    return found


def graph_and_lance(
    flat: faiss.Index, num_codebooks: int, lists: tuple[int, int], queries: np.ndarray, arguments: argparse.Namespace
) -> list[Found]:
    """HNSW over the floats, and the IVF_PQ that Lance trains."""
    graph = faiss.IndexHNSWFlat(arguments.dim, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efSearch = 128
    add(graph, flat)
    links = 8 * graph.hnsw.offsets.size() + 4 * graph.hnsw.neighbors.size()
    size = 4 * arguments.dim + links / flat.ntotal
    rows = [measure("FAISS HNSW32, ef 128", graph.search, size, queries, arguments.k)]
    del graph
    with tempfile.TemporaryDirectory() as folder:
        table = pa.FixedSizeListArray.from_arrays(pa.array(flat.reconstruct_n(0, flat.ntotal).ravel()), arguments.dim)
        dataset = lance.write_dataset(pa.table({"vector": table}), folder)
        del table
        dataset = dataset.create_index(
            "vector", "IVF_PQ", metric="l2", num_partitions=lists[1], num_sub_vectors=num_codebooks
        )

        def ask(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            nearest = {"column": "vector", "q": query, "k": k, "nprobes": lists[0]}
            reply = dataset.scanner(columns=["_distance"], nearest=nearest, with_row_id=True).to_table()
            return -reply["_distance"].to_numpy(), reply["_rowid"].to_numpy()

        name = f"Lance IVF_PQ ({lists[0]} of {lists[1]} lists), trained"
        rows.append(measure(name, one_by_one(ask), num_codebooks + 8, queries, arguments.k, FEW))
    return rows


def with_nanopq(exact: CodeIndex, words: np.ndarray, queries: np.ndarray, k: int) -> Found:
    quantizer = nanopq.PQ(M=len(words), Ks=256, metric="dot", verbose=False)
    quantizer.codewords, quantizer.Ds, codes = words, words.shape[2], exact.codes_array()

    def ask(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = quantizer.dtable(query).adist(codes)
        best = np.argpartition(-scores, k)[:k]
        best = best[np.argsort(-scores[best])]
        return scores[best], best

    return measure("nanopq, the same codes", one_by_one(ask), len(words), queries, k, FEW)


def sentence_transformers(flat: faiss.Index, queries: np.ndarray, k: int) -> list[Found]:
    """Its search of signs and of 8-bit values, both rescored with the float query."""
    sample, found = flat.reconstruct_n(0, TRAIN), []
    ranges = np.stack([sample.min(axis=0), sample.max(axis=0)])
    for precision, size in (("ubinary", flat.d // 8), ("uint8", 4 * flat.d)):
        index = faiss.IndexBinaryFlat(flat.d) if precision == "ubinary" else faiss.IndexFlatIP(flat.d)
        for start in range(0, flat.ntotal, 100_000):
            part = flat.reconstruct_n(start, min(100_000, flat.ntotal - start))
            index.add(quantize_embeddings(part, precision=precision, ranges=ranges))

        def ask(asked: np.ndarray, k: int, index=index, precision=precision) -> tuple[np.ndarray, np.ndarray]:
            options = {"corpus_index": index, "corpus_precision": precision, "ranges": ranges}
            hits, _ = semantic_search_faiss(asked, top_k=k, rescore_multiplier=RESCORED, **options)
            return tuple(np.array([[hit[key] for hit in each] for each in hits]) for key in ("score", "corpus_id"))

        found.append(measure(f"sentence-transformers, {precision}, rescored", ask, size, queries, k, FEW))
    return found


def one_by_one(ask: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]) -> Search:
    """A search of many queries from one of a single query."""

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        replies = [ask(query, k) for query in queries]
        return tuple(np.stack(each) for each in zip(*replies, strict=True))

    return search


def measure(name: str, search: Search, size: float, queries: np.ndarray, k: int, count: int = 1000) -> Found:
    """Speed and results; a slow way answers the first `count` queries, once."""
    asked = queries[:count]
    search(asked[:2], k)
    batch = min(seconds(lambda: search(asked, k)) for _ in range(3 if count == len(queries) else 1))
    single = float(np.median([seconds(lambda i=i: search(asked[i : i + 1], k)) for i in range(50)]))
    scores, ids = search(asked, k)
    return Found(name, size, len(asked) / batch, single, scores, ids)


def recall(each: Found, truth: Found) -> float:
    pairs = zip(each.ids, truth.ids[: len(each.ids)], strict=True)
    return float(np.mean([len(np.intersect1d(*pair)) / len(pair[1]) for pair in pairs]))


def row(each: Found, num_codebooks: int, base: Found, truth: Found, exact: faiss.Index, queries: np.ndarray) -> dict:
    coded = each.name.startswith("tcq_hf")
    limits = base.scores[:, -1:] - 1e-6
    if coded and not np.abs(rescored(exact, queries, each.ids) - each.scores).max() <= 1e-5:
        raise RuntimeError(f"{each.name} returns scores that are not those of the codes")
    return {
        "bytes": num_codebooks,
        "index": each.name,
        "bytes a row": f"{each.bytes:.0f}",
        "batch, queries/s": f"{each.batch:,.0f} ({each.batch / base.batch:.1f})",
        "single, ms": f"{1e3 * each.single:.2f} ({base.single / each.single:.1f})",
        "of the exact codes": f"{(each.scores >= limits).mean():.4f}" if coded else "",
        "recall": f"{recall(each, truth):.3f}",
    }


def plot(points: list[tuple]) -> None:
    """Recall over queries a second, one field for each number of bytes."""
    sizes = sorted({size for size, *_ in points})
    names = list(dict.fromkeys(name.split(" (")[0] for _, name, *_ in points))
    figure, fields = plt.subplots(
        1, len(sizes), figsize=(4.5 * len(sizes) + 3, 4.5), squeeze=False, layout="constrained"
    )
    for size, name, speed, share in points:
        number = names.index(name.split(" (")[0])
        ours = name.startswith("tcq_hf")
        look = {"s": 90 if ours else 50, "marker": "*" if ours else "osD^vPX<>"[number % 9], "label": names[number]}
        fields[0][sizes.index(size)].scatter(speed, share, color=plt.cm.tab20(number % 20), **look)
    for field, size in zip(fields[0], sizes, strict=True):
        field.set(xscale="log", xlabel="queries a second, batches", ylim=(0, 1.03), title=f"codes of {size} bytes")
        field.grid(alpha=0.3)
    fields[0][0].set_ylabel("recall of the nearest floats")
    found = {
        label: handle for field in fields[0] for handle, label in zip(*field.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(ROOT / "docs" / "benchmarks" / "search.png", dpi=110)


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
