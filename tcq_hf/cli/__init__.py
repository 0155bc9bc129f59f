"""The command line `tcq-hf`: one small file a command."""

import argparse
import os
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from tcq_hf import __version__

_EPILOG = """\
examples:
  tcq-hf demo                                               see it work on pictures that come with a package
  tcq-hf encode --dataset pictures/ --backbone vit_tiny_patch16_224 \\
      --save-model my-model --output codes.parquet          codes for your own pictures
  tcq-hf train --dataset pictures/ --backbone vit_tiny_patch16_224 \\
      --output-dir my-model                                 codes learned without labels
  tcq-hf index --codes codes.parquet --model my-model --output index.faiss
  tcq-hf search --dataset pictures/ --model my-model --index index.faiss --query query.jpg --grid found.png
  tcq-hf evaluate --dataset pictures/ --model my-model      figures beside those of PQ, OPQ and others, from labels

exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong arguments, 130 interrupted
"""

_FAILURES = (OSError, ValueError, RuntimeError, ImportError, TypeError, FloatingPointError, StrictDataclassError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        from . import demo, encode, evaluate, index, search, train
        from .options import OptionsParser
    except ImportError as error:
        print(f"tcq-hf: {error}", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(
        prog="tcq-hf",
        description="Unsupervised image retrieval with learned codes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tcq_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OptionsParser)
    for command in (demo, train, encode, index, search, evaluate):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        # The reader of our output has left (head, less): Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _FAILURES as error:
        print(f"tcq-hf {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tcq-hf {arguments.command}: interrupted; finished parts and checkpoints are kept", file=sys.stderr)
        return 130
    return 0
