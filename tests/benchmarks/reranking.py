"""What re-ranking adds to learned codes, PQ codes and floats on photographs, and what it costs."""

import argparse
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
from ablation import vectors_of
from datasets import load_dataset
from ingest import held, timed
from page import BACKBONE, data_folder, write_page

from tcq_hf import FeatureCache, TCQImageProcessor, TCQModel, TCQTrainer, TCQTrainingArguments
from tcq_hf.evaluation import baselines
from tcq_hf.evaluation.list_metrics import mean_average_precision_of_lists
from tcq_hf.evaluation.protocols import Split, by_labels, cifar10_ii, validation
from tcq_hf.rerank import Diffusion, KNNGraph, KReciprocal, QueryExpansion, RankFlow, reciprocal_rank_fusion

TEXT = """Frozen ViT-Ti/16 (ImageNet-21k then 1k, supervised), 224 px. Lists of {depth} rows from an exhaustive search;
each re-ranker sees the graph of the gallery and each query's own list, nothing else (out of sample). Codes are those
of the default training, seed 0, and of FAISS PQ on the same features; *float* is a learned embedding before it is
quantized. The gallery stands in random order, so that rows of equal code have no order that means something.
mAP@{depth} with the hits-in-k denominator; *strict* is that with min(k, relevant).

The options of each method are the best of its grid, by strict mAP on 32-bit learned codes, for pseudo-queries: a tenth
of the training pictures, taken out of the gallery, for which only the training pictures among what they find count. No
label of a test query or of another row of the gallery was looked at. The cut-off is the same for all options: the
shortest list that is left before re-ranking. Of CIFAR-10 the training pictures are a tenth of the gallery, of clothing
all of it.

*fit* is what has to be done once when the graph is there, *ms a query* the median of 100 single queries, *memory* the
most that a process of its own held beyond vectors and graph (VmHWM). Two threads; seconds hold for whatever else ran
on the machine."""

FUSION = "Reciprocal-rank fusion of the lists of the three learned codes, no re-ranking:"

DEPTH, NEIGHBOURS, PARAMETERS = 1000, 399, 32
METHODS = {
    "query expansion": (QueryExpansion, [{"k": k, "alpha": a} for k in (10, 30, 100) for a in (1.0, 3.0)]),
    "database augmentation": (
        QueryExpansion,
        [{"k": k, "alpha": a, "database": True} for k in (10, 30, 100) for a in (1.0, 3.0)],
    ),
    "k-reciprocal": (KReciprocal, [{"k1": k, "k2": j, "weight": 0.3} for k in (20, 50, 100) for j in (6, 20)]),
    "diffusion": (Diffusion, [{"k": k, "query_k": q} for k in (20, 50, 100) for q in (3, 10, 30)]),
    "rank flow": (RankFlow, [{"k": k} for k in (10, 20, 50)]),
}


SETS = {
    "CIFAR-10 (II)": lambda: cifar10_ii(load_dataset(str(data_folder() / "cifar10"))),
    "Clothing photographs": lambda: by_labels(load_dataset(str(data_folder() / "clothing"))),
}
# What each row of a set is asked with, and what is stored of it, float32 [n, D].
Space = tuple[np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="of pictures")
    parser.add_argument("--gallery", type=int, help="rows of the gallery, to try it out (default: all)")
    arguments = parser.parse_args()
    parts: list = [TEXT.format(depth=f"{DEPTH:,}")]
    for name in arguments.sets:
        split = SETS[name]()
        parts += [f"## {name}", *sections(split, gallery_of(split, arguments.gallery))]
    write_page("reranking", "Re-ranking", parts)


def gallery_of(split: Split, count: int | None) -> np.ndarray:
    """Rows of the gallery in random order; of fewer, those to learn from stay."""
    order = np.random.default_rng(0).permutation(split.database)
    if count is None:
        return order
    first = order[np.argsort(~np.isin(order, split.train), kind="stable")][:count]
    return np.random.default_rng(1).permutation(first)


def sections(split: Split, gallery: np.ndarray) -> Iterator[str | list[dict]]:
    """What is written about one set."""
    with tempfile.TemporaryDirectory() as name:
        folder, spaces = Path(name), representations(split)
        chosen = choose(folder, spaces[f"learned, {PARAMETERS} bits"], split, gallery)
        yield "Best by pseudo-queries, and what it does to them (strict mAP):"
        yield [
            {"method": method, "options": listed(options), "before": f"{before:.4f}", "after": f"{after:.4f}"}
            for method, (options, before, after) in chosen.items()
        ]
        rows, found = [], {}
        for space, vectors in spaces.items():
            found[space] = search(folder, vectors, split.queries, gallery)
            before = both_figures(found[space][1], split, split.queries, gallery)
            print(split.name, space, before, flush=True)
            for method, (options, *_) in chosen.items():
                ids, costs = alone(method, options, folder)
                after = both_figures(ids, split, split.queries, gallery)
                rows.append({"vectors": space, "method": method} | changes(before, after) | costs)
                print(*rows[-1].values(), flush=True)
        yield "Test queries:"
        yield rows
        lists = {space: each for space, each in found.items() if space.startswith("learned")}
        figures = {space: both_figures(ids, split, split.queries, gallery) for space, (_, ids) in lists.items()}
        fused = both_figures(reciprocal_rank_fusion(list(lists.values()), k=DEPTH)[1], split, split.queries, gallery)
        yield FUSION
        yield [
            {"lists": name, f"mAP@{DEPTH}": f"{published:.4f}", "strict": f"{strict:.4f}"}
            for name, (published, strict) in (figures | {"fused": fused}).items()
        ]


