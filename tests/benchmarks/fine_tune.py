"""Fine-tuning the last blocks of a ViT on photographs without labels: before and after."""

import argparse
import tempfile
import time

import datasets
import faiss
import numpy as np
import torch
from page import BACKBONE, data_folder, write_page

from tcq_hf import (
    FeatureCache,
    TCQImageProcessor,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    build_index,
    codes_array,
    encode_dataset,
    evaluate,
)
from tcq_hf.evaluation.baselines import float_cosine, pq
from tcq_hf.evaluation.protocols import by_labels

TEXT = """Clothing photographs, 10 unbalanced classes: the {queries} of the test split query the {database:,} of train
and validation, which are also what is learned from, without labels. ViT-Ti/16 (ImageNet-21k then 1k, supervised) at
{image_size} px, 32 bits. First the head alone learns from cached features, with all defaults: {head_seconds:.0f} s.
Then the last {blocks} blocks (learning rate {backbone_learning_rate}) and the head ({learning_rate}) learn from
pictures for {epochs:g} epochs of batches of 128, all else default: {seconds:,.0f} s. The last epoch is reported. The
learning rates and the number of epochs were set beforehand, by no query at all. Query names: SHA-256 {names}, seed
{seed}."""

NOTES = """Each model is measured as it is saved and loaded again. mAP@1000 divides by the relevant rows found within
1,000, with ties at random; strict by min(1000, relevant), with ties in expectation. The way is that of the
[tutorial on fine-tuning](../fine-tuning.md)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--backbone-learning-rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="queries of the validation split; writes no page")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    split = by_labels(photographs(arguments.validation))
    pictures = split.dataset.select(split.train)
    weights = data_folder() / BACKBONE / "model.safetensors"
    model = TCQModel.from_timm(BACKBONE, weights, num_codebooks=4, image_size=arguments.image_size).freeze_backbone()
    processor = TCQImageProcessor.from_backbone(BACKBONE, image_size=arguments.image_size)
    cache = FeatureCache(split.dataset, model, processor)
    rows = [baseline_row(name, vectors, split) for name, vectors in baselines(cache.features(), split).items()]
    model.initialize(cache.features()[split.train], seed=arguments.seed)
    head_seconds = train(model, cache.select(split.train), seed=arguments.seed)
    rows.append(row("tcq_hf, head trained, backbone frozen", model, processor, split))
    print(*rows, sep="\n", flush=True)
    seconds = fine_tune(model, processor, pictures, arguments)
    rows.append(row(f"tcq_hf, then {arguments.blocks} blocks for {arguments.epochs:g} epochs", model, processor, split))
    values = vars(arguments) | {
        "seconds": seconds,
        "head_seconds": head_seconds,
        "names": split.recipe["query_names_sha256"],
    }
    text = TEXT.format(queries=len(split.queries), database=len(split.database), **values)
    if arguments.validation:
        print(arguments, f"{head_seconds:.0f} s, {seconds:.0f} s", *rows, sep="\n")
    else:
        write_page("fine_tune", "Fine-tuning on photographs", [text, rows, NOTES])


def photographs(validation: bool) -> datasets.DatasetDict:
    data = datasets.load_dataset(str(data_folder() / "clothing"))
    return datasets.DatasetDict(train=data["train"], test=data["validation"]) if validation else data


def fine_tune(
    model: TCQModel, processor: TCQImageProcessor, pictures: datasets.Dataset, arguments: argparse.Namespace
) -> float:
    model.backbone.blocks[-arguments.blocks :].requires_grad_(True)
    model.backbone.norm.requires_grad_(True)
    return train(
        model,
        pictures,
        processor,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        backbone_learning_rate=arguments.backbone_learning_rate,
        seed=arguments.seed,
    )


def train(
    model: TCQModel, pictures: datasets.Dataset | FeatureCache, processor: TCQImageProcessor | None = None, **options
) -> float:
    """Seconds that it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TCQTrainingArguments(folder, logging_steps=10, save_strategy="no", report_to="none", **options)
        TCQTrainer(model, arguments, pictures, processing_class=processor).train()
    return time.perf_counter() - begin


def row(way: str, model: TCQModel, processor: TCQImageProcessor, split) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = TCQModel.from_pretrained(folder).eval()
    encoded = encode_dataset(split.dataset, loaded, processor, embeddings=True)
    embeddings = np.float32(encoded.with_format("numpy")["embedding"][:])
    database = encoded.select(split.database).flatten_indices()
    database.add_faiss_index("embedding", custom_index=build_index(loaded))
    stored = faiss.vector_to_array(database.get_index("embedding").faiss_index.codes).reshape(len(database), -1)
    codes = codes_array(database)
    with torch.inference_mode():
        table = loaded.quantizer.lookup_table(torch.from_numpy(embeddings[split.database])).numpy()
        restored = loaded.quantizer.reconstruct(torch.from_numpy(codes)).numpy()
    scores = [np.take_along_axis(table, each[..., None].astype(np.int64), axis=2) for each in (stored, codes)]
    # Invariant 1: one code in 10,000, and that a tie. Each inner product sums sub_dim terms, rounded at 2^-24.
    if (stored != codes).mean() > 1e-4 or np.abs(scores[0] - scores[1]).max() > loaded.config.sub_dim * 2**-24:
        raise RuntimeError("the index of the dataset does not hold the codes of the model")
    return baseline_row(way, (embeddings[split.queries], restored), split)


def baselines(features: np.ndarray, split) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts = features[split.queries], features[split.database], features[split.train]
    return {
        "float cosine, centred, frozen features": float_cosine(*parts, centre=True),
        "FAISS PQ 32 bits, centred, frozen features": pq(*parts, bits=32, centre=True),
    }


def baseline_row(way: str, vectors: tuple[np.ndarray, np.ndarray], split) -> dict:
    found = evaluate(*vectors, split.labels[split.queries], split.labels[split.database], k=split.k)
    return {
        "search with": way,
        "mAP@1000": f"{found.map_published:.3f}",
        "mAP@1000, strict": f"{found.map_strict:.3f}",
        "P@10": f"{found.precision[10]:.3f}",
    }


if __name__ == "__main__":
    main()
