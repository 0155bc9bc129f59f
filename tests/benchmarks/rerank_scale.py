"""Time and memory of the graph and of re-rankers as the gallery grows."""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
import torch
from ingest import held, timed
from page import write_page
from search import TRAIN, codewords, vectors

from tcq_hf import build_index
from tcq_hf.rerank import Diffusion, KNNGraph, KReciprocal, QueryExpansion, RankFlow

TEXT = """Rows of 128 dimensions from the generator of [search](search.md) and their codes of {bytes} bytes, {threads}
threads. The graph is that of what the codes restore, `KNNGraph.from_index`: up to 100,000 rows all pairs are compared,
of more each row asks a fast index; *right* is the share of its neighbours that are among the nearest of all rows, of
{sample} rows, ties counted. Each line is a process of its own, and all options are the defaults. *Fit* is done once
when the graph is there; *ms a query* is the median of 100 single queries with lists of 400 rows. *Most memory* is all
that the process held at its peak, Python with its packages, codes, vectors and graph included (VmHWM). `--million` adds
the last line."""

DEPTH, SAMPLE = 400, 300
RERANKERS = {
    "query expansion": (QueryExpansion, 1),
    "database augmentation": (lambda: QueryExpansion(database=True), 10),
    "k-reciprocal": (KReciprocal, 20),
    "diffusion": (Diffusion, 49),
    "rank flow": (RankFlow, DEPTH - 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--million", action="store_true", help="also a million rows, with k-reciprocal alone")
    parser.add_argument("--bytes", type=int, default=8, help="bytes of a row: M codebooks of 256")
    arguments = parser.parse_args()
    words = codewords(vectors(TRAIN, 2, arguments.bytes, 128), arguments.bytes)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in [*arguments.rows, *([1_000_000] if arguments.million else [])]:
            index = build_index(words)
            index.add(vectors(count, 0, arguments.bytes, 128))
            queries = vectors(100, 1, arguments.bytes, 128)
            np.savez(folder / "codes.npz", words=words, codes=index.codes_array())
            np.savez(folder / "lists.npz", **dict(zip(("scores", "ids"), index.search(queries, DEPTH), strict=True)))
            np.save(folder / "queries.npy", queries)
            for method in RERANKERS if count < 1_000_000 else ["k-reciprocal"]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append({"rows": f"{count:,}", "method": method} | pool.apply(measured, (method, folder)))
                print(*rows[-1].values(), flush=True)
    text = TEXT.format(bytes=arguments.bytes, threads=torch.get_num_threads(), sample=SAMPLE)
    write_page("rerank_scale", "Re-ranking as the gallery grows", [text, rows])


def measured(method: str, folder: Path) -> dict[str, str]:
    make, k = RERANKERS[method]
    stored, lists = np.load(folder / "codes.npz"), np.load(folder / "lists.npz")
    codes = stored["codes"]
    index = build_index(stored["words"], codes, "exact" if len(codes) <= 100_000 else "fast")
    found, graph = timed(KNNGraph.from_index, index, k)
    fitted, reranker = timed(make().fit, graph)
    asked = np.load(folder / "queries.npy"), lists["scores"], lists["ids"]
    single = [timed(reranker, *(each[row : row + 1] for each in asked))[0] for row in range(100)]
    most = held("VmHWM") / 1e9
    return {
        "neighbours": str(k),
        "graph s": f"{found:.1f}",
        "right": f"{right(graph):.4f}",
        "fit s": f"{fitted:.1f}",
        "fit, us a row": f"{1e6 * fitted / len(codes):.0f}",
        "ms a query": f"{1000 * np.median(single):.2f}",
        "most memory, GB": f"{most:.2f}",
    }


def right(graph: KNNGraph) -> float:
    """Share of the neighbours in a graph of some rows that are as near as the last of the nearest ones."""
    rows = np.random.default_rng(0).permutation(len(graph))[:SAMPLE]
    cosines = graph.vectors[rows] @ graph.vectors.T
    cosines[np.arange(len(rows)), rows] = -np.inf
    k = graph.neighbours.shape[1]
    limits = -np.partition(-cosines, k - 1, axis=1)[:, k - 1 : k]
    return float((np.take_along_axis(cosines, graph.neighbours[rows], axis=1) >= limits - 1e-6).mean())


if __name__ == "__main__":
    main()
