"""Quality of the codes that model.initialize gives, beside FAISS PQ and OPQ on the same features."""

import hashlib

import datasets
import faiss
import numpy as np
import torch
from page import BACKBONE, data_folder, write_page

from tcq_hf import TCQImageProcessor, TCQModel, extract_features, mean_average_precision
from tcq_hf.evaluation.baselines import float_scores, pq_scores
from tcq_hf.evaluation.metrics import precision_at_k
from tcq_hf.model.quantization_tcq import ProductQuantizer

SEEDS = (0, 1, 2)
TEXT = """Clothing photographs, 10 unbalanced classes: the {queries} of the test split query the {base:,} of train and
validation. Pooled features of ViT-Ti/16 (ImageNet-21k then 1k, supervised; weights {weights}), 224 px. Everything is
fitted to the database without labels. mAP@1000 divides by the relevant rows found within 1,000; the figure with
min(1000, relevant) stands beside it. Ties in random order. Mean and deviation over the seeds {seeds} of fit and ties.
The start itself was chosen after a trial on these queries; see the end of the page. Query names: SHA-256 {names}."""

NOTES = """PQ with and without centring are the same FAISS call on features of unit norm; tcq_hf centres.
At 16 bits tcq_hf is ahead of both, at 32 bits level with centred PQ, at 64 bits behind it. More bits do not find better
here, and most codes beat the float vectors that they come from. OPQ is below PQ; its rotation has 3,409 rows to learn
from."""

DEAL = """## Why the principal components are rotated

Measured on other queries: the 341 of the validation split against the 3,068 of train; 32 bits, D = 128, seed 0. The
rows deal the centred principal components, of features at one length, to the four sub-spaces in different ways, before
the sub-vectors are scaled to unit norm, and try other starts. A first trial, on the test queries, had led to rotation,
centring and D = 128; these queries confirm rotation and centring; D = 192 is no worse than 128."""


def main() -> None:
    datasets.disable_progress_bars()
    data = data_folder()
    weights = data / BACKBONE / "model.safetensors"
    splits = {split: load(data, weights, split) for split in ("train", "validation", "test")}
    base, base_labels = (np.concatenate([splits[s][i] for s in ("train", "validation")]) for i in (0, 1))
    queries, labels, names = splits["test"]
    relevant = labels[:, None] == base_labels
    rows = [figures("float cosine", 32 * base.shape[1], [float_scores(queries, base)], relevant)]
    centred = [float_scores(queries - base.mean(0), base - base.mean(0))]
    rows.append(figures("float cosine, centred", 32 * base.shape[1], centred, relevant))
    for books in (2, 4, 8):
        bits = 8 * books
        rows += [
            figures(
                "tcq_hf, model.initialize", bits, [ours(books, weights, base, queries, s) for s in SEEDS], relevant
            ),
            figures("FAISS PQ", bits, [pq_scores(queries, base, books, seed=s) for s in SEEDS], relevant),
            figures("FAISS PQ, centred", bits, [pq_scores(queries, base, books, 8, True, s) for s in SEEDS], relevant),
            figures("FAISS OPQ", bits, [opq_scores(queries, base, books, s) for s in SEEDS], relevant),
        ]
    text = TEXT.format(
        queries=len(queries),
        base=len(base),
        weights=hashlib.sha256(weights.read_bytes()).hexdigest()[:12],
        seeds=", ".join(map(str, SEEDS)),
        names=hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12],
    )
    dealt = [
        {"start": way, "mAP@1000": f"{dealt_figure(splits['train'], splits['validation'], **how):.3f}"}
        for way, how in DEALINGS.items()
    ]
    write_page("initialize", "Quality of the start without labels", [text, rows, NOTES, DEAL, dealt])


