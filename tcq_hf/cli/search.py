"""`tcq-hf search`: a picture in, a table of the most similar rows out, and a picture grid if asked."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from PIL.Image import Image

from tcq_hf import TCQImageProcessor, TCQModel, add_code_index, build_index, encode_dataset, load_index
from tcq_hf import search as find
from tcq_hf.evaluation.report import Cell, picture_grid, text_table
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.index.decoding import raw_pictures
from tcq_hf.index.segments import SegmentedIndex

from . import inputs, reranking

_EXAMPLES = """\
  tcq-hf search --dataset pictures/ --model my-model --query cat.jpg
  tcq-hf search --dataset pictures/ --model my-model --codes codes.parquet --query cat.jpg dog.jpg --grid found.png
  tcq-hf search --dataset pictures/ --model my-model --index index.faiss --row 17 --k 20
  tcq-hf search --dataset pictures/ --model my-model --query cat.jpg --filter label=dress --filter label=hat
  tcq-hf search --dataset pictures/ --model my-model --row 17 --rerank diffusion --graph graph.safetensors
  tcq-hf search --dataset pictures/ --model my-32-bit-model --fuse my-64-bit-model --row 17 --grid before-and-after.png

With --rerank or --fuse the table says where a row stood before, and the grid shows both rankings.

Without --codes and --index the pictures are encoded first; the codes are kept in the datasets cache.
"""


def add_parser(commands: inputs.Commands) -> None:
    """Add the command to `tcq-hf`."""
    parser = inputs.command(commands, "search", "find the most similar pictures", _EXAMPLES, run)
    inputs.add_dataset_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="the model that made the codes: folder or Hub name"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--codes", metavar="FILE", help="codes.parquet or codes.npy from tcq-hf encode")
    source.add_argument(
        "--index", metavar="PATH", help="FAISS file from tcq-hf index, one row for each picture; or its folder"
    )
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--query", nargs="+", metavar="FILE", help="pictures to search with")
    query.add_argument("--row", nargs="+", type=int, metavar="N", help="rows of the dataset to search with")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="neighbours (default: 10)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="search only rows with this value; repeat it for more values of a column, or for more columns",
    )
    reranking.add_arguments(parser)
    parser.add_argument("--grid", metavar="PNG", help="draw queries and neighbours into this file")
    inputs.add_encoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Search, print, draw."""
    reranking.check_arguments(arguments)
    model, processor = inputs.load_model(arguments.model)
    dataset = inputs.load_pictures(arguments.dataset, arguments.split)
    column, label = inputs.image_column(dataset, arguments.image_column), inputs.label_column(dataset)
    pictures = raw_pictures(dataset, column)
    filters = _filters(arguments.filter, dataset)
    dataset, numbers = _with_index(arguments, dataset, model, processor, column)
    changes = reranking.fit(arguments, dataset.get_index("codes").faiss_index)
    changes |= reranking.add_models(arguments, dataset, column)
    names, grid = _names(dataset, label), []
    for query in arguments.query or arguments.row:
        asked = query if isinstance(query, str) else _position(query, numbers)
        ask = functools.partial(find, dataset, asked, model, processor, arguments.k, "codes", column, filters)
        before = ask()
        found = ask(**changes) if changes else before
        print(f"{'' if isinstance(query, str) else 'row '}{query}")
        paths = _paths(pictures, [int(numbers[row["row"]]) for row in found])
        lines = _lines(found, numbers, names, label, paths)
        print(text_table(_with_places(lines, found, before) if changes else lines), "\n")
        picture = query if isinstance(query, str) else dataset[asked][column]
        shown = {Path(str(query)).name: before} | ({_title(arguments): found} if changes else {})
        for title, ranking in shown.items():
            cells = [_cell(row, processor.process_image(row[column]), names, label) for row in ranking]
            grid.append([Cell(processor.process_image(picture), title), *cells])
    if arguments.grid:
        print(f"grid -> {picture_grid(grid, arguments.grid)}")


def _title(arguments: argparse.Namespace) -> str:
    """What was done to a ranking."""
    return ", ".join((["fused"] if arguments.fuse else []) + ([arguments.rerank] if arguments.rerank else []))


