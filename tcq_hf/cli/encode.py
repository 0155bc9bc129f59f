"""`tcq-hf encode`: pictures in, a file of codes out, with a new model if asked."""

import argparse
from pathlib import Path

import numpy as np

from tcq_hf import TCQImageProcessor, TCQModel, codes_array, encode_dataset, extract_features, hub
from tcq_hf.index.decoding import raw_pictures
from tcq_hf.index.writing import written_aside

from . import inputs

_EXAMPLES = """\
  tcq-hf encode --dataset pictures/ --model my-model --output codes.parquet
  tcq-hf encode --dataset pictures/ --backbone vit_small_patch14_dinov2.lvd142m --bits 64 \\
      --save-model my-model --output codes.parquet
  tcq-hf encode --dataset my-name/photos --split train --model my-name/my-model --output codes.npy --on-error skip
"""


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(commands, "encode", "turn pictures into codes", _EXAMPLES, run)
    inputs.add_dataset_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a saved model: a folder or a Hub name")
    source.add_argument(
        "--backbone", metavar="NAME", help="a timm model: start a new model, fitted to these pictures without labels"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="codes.parquet (with the other columns) or .npy"
    )
    parser.add_argument("--embeddings", action="store_true", help="write the float embeddings too (parquet)")
    fresh = parser.add_argument_group("with --backbone")
    fresh.add_argument("--weights", metavar="FILE", help="local safetensors file (default: timm's, from the Hub)")
    fresh.add_argument(
        "--bits", type=int, default=64, metavar="N", help="bits of a code, a multiple of 8 (default: 64)"
    )
    fresh.add_argument("--embedding-dim", type=int, default=128, metavar="D", help="embedding width (default: 128)")
    fresh.add_argument("--image-size", type=int, metavar="N", help="side of the input (default: the backbone's own)")
    fresh.add_argument("--fit-rows", type=int, default=20_000, metavar="N", help="pictures to fit to (default: 20000)")
    fresh.add_argument("--seed", type=int, default=0, metavar="N", help="seed of draw and fit (default: 0)")
    fresh.add_argument("--save-model", metavar="DIR", help="folder for the new model")
    inputs.add_encoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Encode and write."""
    output = Path(arguments.output)
    if output.suffix not in (".parquet", ".npy"):
        raise ValueError(f"--output must end in .parquet or .npy, got {output.name}")
    if arguments.backbone and not arguments.save_model:
        raise ValueError("--backbone starts a new model: say with --save-model DIR where to keep it")
    dataset = inputs.load_pictures(arguments.dataset, arguments.split)
    column = inputs.image_column(dataset, arguments.image_column)
    options = {"image_column": column, **inputs.encoding_options(arguments)}
    if arguments.model:
        model, processor = inputs.load_model(arguments.model)
    else:
        model, processor = _new_model(arguments, dataset, options)
    numbered = inputs.with_row_numbers(dataset)
    encoded = encode_dataset(numbered, model, processor, embeddings=arguments.embeddings, **options)
    if output.suffix == ".npy" and len(encoded) < len(dataset):
        raise ValueError(f"--output {output.name} cannot say which pictures were left out; write a .parquet file")
    with written_aside(output) as aside:
        if output.suffix == ".npy":
            with aside.open("wb") as file:
                np.save(file, codes_array(encoded))
        else:
            encoded.remove_columns(column).to_parquet(str(aside))
    inputs.write_codes_recipe(output, arguments.model or arguments.save_model, model, raw_pictures(dataset, column))
    print(f"{len(encoded)} of {len(dataset)} pictures, {model.config.code_bytes} bytes each -> {output}")


def _new_model(
    arguments: argparse.Namespace, dataset: inputs.Dataset, options: dict
) -> tuple[TCQModel, TCQImageProcessor]:
    fields = {"embedding_dim": arguments.embedding_dim, "image_size": arguments.image_size}
    fields |= inputs.config_fields(arguments.bits)
    model = TCQModel.from_timm(arguments.backbone, arguments.weights, **fields)
    processor = inputs.new_processor(model.config)
    sample = dataset
    if len(dataset) > arguments.fit_rows:
        sample = dataset.shuffle(seed=arguments.seed).select(range(arguments.fit_rows))
    model.initialize(extract_features(sample, model, processor, **options), seed=arguments.seed)
    print(f"new model -> {hub.save(model, processor, arguments.save_model)}")
    return model, processor
