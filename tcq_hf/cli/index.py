"""`tcq-hf index`: a file of codes and a model in, a FAISS file out."""

import argparse
import time
from typing import get_args

from tcq_hf import build_index, save_index
from tcq_hf.index.faiss_index import Mode

from . import inputs

_EXAMPLES = """\
  tcq-hf index --codes codes.parquet --model my-model --output index.faiss
  tcq-hf index --codes codes.parquet --model my-model --output index.faiss --mode fast

With --mode fast a 4-bit copy of the codes is scanned at the speed of memory, and what it finds gets its exact score:
twice the bytes, about one in a hundred of the best rows missed.
"""


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(commands, "index", "build a FAISS index from codes", _EXAMPLES, run)
    parser.add_argument("--codes", required=True, metavar="FILE", help="codes.parquet or codes.npy from tcq-hf encode")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="the model that made the codes: folder or Hub name"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="FAISS file to write, its recipe beside it")
    parser.add_argument("--mode", choices=get_args(Mode), default="exact", help="how to search (default: exact)")


def run(arguments: argparse.Namespace) -> None:
    """Build and save."""
    model, _ = inputs.load_model(arguments.model)
    codes, _ = inputs.read_codes(arguments.codes, model)
    start = time.perf_counter()
    index = build_index(model, codes, mode=arguments.mode)
    seconds = time.perf_counter() - start
    save_index(index, arguments.output, model_id=arguments.model)
    print(f"{index.ntotal} rows of {model.config.code_bytes} bytes in {seconds:.3f} s -> {arguments.output}")
