"""`tcq-hf evaluate`: labelled pictures and a model or a backbone in, figures beside those of other searches out."""

import argparse
import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel
from transformers import __version__

from tcq_hf import FeatureCache, TCQConfig, TCQImageProcessor, TCQModel, TCQTrainingArguments
from tcq_hf.evaluation.protocols import PROTOCOLS, Split
from tcq_hf.evaluation.report import Cell
from tcq_hf.index.code_cache import weights_digest
from tcq_hf.index.decoding import raw_pictures, read_picture

from . import comparison, inputs, results
from .comparison import Measured
from .learned import OTHER_TRAINING, Learner
from .options import ModelOptions, OptionsParser

_EXAMPLES = """\
  tcq-hf evaluate --dataset pictures/ --model my-model
  tcq-hf evaluate --dataset pictures/ --backbone vit_tiny_patch16_224 --bits 16 32 64 --shares 0 0.1 0.2
  tcq-hf evaluate --dataset cifar10 --protocol cifar10-ii --backbone vit_tiny_patch16_224 --seeds 5 --output cifar10-ii
  tcq-hf evaluate run.yaml --without opq          options in a file; those of the command line come first

With --model the codes of a saved model are measured. With --backbone projection and codebooks are trained without
labels on the train rows of the protocol, from features of the frozen backbone. Beside them stand the float features,
PQ and others on the same features. Labels make the figures alone: the last epoch is what is measured, and nothing is
chosen by a query. The figures go to results.json, table and pictures to results.md: precision and recall, mAP over bits
and over shares, and the queries that fail most.
"""

_DEFAULTS = {"logging_strategy": "no", "disable_tqdm": True}
# What a run sets itself.
_SET_HERE = {
    "output_dir": "--output",
    "seed": "--seeds",
    "data_seed": "--seeds",
    **dict.fromkeys(("eval_strategy", "save_strategy", "load_best_model_at_end", "push_to_hub")),
    "resume_from_checkpoint": None,
}
_OF_A_NEW_MODEL = ("weights", "bits", "embedding_dim", "codebook_size", "image_size", "cached_views", "shares")
_OF_ANY_MODEL = ("image_column", "label_column", "per_device_eval_batch_size", "use_cpu")


