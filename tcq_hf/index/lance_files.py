"""What a Lance dataset and its index hold, held against the codebooks."""

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa

from .code_index import CodeIndex, check_codebooks

try:
    import lance
    from lance.file import LanceFileReader
except ImportError as error:
    raise ImportError("tcq_hf needs pylance to write and search Lance datasets: pip install 'tcq_hf[lance]'") from error

INDEX_NAME = "tcq"
# Rows whose embeddings are held against their codes before a dataset is written.
_CHECKED_ROWS = 1000


def open_dataset(
    uri: str | os.PathLike, version: int | None = None, storage_options: dict[str, str] | None = None
) -> "lance.LanceDataset":
    """A Lance dataset; FileNotFoundError, naming it, if there is none."""
    try:
        return lance.dataset(str(uri), version=version, storage_options=storage_options)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise FileNotFoundError(f"there is no Lance dataset at {uri}") from error


def full_address(uri: str | os.PathLike) -> str:
    """An address as it is, a folder by its absolute path: workers stand in other folders."""
    return str(uri) if "://" in str(uri) else os.path.abspath(uri)


def dataset_exists(uri: str | os.PathLike, storage_options: dict[str, str] | None = None) -> bool:
    """Whether there is a Lance dataset."""
    try:
        open_dataset(uri, None, storage_options)
    except FileNotFoundError:
        return False
    return True


def commit_fragments(
    uri: str,
    schema: pa.Schema,
    fragments: list["lance.FragmentMetadata"],
    overwrite: bool = False,
    storage_options: dict[str, str] | None = None,
) -> None:
    """Let files that are written be a dataset; FileExistsError if there is one by now and `overwrite` is unset."""
    operation = lance.LanceOperation.Overwrite(schema, fragments)
    # Lance tries again over what others wrote; without a second try this is the first version or none.
    retries = {} if overwrite else {"max_retries": 0}
    try:
        lance.LanceDataset.commit(uri, operation, storage_options=storage_options, **retries)
    except OSError as error:
        if overwrite or not dataset_exists(uri, storage_options):
            raise
        raise FileExistsError(f"another process wrote a Lance dataset to {uri} meanwhile; it is kept") from error


def row_schema(codebooks: np.ndarray) -> pa.Schema:
    """Columns `id`, `codes` and `embedding` of a dataset for these codebooks."""
    num_codebooks, _, sub_dim = codebooks.shape
    types = (pa.int64(), pa.list_(pa.uint8(), num_codebooks), pa.list_(pa.float32(), num_codebooks * sub_dim))
    return pa.schema(list(zip(("id", "codes", "embedding"), types, strict=True)))


