"""`tcq-hf train`: pictures in, a model trained on them without labels out."""

import argparse
import functools
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from tcq_hf import (
    FeatureCache,
    TCQImageProcessor,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    extract_features,
    hub,
)
from tcq_hf.evaluation.report import text_table
from tcq_hf.index.code_cache import weights_digest
from tcq_hf.index.decoding import raw_pictures
from tcq_hf.training.adapters import add_lora, check_peft
from tcq_hf.training.batches import class_labels

from . import inputs
from .options import ModelOptions, OptionsParser

_EXAMPLES = """\
  tcq-hf train --dataset pictures/ --backbone vit_tiny_patch16_224 --bits 32 --output-dir my-model
  tcq-hf train --dataset pictures/ --model my-model --train-blocks 2 --views photo --output-dir better-model
  tcq-hf train --dataset pictures/ --lora 8 --loss-chunk-size 32 --output-dir my-model     adapters; large batches
  tcq-hf train run.yaml --num-train-epochs 40         options in a file; those of the command line come first

run.yaml:
  dataset: pictures/
  backbone: vit_tiny_patch16_224
  output_dir: my-model
  learning_rate: 1e-3

Options are written with - or _. Labels are never trained with; where there are some, they make the figures before and
after. Without --eval-split and --eval-dataset these come from pictures of the training set.
"""

_BACKBONE = "vit_tiny_patch16_224"
_DEFAULTS = {"seed": 0, "save_strategy": "epoch", "save_total_limit": 2, "logging_steps": 0.05}
_OF_A_NEW_MODEL = ("backbone", "weights", "bits", "embedding_dim", "codebook_size", "image_size", "fit_rows")
_EVALUATED_ROWS = 1000


@dataclass
class TrainOptions(ModelOptions):
    """Options of the command that are none of the Trainer."""

    bits: int = field(default=64, metadata={"help": "Bits of a code, a multiple of 8."})
    fit_rows: int = field(
        default=20_000, metadata={"help": "Pictures that a new model is started from, before any training."}
    )
    train_blocks: int = field(
        default=0,
        metadata={
            "help": "Blocks of the backbone that are trained too, from its end. 0: none, each picture runs through it "
            "once; -1: the whole backbone."
        },
    )
    lora: int = field(
        default=0,
        metadata={
            "metavar": "RANK",
            "help": "Rank of the adapters (LoRA) that are trained in the backbone instead of its blocks; needs peft. "
            "0: none.",
        },
    )
    eval_dataset: str | None = field(default=None, metadata={"metavar": "NAME", "help": "Pictures for the figures."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of them (otherwise of --dataset)."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(
        *(commands, "train", "train a model on pictures without labels", _EXAMPLES),
        usage="tcq-hf train [FILE] --dataset NAME --output-dir DIR [options]",
        dataclass_types=[TrainOptions, TCQTrainingArguments],
        defaults=_DEFAULTS,
        allow_abbrev=False,
    )
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: OptionsParser, arguments: argparse.Namespace) -> None:
    """Start or load a model, train, save, print the figures before and after."""
    values = parser.given(arguments, required=("dataset", "output_dir"))
    options, training = parser.parse_dict(_DEFAULTS | values)
    _check(parser, options, values)
    inputs.output_folder(training.output_dir, "--output-dir")
    checkpoint = _checkpoint(training, options.resume)
    dataset = inputs.load_pictures(options.dataset, options.split)
    training.image_column = inputs.image_column(dataset, values.get("image_column"))
    eval_pictures, rows, about = _eval_pictures(dataset, options, training.seed)
    training.label_column = values.get("label_column") or inputs.label_column(eval_pictures) or training.label_column
    class_labels(eval_pictures, training.label_column)  # refuses what are no labels before anything is computed
    model, processor = _model(options)
    thaw(model, options.train_blocks)
    model.to(training.device)
    data, eval_data = dataset, eval_pictures
    if not options.train_blocks and not options.lora:
        data = _cached(dataset, model, processor, training, options.cached_views)
        views = min(2, options.cached_views)
        eval_data = _cached(eval_pictures, model, processor, training, views) if rows is None else data.select(rows)
    if not options.model and not checkpoint:
        _start(model, processor, data, options, training)
    model = add_lora(model, options.lora) if options.lora else model

    def trainer() -> TCQTrainer:
        return TCQTrainer(model, training, data, eval_data, processor)

    # A trainer of its own, so that no checkpoint carries these figures.
    figures = {} if checkpoint else {"before": trainer().evaluate()}
    learner = trainer()
    learner.train(resume_from_checkpoint=checkpoint)
    figures["after"] = learner.evaluate()
    learner.save_model()
    if learner.is_world_process_zero():
        if training.negative_filter == "auto":
            print(f"found without labels: {learner.pseudo_labels}")
        _report(figures, eval_pictures, about, hub.merged(model), options, training)


def thaw(model: TCQModel, blocks: int) -> None:
    """Freeze the backbone but for its last blocks; -1 freezes nothing.

    Raises:
        ValueError: If the backbone has no blocks, or fewer.
    """
    if blocks == -1:
        return
    model.freeze_backbone()
    if blocks:
        name, found = model.config.backbone, getattr(model.backbone, "blocks", None)
        if found is None:
            raise ValueError(
                f"--train-blocks {blocks}: the backbone {name!r} has no 'blocks'; choose 0 (frozen) or -1 (all of it)"
            )
        if not 0 < blocks <= len(found):
            raise ValueError(f"--train-blocks must be from -1 to {len(found)}, the blocks of {name!r}, got {blocks}")
        found[-blocks:].requires_grad_(True)