@dataclass
class EvaluateOptions(ModelOptions):
    """Options of the command that are none of the Trainer."""

    bits: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"metavar": "N", "help": "Bits of the codes, multiples of 8."}
    )
    protocol: str = field(
        default="labels",
        metadata={
            "choices": list(PROTOCOLS),
            "help": "Who queries whom. labels: the test split, if there is one, or else a tenth of the rows, at most "
            "1,000, query the rest.",
        },
    )
    name_column: str = field(
        default="name",
        metadata={"help": "Column of names, by which splits are told apart; none takes the rows as they stand."},
    )
    seeds: int = field(default=3, metadata={"help": "Number of seeds, 0 and up, of all that is random."})
    shares: list[float] = field(
        default_factory=list,
        metadata={
            "metavar": "X",
            "help": "Shares of negatives to drop, all else as asked for: a curve over the share, at the number of bits "
            "in the middle of --bits.",
        },
    )
    without: list[str] = field(
        default_factory=list,
        metadata={"choices": comparison.OPTIONAL, "help": "Searches to leave out; OPQ takes longest."},
    )
    output: str = field(default="tcq-hf-evaluation", metadata={"metavar": "DIR", "help": "Folder to write."})


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(
        *(commands, "evaluate", "measure a search with labelled pictures", _EXAMPLES),
        usage="tcq-hf evaluate [FILE] --dataset NAME (--model NAME | --backbone NAME) [options]",
        dataclass_types=[EvaluateOptions, TCQTrainingArguments],
        defaults=_DEFAULTS,
        unshown=(*_SET_HERE, "save_total_limit"),
        allow_abbrev=False,
    )
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: OptionsParser, arguments: argparse.Namespace) -> None:
    """Split, extract features, measure one way of searching after the other, write."""
    values = parser.given(arguments, required=("dataset",))
    _check(parser, values)
    output = inputs.output_folder(values.get("output", EvaluateOptions.output), "--output")
    with tempfile.TemporaryDirectory(dir=output, prefix=".training-") as place:
        values = _DEFAULTS | values | {"output_dir": place, "save_strategy": "no"}
        options, training = parser.parse_dict(values)
        split, label_column = _split(options, values)
        training.image_column = inputs.image_column(split.dataset, values.get("image_column"))
        configs, model, processor = _models(options)
        if len(split.train) < configs[0].codebook_size:
            raise ValueError(
                f"the protocol has {len(split.train)} rows to learn from, fewer than the {configs[0].codebook_size} "
                "codewords of a codebook: lower --codebook-size"
            )
        model.freeze_backbone().to(training.device)
        cache = FeatureCache(
            *(split.dataset, model, processor),
            image_column=training.image_column,
            batch_size=training.per_device_eval_batch_size,
        )
        features, seeds = cache.features(), range(options.seeds)
        ways, left_out = comparison.float_ways(features, split), list(options.without)
        for config in configs:
            codebook_bits = config.codebook_size.bit_length() - 1
            ways += comparison.code_ways(features, split, config.bits, codebook_bits, seeds, options.without)
            shape = len(split.train), features.shape[1]
            left_out += comparison.impossible(*shape, config.bits, codebook_bits).values()
            if options.model:
                ways += comparison.model_ways(model, features, split, f"tcq_hf, {Path(options.model).name}")
            else:
                train = cache.select(split.train)
                if options.cached_views > 1:
                    train = _more_views(split, model, processor, options, training)
                shares = options.shares if config is configs[len(configs) // 2] else []
                ways += Learner(config, model, features, split, train, values).ways(seeds, shares)
        measured = [comparison.measure(way, split, keep_vectors=way is ways[-1]) for way in ways]
    recipe = _recipe(split, model, options, training, values, measured, left_out)
    title = f"{recipe['protocol']} on {Path(options.dataset).name}: {options.model or options.backbone}"
    cell = _cells(split, training.image_column, label_column, processor)
    results.write(output, title, measured, recipe, split, cell)


def _check(parser: OptionsParser, values: dict[str, Any]) -> None:
    """Refuse options that say nothing together."""
    if ("model" in values) == ("backbone" in values):
        parser.error("give one of --model, to measure it, and --backbone, to train on its features")
    of_training = [name for name in TCQTrainingArguments.__dataclass_fields__ if name not in _OF_ANY_MODEL]
    lost = [name for name in (*_OF_A_NEW_MODEL, *of_training) if name in values]
    if "model" in values and lost:
        parser.error(f"--model measures a saved model: {_listed(lost)} would be for one to train")
    ours = [name for name in _SET_HERE if name in values]
    if ours:
        hints = sorted({hint for name in ours if (hint := _SET_HERE[name])})
        parser.error(f"{_listed(ours)}: set by evaluate itself{'; use ' + ', '.join(hints) if hints else ''}")
    if values.get("seeds", 1) < 1:
        parser.error(f"--seeds must be at least 1, got {values['seeds']}")
    wrong = [share for share in values.get("shares", []) if not 0 <= share < 1]
    if wrong:
        parser.error(f"--shares must be at least 0 and below 1, got {wrong[0]}")


def _listed(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _split(options: EvaluateOptions, values: dict[str, Any]) -> tuple[Split, str]:
    """Who queries whom, and the column of labels that says what belongs together."""
    dataset = inputs.load_splits(options.dataset, options.split)
    one = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    label = values.get("label_column") or inputs.label_column(one) or "label"
    names = None if options.name_column == "none" else options.name_column
    return PROTOCOLS[options.protocol](dataset, label_column=label, name_column=names), label


def _cells(split: Split, image_column: str, label_column: str, processor: TCQImageProcessor) -> Callable[[int], Cell]:
    """A function of the number of a row that gives its picture with the name of its label."""
    pictures, feature = raw_pictures(split.dataset, image_column), split.dataset.features[label_column]

    def cell(row: int) -> Cell:
        label = int(split.labels[row])
        named = isinstance(feature, ClassLabel) and label >= 0
        return Cell(read_picture(pictures, processor, row), feature.int2str(label) if named else str(label))

    return cell


def _models(options: EvaluateOptions) -> tuple[list[TCQConfig], TCQModel, TCQImageProcessor]:
    """Configs to measure, and a model with the backbone that all share."""
    if options.model:
        model, processor = inputs.load_model(options.model)
        return [model.config], model, processor
    fields = {"backbone": options.backbone, "embedding_dim": options.embedding_dim, "image_size": options.image_size}
    books = [inputs.config_fields(bits, options.codebook_size) for bits in sorted(set(options.bits))]
    configs = [TCQConfig(**fields, **each) for each in books]
    model = TCQModel.from_timm(fields.pop("backbone"), options.weights, **fields, **books[0])
    return configs, model, inputs.new_processor(model.config)


def _more_views(
    split: Split,
    model: TCQModel,
    processor: TCQImageProcessor,
    options: EvaluateOptions,
    training: TCQTrainingArguments,
) -> FeatureCache:
    """Features of several views of the train rows alone."""
    pictures, views = split.dataset.select(split.train), options.cached_views
    return FeatureCache(
        *(pictures, model, processor, views, training.views, 0, training.image_column),
        batch_size=training.per_device_eval_batch_size,
    )


def _recipe(
    split: Split,
    model: TCQModel,
    options: EvaluateOptions,
    training: TCQTrainingArguments,
    values: dict[str, Any],
    measured: list[Measured],
    left_out: list[str],
) -> dict[str, Any]:
    """All that stands beside the figures."""
    config, source = model.config, f"{options.dataset} {options.split or ''}".rstrip()
    recipe = {"data": source} | split.recipe | comparison.figures_recipe(measured, range(options.seeds))
    recipe |= {
        "backbone": f"{config.backbone}, {config.image_size} px, frozen in every row",
        "backbone SHA-256": weights_digest(model.backbone),
        "pretraining": "the backbone may have seen labels, or these pictures, before; nothing here can tell",
        "baselines": "on the same features at unit norm, learnt from the train rows"
        + (f"; left out: {'; '.join(left_out)}" if left_out else ""),
    }
    if options.model:
        return recipe | {
            "model": options.model,
            "model SHA-256": weights_digest(model),
            "model selection": "none here; which pictures the model was trained and chosen on is not known here",
        }
    names = [*inspect.get_annotations(TCQTrainingArguments), *values]
    unused = {*_DEFAULTS, *_SET_HERE, *_OF_ANY_MODEL, "remove_unused_columns", "dataloader_pin_memory"}
    fields = {name: getattr(training, name) for name in names if hasattr(training, name) and name not in unused}
    said = ", ".join(f"{name} {getattr(value, 'value', value)}" for name, value in fields.items())
    return recipe | {
        "model": f"embedding_dim {config.embedding_dim}, codebook_size {config.codebook_size}, "
        f"cached_views {options.cached_views}",
        "start": "rotated PCA and spherical k-means of the train rows, by seed",
        "training": f"{said}; all else as transformers {__version__} has it",
        "other training": f"{OTHER_TRAINING}; all else as in training",
        "model selection": "the last epoch of one set of options; nothing is chosen by a query or a label",
    }
