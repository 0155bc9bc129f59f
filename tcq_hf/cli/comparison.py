"""Features and labels of one split in, a row of figures for each way of searching out."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import faiss
import numpy as np
import timm
import torch
import transformers

from tcq_hf import TCQModel, __version__
from tcq_hf.evaluation import baselines
from tcq_hf.evaluation.metrics import Curve, Evaluation, evaluate
from tcq_hf.evaluation.protocols import Split
from tcq_hf.evaluation.significance import Difference, paired_bootstrap
from tcq_hf.index.inference import evaluation_mode

Vectors = tuple[np.ndarray, np.ndarray]

# What may be left out: the float search and PQ stand beside every learned figure.
OPTIONAL = ("opq", "itq", "random")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Way:
    """A way of searching.

    Args:
        name: What it is called.
        bits: Bits of one row of the database.
        search: Seed in, vectors of queries `[Q, D]` and database `[N, D]` out, whose inner product is its score.
        seeds: Seeds to measure it with.
        share: Of a way that is a point of the curve over shares, the share of negatives that it drops.
        for_shares: Whether it is measured for that curve alone.
    """

    name: str
    bits: int
    search: Callable[[int], Vectors]
    seeds: Sequence[int]
    share: float | None = None
    for_shares: bool = False


@dataclass(frozen=True)
class Measured:
    """Figures of a way, one for each of its seeds.

    Args:
        way: The way.
        evaluations: Figures; those of the first seed have a curve.
        seconds: To learn from the train rows and to encode queries and database.
        vectors: Of queries and database, with the first seed, where kept.
    """

    way: Way
    evaluations: list[Evaluation]
    seconds: list[float]
    vectors: Vectors | None = None

    @property
    def curve(self) -> Curve:
        """Precision and recall with the first seed."""
        return self.evaluations[0].curve

    def against(self, other: "Measured") -> Difference:
        """Mean difference of mAP to another way, with its interval over the queries; over seeds, each query's mean."""
        first, second = (
            np.mean([found.average_precision for found in each.evaluations], axis=0) for each in (self, other)
        )
        return paired_bootstrap(first, second)

    def row(self) -> dict[str, Any]:
        """One row of the table, means and deviations over the seeds."""
        first = self.evaluations[0]
        few, many = max(rank for rank in first.precision if rank <= 10), max(first.recall)
        figures = {
            f"mAP@{first.k}": [found.map_published for found in self.evaluations],
            f"mAP@{first.k} strict": [found.map_strict for found in self.evaluations],
            f"P@{few}": [found.precision[few] for found in self.evaluations],
            f"R@{many}": [found.recall[many] for found in self.evaluations],
        }
        return (
            {"search with": self.way.name, "bits": self.way.bits}
            | {name: spread(values) for name, values in figures.items()}
            | {"seconds": f"{statistics.fmean(self.seconds):.2f}"}
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures of each seed, ready for JSON."""
        runs = zip(self.way.seeds, self.seconds, self.evaluations, strict=True)
        return {
            "search_with": self.way.name,
            "bits": self.way.bits,
            "runs": [{"seed": seed, "seconds": seconds} | found.to_dict() for seed, seconds, found in runs],
        }


def measure(way: Way, split: Split, keep_vectors: bool = False) -> Measured:
    """Search with every seed and print one line."""
    evaluations, seconds, first = [], [], None
    labels = split.labels[split.queries], split.labels[split.database]
    for seed in way.seeds:
        start = time.perf_counter()
        vectors = way.search(seed)
        seconds.append(time.perf_counter() - start)
        first = vectors if keep_vectors and first is None else first
        evaluations.append(evaluate(*vectors, *labels, k=split.k, seed=seed, curve=not evaluations))
    measured = Measured(way, evaluations, seconds, first)
    _, bits, published, strict, *_ = (row := measured.row()).values()
    print(f"{way.name:30} {bits:>5} bits: mAP {published}, strict {strict}, {row['seconds']} s", flush=True)
    return measured


def float_ways(features: np.ndarray, split: Split) -> list[Way]:
    """Search with the uncompressed features, which nothing random goes into."""
    data, bits = _parts(features, split), 32 * features.shape[1]
    return [
        Way("float cosine", bits, lambda _: baselines.float_cosine(*data), (0,)),
        Way("float cosine, centred", bits, lambda _: baselines.float_cosine(*data, centre=True), (0,)),
    ]


def code_ways(
    features: np.ndarray, split: Split, bits: int, codebook_bits: int, seeds: Sequence[int], without: Iterable[str]
) -> list[Way]:
    """What a user would pick instead, at equal bits, learnt from the train rows; without what is impossible."""
    data = _parts(features, split)

    def quantized(method: Callable[..., Vectors], **settings: Any) -> Callable[[int], Vectors]:
        return lambda seed: method(*data, bits, codebook_bits, seed=seed, **settings)

    ways = {
        "pq": ("PQ", quantized(baselines.pq)),
        "pq centred": ("PQ, centred", quantized(baselines.pq, centre=True)),
        "opq": ("OPQ", quantized(baselines.opq)),
        "itq": ("ITQ", lambda seed: baselines.itq(*data, bits, seed=seed)),
        "random": ("random projections", lambda seed: baselines.random_projections(*data, bits, seed=seed)),
        "random selected": (
            "random projections, selected",
            lambda seed: baselines.selected_projections(*data, bits, seed=seed),
        ),
    }
    absent = {*without, *impossible(*data[2].shape, bits, codebook_bits)}
    return [Way(name, bits, search, seeds) for key, (name, search) in ways.items() if key.split()[0] not in absent]


def impossible(rows: int, width: int, bits: int, codebook_bits: int) -> dict[str, str]:
    """Ways that there are none of for so many train rows of so many features, each with its reason."""
    found = {}
    padded = width + -width % (bits // codebook_bits)
    if rows < padded:  # FAISS would write beyond its memory
        found["opq"] = f"OPQ at {bits} bits, which needs {padded} rows to learn from and has {rows}"
    if bits > min(rows, width):
        found["itq"] = f"ITQ at {bits} bits, more than the {min(rows, width)} principal components of the train rows"
    return found


def model_ways(model: TCQModel, features: np.ndarray, split: Split, name: str) -> list[Way]:
    """Search with a model as it is: its float embeddings, then its codes."""
    bits = 32 * model.config.embedding_dim
    return [
        Way(f"{name}, float embedding", bits, lambda _: coded(model, features, split, as_codes=False), (0,)),
        Way(name, model.config.bits, lambda _: coded(model, features, split), (0,)),
    ]


def coded(model: TCQModel, features: np.ndarray, split: Split, as_codes: bool = True) -> Vectors:
    """Embeddings of the queries, and of the database what its codes restore, or embeddings too."""

    def run(rows: np.ndarray, name: str) -> np.ndarray:
        blocks = torch.from_numpy(features[rows]).split(_ROWS_AT_ONCE)
        return np.concatenate([model(features=block.to(model.device))[name].cpu().numpy() for block in blocks])

    with torch.inference_mode(), evaluation_mode(model):
        return run(split.queries, "embeddings"), run(split.database, "reconstruction" if as_codes else "embeddings")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, the latter where there is more than one value."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def figures_recipe(measured: Sequence[Measured], seeds: Sequence[int]) -> dict[str, Any]:
    """How figures came about: rules, ties, queries left out, chance."""
    first = measured[0].evaluations[0]
    return {
        f"mAP@{first.k}": "precision at each hit, summed over the first k, over the hits within k; rows of equal score "
        "in random order, by seed; a query without a relevant row counts 0",
        f"mAP@{first.k} strict": "the same sum over min(k, relevant rows); rows of equal score in every order, "
        "averaged; queries without a relevant row left out, as in P and R",
        "relevant": "rows of the query's label",
        "queries without a label": first.num_unlabelled,
        "queries without a relevant row": first.num_unmatched,
        "chance": f"{first.chance:.4f}, precision of a random order",
        "seeds": ", ".join(map(str, seeds)),
        "±": "sample standard deviation over the seeds, of what is random: fits, training, ties",
        "seconds": "to learn from the train rows and to encode queries and database, features at hand",
        "machine": machine(),
    }


def machine() -> str:
    """Processor, threads and versions in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = {"torch": torch, "timm": timm, "transformers": transformers, "datasets": datasets, "FAISS": faiss}
    versions = ", ".join(f"{name} {package.__version__}" for name, package in packages.items())
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}; tcq_hf {__version__}, "
        f"Python {platform.python_version()}, {versions}"
    )


def _parts(features: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return features[split.queries], features[split.database], features[split.train]