def _check(parser: OptionsParser, options: TrainOptions, values: dict[str, Any]) -> None:
    """Refuse options that say nothing together."""
    lost = [f"--{name.replace('_', '-')}" for name in _OF_A_NEW_MODEL if name in values]
    if options.model and lost:
        parser.error(f"--model goes on with a saved model, {', '.join(lost)} would be for a new one")
    if options.lora:
        check_peft()
    if options.train_blocks and options.lora:
        parser.error("--lora trains adapters instead of blocks: leave out --train-blocks")
    if (options.train_blocks or options.lora) and options.cached_views != 1:
        parser.error("--cached-views is for a frozen backbone, --train-blocks 0 and no --lora")


def _checkpoint(training: TCQTrainingArguments, resume: bool) -> str | None:
    """Where to go on from, if anywhere."""
    found = get_last_checkpoint(training.output_dir)
    if training.resume_from_checkpoint:
        return training.resume_from_checkpoint
    if resume and found is None:
        raise ValueError(f"--resume: there is no checkpoint in {training.output_dir}")
    if found and not resume:
        raise ValueError(
            f"{training.output_dir} has a checkpoint of an earlier run, {Path(found).name}: go on from it with "
            "--resume, or choose another --output-dir"
        )
    if found:
        print(f"going on from {found}")
    return found


def _model(options: TrainOptions) -> tuple[TCQModel, TCQImageProcessor]:
    if options.model:
        return inputs.load_model(options.model)
    fields = {"embedding_dim": options.embedding_dim, "image_size": options.image_size}
    fields |= inputs.config_fields(options.bits, options.codebook_size)
    model = TCQModel.from_timm(options.backbone or _BACKBONE, options.weights, **fields)
    return model, inputs.new_processor(model.config)


def _cached(
    dataset: Dataset, model: TCQModel, processor: TCQImageProcessor, training: TCQTrainingArguments, views: int
) -> FeatureCache:
    return FeatureCache(
        *(dataset, model, processor, views, training.views, training.seed, training.image_column),
        batch_size=training.per_device_eval_batch_size,
    )


def _start(
    model: TCQModel,
    processor: TCQImageProcessor,
    data: Dataset | FeatureCache,
    options: TrainOptions,
    training: TCQTrainingArguments,
) -> None:
    """Set projection and codebooks of a new model."""
    sample = data.select(_drawn(len(data), options.fit_rows, training.seed))
    if isinstance(sample, FeatureCache):
        features = sample.features()
    else:
        features = extract_features(sample, model, processor, training.image_column)
    model.initialize(features, seed=training.seed)
    print(f"new model: projection and codebooks start at PCA and k-means of {len(sample):,} pictures, no labels")


def _eval_pictures(dataset: Dataset, options: TrainOptions, seed: int) -> tuple[Dataset, np.ndarray | None, str]:
    """Pictures that the figures come from, their rows if they are those trained on, and what they are."""
    if options.eval_dataset or options.eval_split:
        name = options.eval_dataset or options.dataset
        found = inputs.load_pictures(name, options.eval_split, "--eval-dataset")
        return found, None, f"{len(found):,} pictures of {name} {options.eval_split or ''}".rstrip()
    rows = _drawn(len(dataset), _EVALUATED_ROWS, seed)
    drawn = f"{len(rows):,} of the {len(dataset):,} pictures trained on, drawn with seed {seed}"
    return dataset.select(rows), rows, drawn if len(rows) < len(dataset) else f"all {len(rows):,} pictures trained on"


def _drawn(count: int, most: int, seed: int) -> np.ndarray:
    """Row numbers, all or so many at random."""
    return np.arange(count) if count <= most else np.random.default_rng(seed).permutation(count)[:most]


def _report(
    figures: dict[str, dict[str, float]],
    pictures: Dataset,
    about: str,
    model: TCQModel,
    options: TrainOptions,
    training: TCQTrainingArguments,
) -> None:
    """Print the figures, how they came about, where the model is, and what comes next."""
    k = min(1000, len(pictures) - 1)
    names_digest = inputs.identity(raw_pictures(pictures, training.image_column))["files_sha256"]
    names = {
        "eval_map": f"mAP@{k}",
        "eval_map_strict": f"mAP@{k} strict",
        "eval_precision@10": "P@10",
        "eval_quality": "quality",
        "eval_view_recall@1": "view recall@1",
        "eval_quantization_error": "quantization error",
    }
    rows = [
        {"training": when} | {text: found[name] for name, text in names.items() if name in found}
        for when, found in figures.items()
    ]
    best = f"best checkpoint by {training.metric_for_best_model} on these pictures"
    lines = {
        "figures": f"{about}, each queries the others; SHA-256 of their file names {names_digest[:12]}",
        "mAP": f"over the hits within k, ties at random, seed {training.seed}; "
        "strict: over min(k, relevant), ties in expectation",
        "model": f"{best if training.load_best_model_at_end else 'last step'}, {model.config.bits} bits, "
        f"weights SHA-256 {weights_digest(model)[:12]}",
        "backbone": f"{model.config.backbone}, SHA-256 {weights_digest(model.backbone)[:12]}",
    }
    print(f"\n{text_table(rows)}\n")
    print("\n".join(f"{name + ':':10}{text}" for name, text in lines.items()))
    split = ["--split", options.split] if options.split else []
    following = ["--dataset", options.dataset, *split, "--model", training.output_dir, "--output", "codes.parquet"]
    print(f"\nmodel -> {training.output_dir}\nnext: tcq-hf encode {shlex.join(following)}")
