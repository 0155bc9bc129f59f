"""Pictures of a Ray dataset in, a Lance dataset of their codes out, through a pool of actors."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets.utils import tqdm

from .batch_encoder import BatchEncoder, check_columns
from .row_ids import check_ids

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

# Batches of the model that an actor is given at once, so that every stream of it has work.
_BATCHES_AT_ONCE = 8

# Writing takes a small part of the time of encoding.
_ACTORS_A_WRITER = 8

# What a task that writes says of its rows.
_REPORT = pa.schema(
    [
        ("fragments", pa.list_(pa.string())),
        ("schema", pa.binary()),
        ("ids", pa.list_(pa.int64())),
        ("failed", pa.list_(pa.struct([("id", pa.int64()), ("error", pa.string())]))),
    ]
)


@dataclass(frozen=True)
class RayEncoding:
    """What `encode_with_ray` did.

    Args:
        rows: Number of rows that were written.
        failed: What was wrong with each picture that was left out, by the id of its row.
    """

    rows: int
    failed: dict[int, str]


def encode_with_ray(
    dataset: "ray.data.Dataset",
    encoder: BatchEncoder,
    uri: str | os.PathLike,
    num_actors: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    rows_per_fragment: int = 1 << 16,
    append: bool = False,
    storage_options: dict[str, str] | None = None,
) -> RayEncoding:
    """Encode the pictures of a Ray dataset in a pool of actors and write a Lance dataset, every row once.

    Nothing is visible at `uri` before all rows are encoded and their ids were compared with those that came in. What a
    worker or a machine held when it died is encoded again by the others: they need room for its actors (or a cluster
    that grows), else Ray waits. If this process dies, nothing is written.

    Args:
        dataset: Rows with pictures and an id; read twice, first for the ids alone.
        encoder: Encodes batches; its `id_column` must hold integers, all different. With `on_error="raise"` the first
            picture that cannot be read stops the run.
        uri: Folder (shared by all machines) or address (`s3://...`) of the Lance dataset.
        num_actors: Size of the pool. By default one for each GPU if `num_gpus` is set, else one for each `num_cpus` of
            the cluster, less one CPU a machine for reading and writing.
        num_cpus: CPUs of an actor, which decode its pictures: several where it has a GPU.
        num_gpus: GPUs of an actor; name the device in the encoder too.
        rows_per_fragment: Rows in one file of the dataset.
        append: Add the rows to the dataset that is there, which the same model must have written.
        storage_options: Keys and address of the object store, as for `lance.dataset`.

    Returns:
        The number of rows, and what was wrong with those left out.

    Raises:
        FileExistsError: If there is a dataset, also one that came meanwhile, and `append` is unset.
        FileNotFoundError: If there is none and `append` is set.
        RuntimeError: If a worker fails, or the dataset gives other rows when it is read again.
        TypeError: If ids are no integers.
        ValueError: If a column is missing, an id is given twice or there already, the rows that are there are of
            another model, a picture cannot be read, or an embedding is not finite.
    """
    from .lance_files import check_codes_belong, dataset_exists, full_address, open_dataset

    uri = full_address(uri)
    _check_dataset(dataset, encoder, num_actors, rows_per_fragment)
    if not append and dataset_exists(uri, storage_options):
        raise FileExistsError(f"there is a Lance dataset at {uri}; append=True adds rows to it")
    there = open_dataset(uri, None, storage_options) if append else None
    if there is not None:
        # A model that is named is loaded here too, not on the device that it has on the workers.
        check_codes_belong(there, BatchEncoder(encoder.model, encoder.processor)._load().model.codebooks())
    ids = _ids_to_encode(dataset, encoder.id_column, there)
    write = partial(
        _write_fragments, uri=uri, append=append, id_column=encoder.id_column, storage_options=storage_options
    )
    pool = num_actors or _pool_size(num_cpus, num_gpus)
    written = _encoded_and_written(dataset, encoder, write, pool, num_cpus, num_gpus, rows_per_fragment)
    report = _report(written, len(ids))
    failed = {bad["id"]: bad["error"] for bad in _flat(report, "failed").to_pylist()}
    encoded = _flat(report, "ids").to_numpy()
    _check_every_row_once(ids, np.concatenate([encoded, np.array(list(failed), np.int64)]))
    if not len(encoded):
        raise ValueError(f"none of {len(ids)} rows has a picture that can be read; nothing is written to {uri}")
    _commit(report, uri, there, storage_options)
    for text in failed.values():
        logger.warning("left out %s", text)
    return RayEncoding(len(encoded), failed)


def ray_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Results of a function of each item, in order, each from a Ray task: a `fan_out` of `build_lance_index`."""
    ray = import_ray()
    task = ray.remote(_call)
    # All are submitted before the first is waited for.
    for result in [task.remote(function, item) for item in items]:
        yield ray.get(result)