def read_codes(
    dataset: "lance.LanceDataset", id_column: str = "id", fragment_ids: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 `[n, M]` and ids int64 `[n]` of a dataset, or of some of its fragments."""
    fragments = None if fragment_ids is None else [dataset.get_fragment(number) for number in fragment_ids]
    table = dataset.scanner(columns=["codes", id_column], fragments=fragments).to_table()
    codes = table["codes"].combine_chunks()
    return codes.flatten().to_numpy().reshape(-1, codes.type.list_size), table[id_column].to_numpy().astype(np.int64)


def check_codes_belong(dataset: "lance.LanceDataset", codebooks: np.ndarray) -> None:
    """Raise ValueError unless `codes` and `embedding` of a dataset go with each other under these codebooks."""
    for name, type_ in zip(("codes", "embedding"), list(row_schema(codebooks).types)[1:], strict=True):
        if name not in dataset.schema.names or dataset.schema.field(name).type != type_:
            raise ValueError(f"{dataset.uri} needs a column {name!r} of {type_}; its columns are {dataset.schema}")
    rows = sample(dataset.count_rows())
    if not len(rows):
        return
    table = dataset.take(rows.tolist(), columns=["codes", "embedding"])
    codes, embeddings = (table[name].combine_chunks().flatten().to_numpy() for name in ("codes", "embedding"))
    check_belong(embeddings.reshape(len(rows), -1), codes.reshape(len(rows), -1), codebooks, rows)


def lance_codebooks(codebooks: Any) -> np.ndarray:
    """Codebooks float32 `[M, K, d]`; ValueError unless Lance has an index of this shape."""
    codebooks = check_codebooks(codebooks)
    num_codebooks, size, _ = codebooks.shape
    if size not in (16, 256):
        raise ValueError(f"Lance indexes codebooks of 16 or 256 codewords, these have codebook_size={size}")
    if size == 16 and num_codebooks % 2:
        raise ValueError(
            f"Lance packs two codes of 16 codewords into a byte: num_codebooks={num_codebooks} must be even"
        )
    return codebooks


def check_columns(dataset: "lance.LanceDataset", column: str, width: int, id_column: str) -> None:
    """Raise ValueError unless there are vectors of this width and ids."""
    schema = dataset.schema
    for name in (column, id_column):
        if name not in schema.names:
            raise ValueError(f"the dataset has no column {name!r}; its columns are {schema.names}")
    if schema.field(column).type != pa.list_(pa.float32(), width):
        raise ValueError(f"column {column!r} must be a list of {width} float32, got {schema.field(column).type}")
    if not pa.types.is_integer(schema.field(id_column).type):
        raise ValueError(f"column {id_column!r} must hold integers, got {schema.field(id_column).type}")


def sample(count: int) -> np.ndarray:
    """Numbers of some rows, spread over all."""
    return np.linspace(0, count - 1, min(count, _CHECKED_ROWS)).astype(int)


def check_belong(embeddings: np.ndarray, codes: np.ndarray, codebooks: np.ndarray, rows: np.ndarray) -> None:
    """Hold embeddings against codes of the rows of these numbers; ties, one code in ten thousand, may differ."""
    own = CodeIndex.of(codebooks)
    own.add(embeddings)
    wrong = (own.codes_array() != codes).any(axis=1)
    if wrong.mean() > 0.01:
        row = rows[np.argmax(wrong)]
        raise ValueError(
            f"the embedding of row {row} has another code under these codebooks than codes says: embeddings, codes "
            "and codebooks must come from one model"
        )


def fragments_to_index(
    dataset: "lance.LanceDataset", column: str, codebooks: np.ndarray, storage_options: dict[str, str] | None
) -> list[int]:
    """Fragments that the index of these codebooks does not cover; all of them where it is another's."""
    everything = [fragment.fragment_id for fragment in dataset.get_fragments()]
    covered: set[int] = set()
    for description in _indices_of(dataset, column):
        if description.name != INDEX_NAME:
            raise ValueError(
                f"column {column!r} has an index {description.name!r} that tcq_hf did not build, and Lance might "
                f"search that one; drop it first: dataset.drop_index({description.name!r})"
            )
        for segment in description.segments:
            if _why_foreign(dataset, segment.uuid, codebooks, storage_options):
                return everything
            covered |= set(segment.fragment_ids)
    return [fragment for fragment in everything if fragment not in covered]


def check_index(
    dataset: "lance.LanceDataset", column: str, codebooks: np.ndarray, storage_options: dict[str, str] | None
) -> None:
    """Raise unless all rows are in an index of these codebooks, and in no other that Lance might search instead."""
    descriptions = _indices_of(dataset, column)
    if not descriptions:
        raise ValueError(f"column {column!r} of {dataset.uri} has no index; build_lance_index builds it")
    for description in descriptions:
        for segment in description.segments:
            if why := _why_foreign(dataset, segment.uuid, codebooks, storage_options):
                raise ValueError(
                    f"the index {description.name!r} of column {column!r} in {dataset.uri} {why}; give the codebooks "
                    "that it was built from, or call build_lance_index"
                )
        covered = {fragment for segment in description.segments for fragment in segment.fragment_ids}
        left = [fragment for fragment in dataset.get_fragments() if fragment.fragment_id not in covered]
        if left:
            raise ValueError(
                f"{sum(fragment.count_rows() for fragment in left)} rows of {dataset.uri} in {len(left)} fragments are "
                "not in the index: they were added or changed after it was built; build_lance_index adds them"
            )


def _indices_of(dataset: "lance.LanceDataset", column: str) -> list[Any]:
    return [description for description in dataset.describe_indices() if column in description.field_names]


def _why_foreign(
    dataset: "lance.LanceDataset", uuid: str, codebooks: np.ndarray, storage_options: dict[str, str] | None
) -> str | None:
    """What is wrong with a segment of an index, by what its files hold; None if nothing is."""
    quantizer = index_file(dataset, uuid, "auxiliary.idx", storage_options)
    about = quantizer.metadata().schema.metadata or {}
    stored = json.loads(json.loads(about.get(b"storage_metadata", b"[null]"))[0] or "{}")
    partitions = index_file(dataset, uuid, "index.idx", storage_options)
    ivf = partitions.metadata().schema.metadata or {}
    kind = json.loads(ivf.get(b"lance:index", b"{}"))
    if "codebook_position" not in stored or (kind.get("type"), kind.get("distance_type")) != ("IVF_PQ", "l2"):
        return "is no IVF_PQ index of the metric l2"
    tensor = quantizer.read_global_buffer(stored["codebook_position"])
    shape = (stored["num_sub_vectors"], 1 << stored["nbits"], stored["dimension"] // stored["num_sub_vectors"])
    if shape != codebooks.shape:
        return f"has codebooks of shape {list(shape)}, expected {list(codebooks.shape)}"
    # A protocol buffer whose last field is the data. Processors normalise codewords with other last bits.
    found = np.frombuffer(tensor[-codebooks.nbytes :], np.float32).reshape(shape)
    if not np.abs(found - codebooks).max() <= 1e-5:
        return "was built from other codebooks"
    zero = bytes(4 * codebooks.shape[0] * codebooks.shape[2])
    # The tag of a tensor's data, their length, and all of them zeros.
    if b"\x1a" + _varint(len(zero)) + zero not in partitions.read_global_buffer(int(ivf[b"lance:ivf"])):
        return "has other centroids than a single one of zeros"
    return None


def index_file(
    dataset: "lance.LanceDataset", uuid: str, name: str, storage_options: dict[str, str] | None
) -> LanceFileReader:
    """A file of a segment of an index."""
    return LanceFileReader(f"{dataset.uri}/_indices/{uuid}/{name}", storage_options)


def _varint(number: int) -> bytes:
    """A length as protocol buffers write it."""
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])
