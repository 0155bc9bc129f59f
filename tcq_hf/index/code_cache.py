"""Parts of an encoded dataset as Arrow files in the `datasets` cache, keyed by everything that a code depends on."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import torch
from datasets import Dataset

from .writing import written_aside

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel

# Rows of one file: what an interrupted run can lose.
CHUNK_ROWS = 8192


def cache_key(
    dataset: Dataset, model: "TCQModel", processor: "TCQImageProcessor", column: str, columns: list[str], dtype: str
) -> str:
    """Weights, codebooks, config, processor, data, dtype and columns, as one string."""
    parts = {
        "data": dataset._fingerprint,
        "column": column,
        "weights": weights_digest(model),
        "config": {name: getattr(model.config, name) for name in type(model.config).__annotations__},
        "processor": processor.to_dict(),
        "dtype": dtype,
        "columns": columns,
        # With caching disabled nothing that is there is read.
        "run": None if datasets.is_caching_enabled() else os.urandom(8).hex(),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def chunk_path(key: str, pictures: Dataset, start: int, stop: int) -> Path:
    """File of the rows `start` to `stop`; pictures that are files on this machine count with their size and time."""
    digest = hashlib.sha256(f"{key} {start} {stop}".encode())
    for path in picture_paths(pictures, start, stop, without_bytes=True):
        if os.path.exists(path):
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return _folder() / f"{digest.hexdigest()[:32]}.arrow"


def write_chunk(path: Path, table: pa.Table) -> None:
    """Write a table aside and rename it, so that a file in the cache is always whole."""
    with written_aside(path) as aside, pa.OSFile(str(aside), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _folder() -> Path:
    if datasets.is_caching_enabled():
        return Path(datasets.config.HF_DATASETS_CACHE) / "tcq_hf"
    # As datasets does without a cache: a folder that lives as long as this process.
    return Path(datasets.fingerprint.get_temporary_cache_files_directory())


def picture_paths(
    pictures: Dataset, start: int = 0, stop: int | None = None, without_bytes: bool = False
) -> Iterator[str]:
    """Paths that a column of pictures names, in order; `without_bytes` leaves out those that hold the file itself."""
    column = pictures.with_format("arrow")[start : len(pictures) if stop is None else stop].column(0)
    for chunk in column.chunks:
        if pa.types.is_struct(chunk.type):
            paths = chunk.field("path")
            chunk = paths.filter(chunk.field("bytes").is_null()) if without_bytes else paths
        elif not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            continue
        yield from (path for path in chunk.to_pylist() if path)
