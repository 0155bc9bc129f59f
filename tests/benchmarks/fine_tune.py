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
    TCQImageProcessor,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    build_index,
    codes_array,
    encode_dataset,
    evaluate,
    extract_features,
)
from tcq_hf.evaluation.baselines import float_cosine, pq
from tcq_hf.evaluation.protocols import by_labels

TEXT = """Clothing photographs, 10 unbalanced classes: the {queries} of the test split query the {database:,} of train
and validation, which are also what is learned from, without labels. ViT-Ti/16 (ImageNet-21k then 1k, supervised) at
{image_size} px, 32 bits; projection and codebooks start at `model.initialize`; then `TCQTrainer` trains the last
{blocks} blocks (learning rate {backbone_learning_rate}), projection and codebooks ({learning_rate}) for {epochs:g}
epochs of batches of 128 with `negative_share={share}`, temperature {temperature}: {seconds:.0f} s. The last epoch is
reported. The share is one over the number of classes, stated as prior knowledge; the other options were set once, from
a trial on the validation split, never on the test queries. Query names: SHA-256 {names}, seed {seed}."""

NOTES = """Before and after are one model, saved and loaded again. mAP@1000 divides by the relevant rows found within
1,000, with ties at random; strict by min(1000, relevant), with ties in expectation. The script is that of the
[tutorial on fine-tuning](../fine-tuning.md)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--backbone-learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="queries of the validation split; writes no page")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    split = by_labels(photographs(arguments.validation))
    model, processor = start(split.dataset.select(split.train), arguments)
    features = extract_features(split.dataset, model, processor)
    rows = [baseline_row(name, vectors, split) for name, vectors in baselines(features, split).items()]
    rows.append(row("tcq_hf, before (model.initialize)", model, processor, split))
    seconds = fine_tune(model, processor, split.dataset.select(split.train), arguments)
    rows.append(row(f"tcq_hf, after {arguments.epochs:g} epochs", model, processor, split))
    values = vars(arguments) | {"seconds": seconds, "names": split.recipe["query_names_sha256"]}
    text = TEXT.format(queries=len(split.queries), database=len(split.database), **values)
    if arguments.validation:
        print(arguments, *rows, sep="\n")
    else:
        write_page("fine_tune", "Fine-tuning on photographs", [text, rows, NOTES])


def photographs(validation: bool) -> datasets.DatasetDict:
    data = datasets.load_dataset(str(data_folder() / "clothing"))
    return datasets.DatasetDict(train=data["train"], test=data["validation"]) if validation else data


def start(pictures: datasets.Dataset, arguments: argparse.Namespace) -> tuple[TCQModel, TCQImageProcessor]:
    side, weights = arguments.image_size, data_folder() / BACKBONE / "model.safetensors"
    model = TCQModel.from_timm(BACKBONE, weights=weights, num_codebooks=4, image_size=side)
    processor = TCQImageProcessor.from_backbone(BACKBONE, image_size=side)
    model.initialize(extract_features(pictures, model, processor), seed=arguments.seed)
    return model, processor


def fine_tune(
    model: TCQModel, processor: TCQImageProcessor, pictures: datasets.Dataset, arguments: argparse.Namespace
) -> float:
    model.freeze_backbone().backbone.blocks[-arguments.blocks :].requires_grad_(True)
    model.backbone.norm.requires_grad_(True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        TCQTrainer(
            model,
            TCQTrainingArguments(
                folder,
                num_train_epochs=arguments.epochs,
                negative_filter="fraction",
                negative_share=arguments.share,
                positives="views",
                temperature=arguments.temperature,
                learning_rate=arguments.learning_rate,
                backbone_learning_rate=arguments.backbone_learning_rate,
                seed=arguments.seed,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
            ),
            pictures,
            processing_class=processor,
        ).train()
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
    if (stored != codes_array(database)).any(axis=1).mean() > 1e-4:
        raise RuntimeError("the index of the dataset does not hold the codes of the model")
    with torch.inference_mode():
        restored = loaded.quantizer.reconstruct(torch.from_numpy(codes_array(database))).numpy()
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
