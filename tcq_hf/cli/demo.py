"""`tcq-hf demo`: the whole way once, on pictures that come with a package or on one's own."""

import argparse
import time
from pathlib import Path

from tcq_hf import TCQModel, demo

from . import inputs

_EXAMPLES = """\
  tcq-hf demo
  tcq-hf demo --bits 32 --epochs 4
  tcq-hf demo --images pictures/
  tcq-hf demo --dataset my-name/photos --split train --backbone vit_small_patch14_dinov2.lvd142m --image-size 224
"""


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(commands, "demo", "show the whole way on real pictures, on one HTML page", _EXAMPLES, run)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="DIR", help="a folder of your own pictures, instead of MNIST digits")
    source.add_argument("--dataset", metavar="NAME", help="a dataset: a Hub name, a saved dataset, a parquet file")
    parser.add_argument("--split", metavar="SPLIT", help="e.g. train, train+test or all; needed if there are several")
    parser.add_argument("--output", default="tcq-hf-demo", metavar="DIR", help="folder to write (default: tcq-hf-demo)")
    parser.add_argument(
        "--bits", type=int, default=64, metavar="N", help="bits of a code, a multiple of 8 (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights, training, ties (default: 0)")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of training on the digits; fewer on a slow machine (default: 12)",
    )
    own = parser.add_argument_group("with --images or --dataset")
    own.add_argument(
        "--backbone", default="vit_tiny_patch16_224", metavar="NAME", help="timm model (default: %(default)s)"
    )
    own.add_argument("--weights", metavar="FILE", help="local safetensors file (default: timm's, from the Hub)")
    own.add_argument("--image-size", type=int, metavar="N", help="side of the input (default: the backbone's own)")


def run(arguments: argparse.Namespace) -> None:
    """Run the demo."""
    fields = inputs.config_fields(arguments.bits)
    name = arguments.images or arguments.dataset
    if name is None:
        epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        shown = demo.digit_demo(arguments.bits, arguments.seed, **epochs)
    else:
        if arguments.epochs is not None:
            raise ValueError("--epochs is for the digits; with your own pictures nothing is trained, see tcq-hf train")
        start = time.perf_counter()
        dataset = inputs.load_pictures(name, arguments.split)
        column, label = inputs.image_column(dataset, None), inputs.label_column(dataset)
        model = TCQModel.from_timm(arguments.backbone, arguments.weights, image_size=arguments.image_size, **fields)
        processor = inputs.new_processor(model.config)
        shown = demo.Demo(
            dataset,
            model,
            processor,
            f"pictures from {name}",
            seed=arguments.seed,
            image_column=column,
            label_column=label,
        )
        shown.done("pictures", f"{len(dataset):,} {shown.source}", start)
    demo.run(shown, Path(arguments.output))
