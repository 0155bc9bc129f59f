"""`tcq-hf index`: a file of codes and a model in, a FAISS file, a folder that grows or a Lance dataset out."""

import argparse
import time
from pathlib import Path
from typing import get_args

import numpy as np

from tcq_hf import TCQModel, build_index, save_index
from tcq_hf.index.code_index import check_codes
from tcq_hf.index.faiss_index import Mode
from tcq_hf.index.ivf_index import IVFIndex
from tcq_hf.index.row_ids import check_ids
from tcq_hf.index.segment_files import MANIFEST
from tcq_hf.index.segments import SegmentedIndex

from . import inputs

_EXAMPLES = """\
  tcq-hf index --codes codes.parquet --model my-model --output index.faiss
  tcq-hf index --codes codes.parquet --model my-model --output index.faiss --mode fast
  tcq-hf index --codes first.parquet --model my-model --output living/ --append
  tcq-hf index --codes more.parquet --model my-model --output living/ --append
  tcq-hf index --codes codes.parquet --model my-model --output shards/ --shards 8
  tcq-hf index --codes codes.parquet --model my-model --to lance://codes.lance
  tcq-hf index --codes codes.parquet --model my-model --to lance://s3://bucket/codes.lance

With --mode fast a 4-bit copy of the codes is scanned at the speed of memory, and what it finds gets its exact score:
twice the bytes, about one in a hundred of the best rows missed. With --mode ivf, for tens of millions of rows, only the
nearest lists of rows are looked into: eight more bytes a row, and the share of the best rows that is found is printed.

With --append the output is a folder, made if it is not there: the codes become a new segment of it, and nothing else is
written. The ids of the first codes are their row numbers, those of more go on from the last. With --shards all that is
in the folder is then split into so many equal parts.

With --to a Lance dataset is written, with the other columns of the codes, and indexed by the learned codebooks (extra
[lance]). The ids are the row numbers.
"""


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(commands, "index", "build a FAISS index from codes", _EXAMPLES, run)
    parser.add_argument("--codes", required=True, metavar="FILE", help="codes.parquet or codes.npy from tcq-hf encode")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="the model that made the codes: folder or Hub name"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output", metavar="PATH", help="FAISS file to write, its recipe beside it; or the folder")
    place.add_argument("--to", metavar="lance://URI", help="Lance dataset to write: a folder or an address")
    parser.add_argument("--mode", choices=get_args(Mode), default="exact", help="how to search (default: exact)")
    parser.add_argument("--append", action="store_true", help="add the codes to an index that lives in a folder")
    parser.add_argument("--shards", type=int, metavar="N", help="split an index in a folder into N equal segments")


def run(arguments: argparse.Namespace) -> None:
    """Build and save, or append."""
    model, _ = inputs.load_model(arguments.model)
    codes, numbers = inputs.read_codes(arguments.codes, model)
    if arguments.to is not None:
        _write_lance(arguments, model, codes, numbers)
        return
    if arguments.append or arguments.shards is not None:
        _grow(arguments, model, codes, numbers)
        return
    start = time.perf_counter()
    index = build_index(model, codes, mode=arguments.mode)
    seconds = time.perf_counter() - start
    pictures = inputs.coded_pictures(arguments.codes)
    save_index(index, arguments.output, model_id=arguments.model, pictures=pictures)
    print(f"{index.ntotal} rows of {model.config.code_bytes} bytes in {seconds:.3f} s -> {arguments.output}")
    if isinstance(index, IVFIndex):
        print(f"{index.nlist} lists; the nearest {index.nprobe} of a query hold {index.recall:.3f} of its best rows")


def _grow(arguments: argparse.Namespace, model: TCQModel, codes: np.ndarray, numbers: np.ndarray | None) -> None:
    folder = Path(arguments.output)
    _check_folder(arguments, folder)
    # A folder is made only for what can go into it.
    codes = check_codes(codes, model.config.num_codebooks, model.config.codebook_size)
    index = SegmentedIndex.open(folder, model) if (folder / MANIFEST).exists() else None
    there = 0 if index is None else index.ntotal
    ids = _ids_of_rows(numbers, len(codes), there)
    if arguments.shards is not None and arguments.shards > there + len(codes):
        raise ValueError(f"--shards {arguments.shards} is more than the {there + len(codes)} rows there would be")
    if index is None:
        index = SegmentedIndex.create(folder, model, model_id=arguments.model)
    ids = index.append(codes, ids)
    if arguments.shards is not None:
        index.merge(arguments.shards)
    first = f", ids from {ids[0]}" if len(ids) else ""
    print(f"{len(codes)} rows{first}; {index.ntotal} in {len(index.segments)} segments -> {folder}")


def _check_folder(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.mode != "exact":
        raise ValueError(f"--mode {arguments.mode} is for one file; an index in a folder is searched exactly")
    if arguments.shards is not None and arguments.shards < 1:
        raise ValueError(f"--shards must be at least 1, got {arguments.shards}")
    if folder.is_file():
        raise ValueError(f"--output {folder} is a file; --append and --shards write a folder")
    if not arguments.append and (folder / MANIFEST).exists():
        raise FileExistsError(f"there is an index in {folder}; --append adds the codes to it")


def _ids_of_rows(numbers: np.ndarray | None, count: int, there: int) -> np.ndarray | None:
    """The row numbers, where they are not 0, 1, 2 ..., as ids of a folder in which `there` rows are; else None."""
    if numbers is None or np.array_equal(numbers, np.arange(count)):
        return None
    ids = check_ids(numbers, count)
    if there:
        raise ValueError(
            f"--output has {there} rows, and the row numbers of --codes are not 0 to {count - 1}, because pictures "
            "were left out: ids that go on from the last would be those of other pictures. Encode without --on-error "
            "skip, or write another folder"
        )
    return ids


def _write_lance(arguments: argparse.Namespace, model: TCQModel, codes: np.ndarray, numbers: np.ndarray | None) -> None:
    scheme, _, uri = arguments.to.partition("://")
    if scheme != "lance" or not uri:
        raise ValueError(f"--to must be lance://FOLDER or lance://ADDRESS, got {arguments.to}")
    if arguments.mode != "exact" or arguments.append or arguments.shards is not None:
        raise ValueError("--to writes a Lance dataset; --mode, --append and --shards are for --output")
    from tcq_hf.index.lance_index import to_lance  # an extra

    columns, embeddings = inputs.other_columns(arguments.codes)
    index = to_lance(uri, model, codes, embeddings, ids=numbers, columns=columns)
    print(f"{index.ntotal} rows of {model.config.code_bytes} bytes -> {uri}")
