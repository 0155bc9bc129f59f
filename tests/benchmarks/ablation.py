"""What each choice of the training is worth, on every labelled set, and whether the label-free figure says so."""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from datasets import load_dataset
from page import BACKBONE, data_folder, write_page

from tcq_hf import FeatureCache, TCQImageProcessor, TCQModel, TCQTrainer, TCQTrainingArguments
from tcq_hf.evaluation import baselines
from tcq_hf.evaluation.metrics import evaluate
from tcq_hf.evaluation.protocols import Split, by_labels, cifar10_ii, validation
from tcq_hf.training import pseudo_labels
from tcq_hf.training.figures import neighbourhood_quality
from tcq_hf.training.pseudo_labels import PseudoLabelCallback

TEXT = """Frozen ViT-Ti/16 (ImageNet-21k then 1k, supervised), 224 px; {bits}-bit codes; mAP@1000 (hits within k) over
the seeds {seeds}. **No row has seen a test query**: a tenth of the training pictures of each set, drawn by class, query
the others, and these are learnt from without labels. Every row is the default training with the one change that it
names. The sets: product photographs (`clothing`, ten classes of 155 to 1,011), the 5,000 training pictures of CIFAR-10
(II){fashion}{subsets}. *worst* is the smallest difference to PQ, and *loses to default* counts the sets where the row
is more than 0.005 below the default."""
FASHION = ", the 10,000 test pictures of Fashion-MNIST"
SUBSETS = """, and subsets of the database of CIFAR-10 (I): three classes (airplane, cat, ship), five (airplane,
automobile, deer, frog, truck), and ten of sizes that fall from 2,000 by a factor of 0.7"""

QUALITY = """`eval_quality` against mAP, over all rows above that learn, seed {seed}: Pearson's correlation on each set.
It needs no labels: neighbourhoods of the database embeddings that agree with each other."""

