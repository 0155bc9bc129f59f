"""Arguments that several commands share, and what they name: datasets, models, codes."""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from tcq_hf import TCQConfig, TCQImageProcessor, TCQModel, codes_array
from tcq_hf.index.code_cache import picture_paths, weights_digest
from tcq_hf.index.faiss_index import read_recipe
from tcq_hf.index.writing import written_aside

Commands = Any  # argparse keeps the type of its sub-parsers private


def command(
    commands: Commands,
    name: str,
    help_line: str,
    examples: str,
    run: Callable[[argparse.Namespace], None] | None = None,
    **settings: Any,
) -> Any:
    """A sub-command with examples under its help; `settings` are further arguments of its parser."""
    parser = commands.add_parser(
        name,
        help=help_line,
        description=help_line[0].upper() + help_line[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )
    parser.set_defaults(run=run)
    return parser


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--dataset`, `--split`, `--image-column`."""
    parser.add_argument(
        "--dataset",
        required=required,
        metavar="NAME",
        help="a folder of pictures (class folders become labels), a parquet file, a saved dataset or a Hub name",
    )
    parser.add_argument("--split", metavar="SPLIT", help="e.g. train, train+test or all; needed if there are several")
    parser.add_argument(
        "--image-column", metavar="COLUMN", help="column of the pictures (default: the first of images)"
    )


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `encode_dataset`."""
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures a step (default: 32)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes that decode (default: by device)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], help="reduced precision of the backbone")
    parser.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="at a picture that cannot be read: stop, or leave it out and say so (default: raise)",
    )


def encoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_encoding_arguments` as keyword arguments of `encode_dataset`."""
    return {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
        "device": arguments.device or ("cuda" if torch.cuda.is_available() else None),
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "on_error": arguments.on_error,
    }


def load_pictures(name: str, split: str | None = None, option: str = "--dataset") -> Dataset:
    """The dataset that `--dataset` and `--split`, or another option, name.

    Raises:
        ValueError: If there is nothing there, or several splits and none chosen.
    """
    loaded = load_splits(name, split, option)
    if isinstance(loaded, DatasetDict):
        if len(loaded) > 1:
            choose = option.replace("dataset", "split")
            raise ValueError(f"{option} {name} has the splits {', '.join(loaded)}; choose with {choose}, e.g. all")
        (loaded,) = loaded.values()
    if not len(loaded):
        raise ValueError(f"{option} {name} has no rows")
    return loaded


def load_splits(name: str, split: str | None = None, option: str = "--dataset") -> Dataset | DatasetDict:
    """As `load_pictures`, but all splits where none is chosen."""
    path = Path(name)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _saved_splits(name, split, option)
    if path.suffix == ".parquet" and path.is_file():
        return datasets.load_dataset("parquet", data_files=name, split=split or "train")
    if path.is_file():
        raise ValueError(f"{option}: {name} is a file; expected a folder, a parquet file or a Hub name")
    if path.is_dir() and not any(file.is_file() for file in path.rglob("*")):
        raise ValueError(f"{option}: the folder {name} is empty")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"{option}: there is no folder or file {name}")
    try:
        return datasets.load_dataset(name, split=split)
    except DatasetNotFoundError as error:
        raise ValueError(f"{option}: {name} is no folder here and no dataset on the Hub: {error}") from error
    except DatasetsError as error:
        raise ValueError(f"{option} {name}: no pictures found: {error}") from error


def _saved_splits(name: str, split: str | None, option: str) -> Dataset | DatasetDict:
    loaded = datasets.load_from_disk(name)
    if split is None:
        return loaded
    if isinstance(loaded, DatasetDict) and split in loaded:
        return loaded[split]
    raise ValueError(f"{option}: the saved dataset {name} has no split {split!r}")


def image_column(dataset: Dataset, asked: str | None) -> str:
    """The column of pictures: the one asked for, else the first of images, else `image`."""
    if asked is None:
        found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
        asked = found[0] if found else "image"
    if asked not in dataset.column_names:
        raise ValueError(f"--image-column: the dataset has no column {asked!r}; its columns are {dataset.column_names}")
    return asked


def label_column(dataset: Dataset) -> str | None:
    """The first column of class labels, if any."""
    return next((name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)), None)


def load_model(name: str) -> tuple[TCQModel, TCQImageProcessor]:
    """A saved model and its processor, from a folder or the Hub."""
    return TCQModel.from_pretrained(name).eval(), TCQImageProcessor.from_pretrained(name)


def config_fields(bits: int, codebook_size: int = 256) -> dict[str, int]:
    """Fields of the config for a number of bits, in codebooks of `codebook_size` codewords.

    Raises:
        ValueError: If bits is no positive multiple of 8, or of the bits of a codebook.
    """
    if bits < 8 or bits % 8:
        raise ValueError(f"--bits must be a positive multiple of 8, got {bits}")
    if not 2 <= codebook_size <= 256 or codebook_size & (codebook_size - 1):
        raise ValueError(f"--codebook-size must be a power of two from 2 to 256, got {codebook_size}")
    each = codebook_size.bit_length() - 1
    if bits % each:
        raise ValueError(f"--bits must be a multiple of {each}, log2 of --codebook-size {codebook_size}, got {bits}")
    return {"num_codebooks": bits // each, "codebook_size": codebook_size}


def new_processor(config: TCQConfig) -> TCQImageProcessor:
    """The processor of a model that was just made from a backbone."""
    return TCQImageProcessor.from_backbone(config.backbone, config.image_size, config.num_channels)


def with_row_numbers(dataset: Dataset) -> Dataset:
    """The dataset with a column `row`, which keeps the numbers where unreadable pictures are left out."""
    if "row" in dataset.column_names:
        raise ValueError("the dataset has a column 'row', which tcq-hf needs for the row numbers; rename it")
    return dataset.add_column("row", np.arange(len(dataset)))


def output_folder(name: str, option: str) -> Path:
    """The folder, made if need be, found out to be writable before anything is computed for it.

    Raises:
        OSError: If it is not, naming the option.
    """
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=name):
            return Path(name)
    except OSError as error:
        raise OSError(f"{option}: cannot write into {name}: {error}") from error


def write_codes_recipe(path: Path, name: str, model: TCQModel, pictures: Dataset) -> None:
    """Write `<path>.json`: which model made the codes, of which pictures."""
    recipe = {"model": name, "weights_sha256": weights_digest(model), **identity(pictures)}
    with written_aside(path.with_name(path.name + ".json")) as aside:
        aside.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def read_codes(path: str, model: TCQModel, pictures: Dataset | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes `[N, M]` and, from parquet, the row numbers `[N]` that they belong to.

    Raises:
        ValueError: If the recipe beside the file says that another model made the codes, or of other pictures.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--codes: no file {path}")
    recipe = Path(f"{path}.json")
    if recipe.is_file():
        said = _codes_recipe(recipe)
        if said["weights_sha256"] != weights_digest(model):
            raise ValueError(f"--codes {path} were made by another model, {said['model']}")
        if pictures is not None and _pictures(said) != identity(pictures):
            raise ValueError(
                f"--codes {path} are those of other pictures ({said['rows']} rows); encode --dataset again"
            )
    if path.endswith(".npy"):
        return np.load(path, allow_pickle=False), None
    table = datasets.load_dataset("parquet", data_files=path, split="train")
    rows = table.with_format("numpy")["row"][:] if "row" in table.column_names else None
    return codes_array(table), rows


def coded_pictures(path: str) -> dict[str, Any] | None:
    """The `identity` of the pictures that a file of codes is of; None if no recipe says it."""
    recipe = Path(f"{path}.json")
    return _pictures(_codes_recipe(recipe)) if recipe.is_file() else None


def check_indexed_pictures(path: str, pictures: Dataset) -> None:
    """Raise ValueError if the recipe beside an index file says that it is of other pictures."""
    said = (read_recipe(path) or {}).get("pictures")
    if said is not None and said != identity(pictures):
        raise ValueError(f"--index {path} is of other pictures; encode --dataset and build the index again")


def other_columns(path: str) -> tuple[pa.Table | None, np.ndarray | None]:
    """What a file of codes has beside codes and row numbers: columns, and embeddings float32 `[N, D]`, if any."""
    if path.endswith(".npy"):
        return None, None
    table = datasets.load_dataset("parquet", data_files=path, split="train")
    embeddings = np.float32(table.with_format("numpy")["embedding"][:]) if "embedding" in table.column_names else None
    kept = [name for name in table.column_names if name not in ("codes", "row", "embedding")]
    return table.select_columns(kept).with_format("arrow")[:] if kept else None, embeddings


def _pictures(said: dict[str, Any]) -> dict[str, Any]:
    return {name: said[name] for name in ("rows", "files_sha256")}


def _codes_recipe(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {name: said[name] for name in ("model", "weights_sha256", "rows", "files_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); encode --dataset again") from error


def label_name(names: list[str], label: int | None) -> str:
    """Name of a class label; empty for a row without one."""
    return names[label] if label is not None and label >= 0 else ""


def identity(pictures: Dataset) -> dict[str, Any]:
    """Number of rows and a hash of the file names in order, where there are any."""
    digest = hashlib.sha256()
    for path in picture_paths(pictures):
        digest.update(f"{os.path.basename(path)}\n".encode())
    return {"rows": len(pictures), "files_sha256": digest.hexdigest()}