class _EncodeTable:
    """A `BatchEncoder` on Arrow tables, so that the other columns keep their types."""

    def __init__(self, encoder: BatchEncoder) -> None:
        self._encoder = encoder

    def __call__(self, table: pa.Table) -> pa.Table:
        encoder = self._encoder
        encoded = encoder({name: table[name].to_pylist() for name in (encoder.image_column, encoder.id_column)})
        if not encoder.keep_pictures:
            table = table.drop_columns([encoder.image_column])
        for name in ("codes", "embedding"):
            values = pa.array(encoded[name].reshape(-1))
            table = table.append_column(name, pa.FixedSizeListArray.from_arrays(values, encoded[name].shape[1]))
        errors = encoded.get("error", [None] * len(table))
        return table.append_column("error", pa.array(errors, pa.string()))


def _encoded_and_written(
    dataset: "ray.data.Dataset",
    encoder: BatchEncoder,
    write: Callable[[pa.Table], pa.Table],
    num_actors: int,
    num_cpus: float,
    num_gpus: float,
    rows_per_fragment: int,
) -> "ray.data.Dataset":
    """The pipeline: tasks that read, a pool of actors that encodes, tasks that write."""
    strategies = import_ray().data
    # A dataset may come as one block, which would go to one actor, and be lost with it.
    rows = encoder.batch_size * _BATCHES_AT_ONCE
    encoded = dataset.repartition(target_num_rows_per_block=rows).map_batches(
        _EncodeTable,
        fn_constructor_args=(encoder,),
        batch_size=rows,
        batch_format="pyarrow",
        compute=strategies.ActorPoolStrategy(size=num_actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    return encoded.map_batches(
        write,
        batch_size=rows_per_fragment,
        batch_format="pyarrow",
        compute=strategies.TaskPoolStrategy(size=-(-num_actors // _ACTORS_A_WRITER)),
    )


def _write_fragments(
    table: pa.Table, uri: str, append: bool, id_column: str, storage_options: dict[str, str] | None
) -> pa.Table:
    """Write the rows that were encoded as files which no version of a dataset names yet; one row that says which."""
    from .lance_files import lance

    bad = table.filter(table["error"].is_valid())
    # What `datasets` notes of its features in the schema no longer holds.
    good = table.filter(table["error"].is_null()).drop_columns(["error"]).replace_schema_metadata(None)
    options = {"mode": "append" if append else "create", "storage_options": storage_options}
    written = lance.fragment.write_fragments(good, uri, **options) if len(good) else []
    failed = zip(bad[id_column].to_pylist(), bad["error"].to_pylist(), strict=True)
    row = {
        "fragments": [json.dumps(fragment.to_json()) for fragment in written],
        "schema": good.schema.serialize().to_pybytes(),
        "ids": good[id_column].to_pylist(),
        "failed": [{"id": id_, "error": error} for id_, error in failed],
    }
    return pa.Table.from_pylist([row], schema=_REPORT)


def _report(written: "ray.data.Dataset", total: int) -> pa.Table:
    """What was written and what failed, gathered while it happens."""
    parts = []
    with tqdm(total=total, unit="img", desc="Encoding") as bar, _worker_errors():
        for part in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            parts.append(part)
            bar.update(len(_flat(part, "failed")) + len(_flat(part, "ids")))
    return pa.concat_tables(parts)


def _commit(report: pa.Table, uri: str, there: Any, storage_options: dict[str, str] | None) -> None:
    """Let what was written be a dataset, or more rows of the one that is there."""
    from .lance_files import commit_fragments, lance

    fragments = [lance.FragmentMetadata.from_json(text) for text in _flat(report, "fragments").to_pylist()]
    if there is None:
        schema = pa.ipc.read_schema(pa.py_buffer(report["schema"][0].as_py()))
        commit_fragments(uri, schema, fragments, storage_options=storage_options)
    else:
        operation = lance.LanceOperation.Append(fragments)
        lance.LanceDataset.commit(uri, operation, read_version=there.version, storage_options=storage_options)


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Say what a worker raised, which Ray Data hides in the middle of its own words."""
    try:
        yield
    except import_ray().exceptions.RayTaskError as error:
        told = (str(error).rpartition("\n\nThe above exception")[0] or str(error)).strip().splitlines()[-1]
        if told.startswith("ValueError: "):
            raise ValueError(told.removeprefix("ValueError: ")) from error
        raise RuntimeError(f"a worker failed and nothing was written: {told}") from error


def _flat(report: pa.Table, column: str) -> pa.Array:
    """The values of all lists in a column."""
    return report[column].combine_chunks().flatten()


def _check_dataset(dataset: Any, encoder: BatchEncoder, num_actors: int | None, rows_per_fragment: int) -> None:
    if not isinstance(dataset, import_ray().data.Dataset):
        raise TypeError(
            f"dataset must be a ray.data.Dataset, got {type(dataset).__name__}; ray.data.from_huggingface makes one of "
            "a datasets.Dataset"
        )
    for name, value in (("num_actors", num_actors), ("rows_per_fragment", rows_per_fragment)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if encoder.id_column is None:
        raise ValueError("the encoder must have an id_column, by which every row is found to be written once")
    check_columns(dataset.columns(), encoder.image_column, encoder.id_column)


def _ids_to_encode(dataset: "ray.data.Dataset", column: str, there: Any) -> np.ndarray:
    """Ids of all rows, int64 `[N]`, checked against each other and those of the Lance dataset that is there."""
    tables = dataset.select_columns([column]).iter_batches(batch_size=None, batch_format="pyarrow")
    parts = [table[column].to_numpy() for table in tables]
    if not parts:
        raise ValueError("the dataset has no rows")
    ids = np.concatenate(parts)
    ids = check_ids(ids, len(ids))
    if there is not None:
        again = np.intersect1d(ids, there.to_table(columns=[column])[column].to_numpy())
        if len(again):
            raise ValueError(f"id {again[0]} is in the Lance dataset at {there.uri} already")
    return ids


def _check_every_row_once(expected: np.ndarray, found: np.ndarray) -> None:
    if not np.array_equal(np.sort(expected), np.sort(found)):
        raise RuntimeError(
            f"{len(expected)} rows came in and {len(found)} were encoded, or with other ids; nothing was written. The "
            "dataset must give the same rows each time it is read"
        )


def _pool_size(num_cpus: float, num_gpus: float) -> int:
    machines = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    if num_gpus:
        return max(1, sum(int(there.get("GPU", 0) / num_gpus) for there in machines))
    return max(1, sum(int((there.get("CPU", 0) - 1) / num_cpus) for there in machines))


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def import_ray() -> ModuleType:
    """Ray, with Ray Data."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "tcq_hf needs Ray to work on many machines: pip install 'tcq_hf[ray]' (ray[data] and pylance)"
        ) from error
    return ray