RESOLUTIONS = pseudo_labels._RESOLUTIONS
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
ROWS = {
    "default: auto, neighbours, T 0.5, dropout 0.5": {},
    "no filter": {"negative_filter": "none"},
    "positives: own views": {"positives": "views"},
    "no filter, own views (vanilla)": {"negative_filter": "none", "positives": "views"},
    **{f"fixed share {share}": {"negative_filter": "fraction", "negative_share": share} for share in SHARES},
    "fixed share 0.1, own views": {"negative_filter": "fraction", "negative_share": 0.1, "positives": "views"},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.7": {"temperature": 0.7},
    "feature dropout 0.1": {"feature_dropout": 0.1},
    "feature dropout 0.3": {"feature_dropout": 0.3},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "learning rate 3e-3": {"learning_rate": 3e-3},
    "10 epochs": {"num_train_epochs": 10},
    "40 epochs": {"num_train_epochs": 40},
    "batch 256": {"per_device_train_batch_size": 256},
    "cross-quantised loss": {"loss_form": "cross"},
    "usage weight 0.1": {"usage_weight": 0.1},
    "groups anew after 10 epochs": {"regroup": 10},
    "groups at resolution 1 only": {"resolutions": (1.0,)},
    "groups at resolution 0.5 only": {"resolutions": (0.5,)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", help="folder of class folders of Fashion-MNIST pictures")
    parser.add_argument("--subsets", action="store_true", help="classes of CIFAR-10 as further sets")
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    weights = data_folder() / "vit_tiny_patch16_224" / "model.safetensors"
    model = TCQModel.from_timm(BACKBONE, weights, num_codebooks=arguments.bits // 8).freeze_backbone()
    processor = TCQImageProcessor.from_backbone(BACKBONE)
    table: dict[str, dict[str, float]] = {name: {} for name in ("PQ", "PQ, centred", "OPQ", "start", *ROWS)}
    qualities = {}
    for name, split in sets(arguments):
        cache = FeatureCache(split.dataset, model, processor)
        found = measure(model, cache, split, arguments)
        for way, (figure, _) in found.items():
            table[way][name] = figure
        pairs = np.array([(figure, quality) for way, (figure, quality) in found.items() if way in ROWS])
        qualities[name] = f"{np.corrcoef(pairs.T)[0, 1]:.2f}"
    asked = {"fashion": FASHION if arguments.fashion else "", "subsets": SUBSETS if arguments.subsets else ""}
    text = TEXT.format(bits=arguments.bits, seeds=", ".join(map(str, range(arguments.seeds))), **asked)
    rows = [summary(way, figures, table) for way, figures in table.items()]
    parts = [text, rows, QUALITY.format(seed=0), [{"": "correlation", **qualities}]]
    write_page("ablation", "Ablation of the training", parts)


def sets(arguments: argparse.Namespace) -> Iterator[tuple[str, Split]]:
    """Validation splits by name, of the rows that they use."""
    for name, split in all_sets(arguments):
        rows = np.union1d(split.queries, split.database)
        places = {field: np.searchsorted(rows, getattr(split, field)) for field in ("queries", "database", "train")}
        names = [split.names[row] for row in rows]
        yield name, replace(split, dataset=split.dataset.select(rows), labels=split.labels[rows], names=names, **places)


def all_sets(arguments: argparse.Namespace) -> Iterator[tuple[str, Split]]:
    yield "clothing", validation(by_labels(load_dataset(str(data_folder() / "clothing"))))
    cifar = load_dataset(str(data_folder() / "cifar10"))
    yield "CIFAR-10 (II)", validation(cifar10_ii(cifar))
    if arguments.fashion:
        yield "Fashion-MNIST", validation(by_labels(load_dataset(arguments.fashion)["train"]))
    if not arguments.subsets:
        return
    split = cifar10_ii(cifar)
    falling = dict(zip((3, 8, 1, 5, 0, 9, 2, 7, 4, 6), (int(2000 * 0.7**i) for i in range(10)), strict=True))
    for name, sizes in (
        ("3 classes", dict.fromkeys((0, 3, 8), 1700)),
        ("5 classes", dict.fromkeys((0, 1, 4, 6, 9), 1000)),
        ("falling sizes", falling),
    ):
        generator = np.random.default_rng(7)
        labels = split.labels[split.database]
        rows = [generator.permutation(split.database[labels == label])[:size] for label, size in sizes.items()]
        yield name, validation(replace(split, train=np.sort(np.concatenate(rows))))


def measure(model: TCQModel, cache: FeatureCache, split, arguments: argparse.Namespace) -> dict:
    """Figure and label-free quality of each way."""
    features, seeds = cache.features(), range(arguments.seeds)
    data = [features[rows] for rows in (split.queries, split.database, split.train)]
    quantizers = {
        "PQ": baselines.pq,
        "PQ, centred": lambda *given, **settings: baselines.pq(*given, centre=True, **settings),
        "OPQ": baselines.opq,
    }
    found = {}
    for way, method in quantizers.items():
        figures = [score(method(*data, arguments.bits, seed=seed), split) for seed in seeds]
        found[way] = (float(np.mean(figures)), 0.0)
    train = cache.select(split.train)
    for way, options in {"start": None, **ROWS}.items():
        runs = [learn(model, train, data, split, options, seed) for seed in seeds]
        found[way] = (float(np.mean([run[0] for run in runs])), runs[0][1])
        print(f"{split.name:20} {len(split.train):6} {way:40} {found[way][0]:.4f} {found[way][1]:.4f}", flush=True)
    return found


def learn(model: TCQModel, train: FeatureCache, data: list, split, options: dict | None, seed: int) -> tuple:
    model.initialize(data[2], seed=seed)
    if options is not None:
        with tempfile.TemporaryDirectory() as folder:
            given = {name: value for name, value in options.items() if name not in ("regroup", "resolutions")}
            settings = {"seed": seed, "save_strategy": "no", "report_to": "none", "logging_strategy": "no"}
            trainer = TCQTrainer(model, TCQTrainingArguments(folder, disable_tqdm=True, **settings, **given), train)
            if "regroup" in options:
                trainer.add_callback(PseudoLabelCallback(trainer, options["regroup"], options["regroup"]))
            with mock.patch.object(pseudo_labels, "_RESOLUTIONS", options.get("resolutions", RESOLUTIONS)):
                trainer.train()
    model.eval()
    queries, database = vectors_of(model, data[0])[0], vectors_of(model, data[1])
    return score((queries, database[1]), split), neighbourhood_quality(database[0], seed)


@torch.inference_mode()
def vectors_of(model: TCQModel, features: np.ndarray) -> list[np.ndarray]:
    """Embeddings and what their codes restore."""
    outputs = [model(features=block) for block in torch.from_numpy(features).split(4096)]
    return [np.concatenate([output[name].numpy() for output in outputs]) for name in ("embeddings", "reconstruction")]


def score(vectors: tuple[np.ndarray, np.ndarray], split) -> float:
    return evaluate(*vectors, split.labels[split.queries], split.labels[split.database], k=split.k).map_published


def summary(way: str, figures: dict[str, float], table: dict) -> dict:
    default = table[next(iter(ROWS))]
    return {
        "": way,
        **{name: f"{figure:.4f}" for name, figure in figures.items()},
        "worst": f"{min(figure - table['PQ'][name] for name, figure in figures.items()):+.3f}",
        "loses to default": sum(figure < default[name] - 0.005 for name, figure in figures.items()),
    }


if __name__ == "__main__":
    main()