def representations(split: Split) -> dict[str, Space]:
    """The spaces to search in, by name."""
    weights = data_folder() / BACKBONE / "model.safetensors"
    model = TCQModel.from_timm(BACKBONE, weights, num_codebooks=4).freeze_backbone()
    cache = FeatureCache(split.dataset, model, TCQImageProcessor.from_backbone(BACKBONE))
    features, spaces = cache.features(), {}
    for bits in (64, 32, 16):
        model = TCQModel.from_timm(BACKBONE, weights, num_codebooks=bits // 8).freeze_backbone()
        model.initialize(features[split.train], seed=0)
        with tempfile.TemporaryDirectory() as folder:
            settings = {"seed": 0, "save_strategy": "no", "report_to": "none", "logging_strategy": "no"}
            training = TCQTrainingArguments(folder, disable_tqdm=True, **settings)
            TCQTrainer(model, training, cache.select(split.train)).train()
        embeddings, restored = vectors_of(model.eval(), features)
        if bits == 64:
            spaces["float, learned with 64 bits"] = embeddings, embeddings
        spaces[f"learned, {bits} bits"] = embeddings, restored
    spaces["PQ, 64 bits"] = baselines.pq(features, features, features[split.train], 64)
    return spaces


def choose(folder: Path, space: Space, split: Split, gallery: np.ndarray) -> dict[str, tuple[dict, float, float]]:
    """The best options of each method for pseudo-queries, with their strict mAP before and after."""
    asking = validation(split).queries
    rest = gallery[~np.isin(gallery, asking)]
    known = np.where(np.isin(np.arange(len(split.labels)), split.train), split.labels, -1)
    before, chosen = search(folder, space, asking, rest)[1], {}
    cut_off = int((known[rest][before] >= 0).sum(axis=1).min())
    print(f"cut-off for pseudo-queries: {cut_off}", flush=True)

    def figure(ids: np.ndarray) -> float:
        left = only_known(ids, known[rest])
        return mean_average_precision_of_lists(left, known[asking], known[rest], cut_off, "relevant")

    for method, (_, grid) in METHODS.items():
        tried = []
        for options in grid:
            tried.append((figure(alone(method, options, folder)[0]), options))
            print("pseudo-queries", method, options, f"{tried[-1][0]:.4f}", flush=True)
        best, options = max(tried, key=lambda each: each[0])
        chosen[method] = options, figure(before), best
    return chosen


def only_known(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Lists with the rows of unknown label struck and those behind them moved up, -1 at their ends."""
    kept = labels[ids] >= 0
    order = np.argsort(~kept, axis=1, kind="stable")
    return np.take_along_axis(np.where(kept, ids, -1), order, axis=1)


def both_figures(ids: np.ndarray, split: Split, asking: np.ndarray, gallery: np.ndarray) -> tuple[float, float]:
    labels = split.labels[asking], split.labels[gallery]
    return tuple(mean_average_precision_of_lists(ids, *labels, DEPTH, kind) for kind in ("hits", "relevant"))


def search(folder: Path, space: Space, asking: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of an exhaustive search; they, the vectors and the graph are left in the folder."""
    queries, stored = np.ascontiguousarray(space[0][asking]), np.ascontiguousarray(space[1][gallery])
    index = faiss.IndexFlatIP(stored.shape[1])
    index.add(stored)
    scores, ids = index.search(queries, DEPTH)
    seconds, graph = timed(KNNGraph.build, stored, NEIGHBOURS)
    print(f"graph of {len(stored)} rows: {seconds:.1f} s", flush=True)
    graph.save(folder / "graph.safetensors")
    np.savez(folder / "lists.npz", queries=queries, scores=scores, ids=ids)
    return scores, ids


def alone(method: str, options: dict, folder: Path) -> tuple[np.ndarray, dict]:
    """Ids after re-ranking, and what it costs, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(reranked, (method, options, folder))


def reranked(method: str, options: dict, folder: Path) -> tuple[np.ndarray, dict]:
    graph, found = KNNGraph.load(folder / "graph.safetensors"), np.load(folder / "lists.npz")
    lists = [found[name] for name in ("queries", "scores", "ids")]
    rest = held("VmRSS")
    seconds, reranker = timed(METHODS[method][0](**options).fit, graph)
    single = [timed(reranker, *(each[row : row + 1] for each in lists))[0] for row in range(100)]
    memory = (held("VmHWM") - rest) / 1e6
    costs = {"fit s": f"{seconds:.1f}", "ms a query": f"{1000 * np.median(single):.2f}", "memory MB": f"{memory:.0f}"}
    return reranker(*lists)[1], costs


def changes(before: tuple[float, float], after: tuple[float, float]) -> dict[str, str]:
    """Both figures before and after, in words."""
    names = (f"mAP@{DEPTH}", "strict")
    return {
        name: f"{old:.4f} → {new:.4f} ({new - old:+.4f})" for name, old, new in zip(names, before, after, strict=True)
    }


def listed(options: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


if __name__ == "__main__":
    main()