def load(data, weights, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    model, processor = TCQModel.from_timm(BACKBONE, weights=weights), TCQImageProcessor.from_backbone(BACKBONE)
    dataset = datasets.load_dataset(str(data / "clothing"), split=split)
    return extract_features(dataset, model, processor), np.asarray(dataset["label"][:]), dataset["name"][:]


def figures(way: str, bits: int, runs: list[np.ndarray], relevant: np.ndarray) -> dict:
    hits = [mean_average_precision(scores, relevant, seed=seed) for seed, scores in enumerate(runs)]
    strict = [mean_average_precision(s, relevant, denominator="relevant", seed=seed) for seed, s in enumerate(runs)]
    first = [precision_at_k(scores, relevant, 10, seed=seed) for seed, scores in enumerate(runs)]
    values = {"mAP@1000": hits, "mAP@1000, min(k, relevant)": strict, "P@10": first}
    spread = {name: f"{np.mean(v):.3f}" + (f" ± {np.std(v):.3f}" if len(v) > 1 else "") for name, v in values.items()}
    return {"search with": way, "bits": bits, **spread}


@torch.inference_mode()
def ours(books: int, weights, base: np.ndarray, queries: np.ndarray, seed: int) -> np.ndarray:
    model = TCQModel.from_timm(BACKBONE, weights=weights, num_codebooks=books).initialize(base, seed=seed)
    restored = model(features=torch.from_numpy(base)).reconstruction
    return (model(features=torch.from_numpy(queries)).embeddings @ restored.T).numpy()


def opq_scores(queries: np.ndarray, base: np.ndarray, books: int, seed: int) -> np.ndarray:
    queries, base = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, base))
    product = faiss.ProductQuantizer(base.shape[1], books, 8)
    product.cp.seed = seed
    product.cp.min_points_per_centroid = 1
    rotation = faiss.OPQMatrix(base.shape[1], books)
    rotation.pq = product
    rotation.train(base)
    return pq_scores(rotation.apply(queries), rotation.apply(base), books, seed=seed)


def in_turns(width: int, books: int) -> np.ndarray:
    return np.concatenate([np.arange(m, width, books) for m in range(books)])


def there_and_back(width: int, books: int) -> np.ndarray:
    rounds = np.arange(width).reshape(-1, books)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.ravel()


DEALINGS = {
    "random rotation (what initialize does)": {"deal": "rotation"},
    "in order": {"deal": lambda width, books: np.arange(width)},
    "in turns": {"deal": in_turns},
    "there and back": {"deal": there_and_back},
    "random rotation, not centred": {"deal": "rotation", "centre": False},
    "random rotation, features at their own length": {"deal": "rotation", "unit": False},
    "random rotation, whitened": {"deal": "rotation", "whiten": True},
    "random rotation, D = 32": {"deal": "rotation", "width": 32},
    "random rotation, D = 64": {"deal": "rotation", "width": 64},
    "random rotation, D = 192": {"deal": "rotation", "width": 192},
}


def dealt_figure(train: tuple, validation: tuple, **how) -> float:
    return mean_average_precision(dealt_scores(train[0], validation[0], **how), validation[1][:, None] == train[1])


@torch.inference_mode()
def dealt_scores(base, queries, deal, centre=True, unit=True, whiten=False, width=128, books=4, seed=0) -> np.ndarray:
    if unit:
        base, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (base, queries))
    mean = base.mean(0) if centre else np.zeros_like(base[0])
    _, lengths, directions = np.linalg.svd(base - mean, full_matrices=False)
    directions = directions[:width] / (lengths[:width, None] if whiten else 1)
    if deal == "rotation":
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
        directions = turn @ directions
    else:
        directions = directions[deal(width, books)]
    quantizer = ProductQuantizer(books, 256, width // books, 10.0)
    stored, asked = (
        quantizer.normalize(torch.from_numpy(((v - mean) @ directions.T).astype(np.float32))) for v in (base, queries)
    )
    quantizer.initialize(stored, seed)
    return (asked @ quantizer.reconstruct(quantizer.codes(quantizer.lookup_table(stored))).T).numpy()


if __name__ == "__main__":
    main()