def _with_places(lines: list[dict[str, Any]], found: list[dict], before: list[dict]) -> list[dict[str, Any]]:
    """Lines of a table with the rank that each row had before."""
    ranks = {row["row"]: rank for rank, row in enumerate(before, 1)}
    return [
        {"rank": line["rank"], "before": ranks.get(row["row"], f"> {len(before)}")} | line
        for line, row in zip(lines, found, strict=True)
    ]


def _with_index(
    arguments: argparse.Namespace, dataset: Dataset, model: TCQModel, processor: TCQImageProcessor, column: str
) -> tuple[Dataset, np.ndarray]:
    """The dataset with its index, and the number that each of its rows has in `--dataset`."""
    if arguments.index and Path(arguments.index).is_dir():
        index, ids = SegmentedIndex.open(arguments.index, model).in_memory()
        if len(ids) and ids.max() >= len(dataset):
            raise ValueError(
                f"--index has id {ids.max()}, but --dataset has {len(dataset)} rows: it is of another dataset"
            )
        return attach_index(dataset.select(ids), index, "codes"), ids
    if arguments.index:
        inputs.check_indexed_pictures(arguments.index, raw_pictures(dataset, column))
        return attach_index(dataset, load_index(arguments.index, model), "codes"), np.arange(len(dataset))
    if arguments.codes:
        codes, numbers = inputs.read_codes(arguments.codes, model, raw_pictures(dataset, column))
        if numbers is None:
            numbers = np.arange(len(dataset))
        elif len(numbers) and numbers.max() >= len(dataset):
            raise ValueError(
                f"--codes has row {numbers.max()}, but --dataset has {len(dataset)} rows: it is another one"
            )
        else:
            dataset = dataset if len(numbers) == len(dataset) else dataset.select(numbers)
        return attach_index(dataset, build_index(model, codes), "codes"), numbers
    # As tcq-hf encode does it, so that the codes in the cache are found again.
    numbered = inputs.with_row_numbers(dataset)
    options = inputs.encoding_options(arguments)
    encoded = encode_dataset(numbered, model, processor, image_column=column, **options)
    numbers = np.asarray(encoded.with_format("numpy")["row"][:])
    return add_code_index(encoded.remove_columns("row"), "codes", model), numbers


def _filters(given: list[str], dataset: Dataset) -> dict[str, list[Any]]:
    """Values by column, of the type that the column has."""
    filters: dict[str, list[Any]] = {}
    for each in given:
        column, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"--filter must be COLUMN=VALUE, got {each!r}")
        feature = dataset.features.get(column)
        number = not isinstance(feature, ClassLabel) or value not in feature.names
        kind = getattr(feature, "dtype", "string")
        try:
            read = json.loads(value) if number and not kind.endswith("string") else value
        except ValueError:
            read = value
        filters.setdefault(column, []).append(read)
    return filters


def _position(number: int, numbers: np.ndarray) -> int:
    positions = np.flatnonzero(numbers == number)
    if not len(positions):
        raise ValueError(f"--row {number} is not among the {len(numbers)} rows that have a code")
    return int(positions[0])


def _names(dataset: Dataset, label: str | None) -> list[str]:
    return dataset.features[label].names if label else []


def _paths(pictures: Dataset, numbers: list[int]) -> list[str]:
    """File names of rows, where the dataset knows them."""
    rows = pictures[numbers][pictures.column_names[0]]
    return [(picture.get("path") if isinstance(picture, dict) else None) or "" for picture in rows]


def _lines(
    found: list[dict], numbers: np.ndarray, names: list[str], label: str | None, paths: list[str]
) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "row": int(numbers[row["row"]]), "score": row["score"], "similarity": row["similarity"]}
        | ({"label": inputs.label_name(names, row[label])} if label else {})
        | ({"file": path} if any(paths) else {})
        for rank, (row, path) in enumerate(zip(found, paths, strict=True), 1)
    ]


def _cell(row: dict, picture: Image, names: list[str], label: str | None) -> Cell:
    return Cell(picture, f"{inputs.label_name(names, row[label]) if label else ''} {row['similarity']:.2f}".strip())
