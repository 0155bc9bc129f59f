"""Attach an index to a dataset, ask it with a picture, get rows back."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .code_index import faiss, select_rows
from .encoding import encode_pictures
from .faiss_index import Mode, build_index, check_index_belongs

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel


def codes_array(dataset: Dataset, column: str = "codes") -> np.ndarray:
    """A codes column as a uint8 array `[N, M]`, read straight from Arrow.

    Raises:
        ValueError: If the column is missing, is no `List(uint8, M)` or holds an empty row.
    """
    if column not in dataset.column_names:
        raise ValueError(f"the dataset has no column {column!r}; its columns are {dataset.column_names}")
    values = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if not pa.types.is_fixed_size_list(values.type) or values.type.value_type != pa.uint8():
        raise ValueError(f"column {column!r} must be List(Value('uint8'), length=M), got {dataset.features[column]}")
    width, parts = values.type.list_size, [chunk.flatten() for chunk in values.chunks]
    if values.null_count:
        raise ValueError(f"column {column!r} has {values.null_count} rows without a code")
    if any(part.null_count for part in parts):
        raise ValueError(f"column {column!r} has codes with missing values")
    chunks = [part.to_numpy().reshape(-1, width) for part in parts]
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.uint8)


def add_code_index(
    dataset: Dataset, column: str, model: "TCQModel", name: str | None = None, mode: Mode = "exact"
) -> Dataset:
    """Attach a FAISS index over a codes column; no float column is needed.

    Attach last: `datasets` refuses to shuffle, select or filter a dataset that has an index. A code does not tell which
    model made it: give the model that did.

    Args:
        dataset: A dataset from `encode_dataset`.
        column: The codes column.
        model: The model (or codebooks `[M, K, d]`) that made the codes.
        name: Name of the index; the column's by default.
        mode: `"exact"`, `"fast"` or `"ivf"`, as for `build_index`.

    Returns:
        The same dataset, with the index attached, as `dataset.add_faiss_index` does.
    """
    return attach_index(dataset, build_index(model, codes_array(dataset, column), mode), name or column)


def attach_index(dataset: Dataset, index: Any, name: str) -> Dataset:
    """Attach a filled FAISS index, on CPU or GPU, whose rows are those of the dataset; gives the same dataset back.

    Raises:
        ValueError: If the index has another number of rows than the dataset.
    """
    if index.ntotal != len(dataset):
        raise ValueError(
            f"the index holds {index.ntotal} rows, the dataset {len(dataset)}: they do not belong together"
        )
    nothing, shown = np.zeros((0, index.d), dtype=np.float32), not are_progress_bars_disabled()
    disable_progress_bars()  # datasets would show one over the zero vectors
    try:
        dataset.add_faiss_index_from_external_arrays(nothing, index_name=name, custom_index=index)
    finally:
        if shown:
            enable_progress_bars()
    # What makes `dataset.save_faiss_index` copy it back first.
    dataset.get_index(name).device = _device_of(index)
    return dataset


def _device_of(index: Any) -> int | list[int] | None:
    """Number of the GPU, or of several, that an index lies on; None for the CPU."""
    if isinstance(index, faiss.IndexShards):
        members = [_device_of(faiss.downcast_index(index.at(number))) for number in range(index.count())]
        return None if None in members else members
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    return inner.getDevice() if hasattr(inner, "getDevice") else None


def search(
    dataset: Dataset,
    query: Any,
    model: "TCQModel",
    processor: "TCQImageProcessor | None" = None,
    k: int = 10,
    index_name: str | None = None,
    image_column: str = "image",
    filters: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The k rows whose pictures are most similar to a query.

    Ids and scores alone, without reading rows, come from `dataset.search(index_name, embedding, k)`.

    Args:
        dataset: A dataset with an attached index of this model.
        query: A picture (PIL image, path, URL, bytes, integer array or tensor), a row of a dataset (`{"image": ...}`),
            the number of a row of this dataset, or an embedding, float array or tensor `[D]`.
        model: The model that made the codes.
        processor: Its image processor; may be left out for an embedding.
        k: Number of rows.
        index_name: Which index, where several are attached.
        image_column: Column of the pictures.
        filters: Search only rows that have this value, or one of these, in a column: `{"label": ["dress", "hat"]}`. The
            names of a `ClassLabel` are understood; with several columns all must fit.

    Returns:
        Rows, best first, each with `row` (its number), `score` (inner product with the stored code, larger is closer,
        at most M) and `similarity` = score / M.

    Raises:
        ValueError: If the index belongs to another model, k exceeds its size, or the query has a wrong shape.
    """
    index_name = _index_name(dataset, index_name)
    index = dataset.get_index(index_name).faiss_index
    check_index_belongs(index, model)
    if not 1 <= k <= index.ntotal:
        raise ValueError(f"k must be from 1 to {index.ntotal}, the rows in the index, got {k}")
    clash = {"row", "score", "similarity"} & set(dataset.column_names)
    if clash:
        raise ValueError(f"the dataset has a column {sorted(clash)[0]!r}, which search() adds; rename it")
    embedding = _embedding(dataset, query, model, processor, image_column)
    if filters:
        scores, rows = _search_some(index, matching_rows(dataset, filters), embedding, k)
    else:
        scores, rows = dataset.search(index_name, embedding, k=k)
    found = [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
    with dataset.formatted_as(None):
        table = dataset[[row for row, _ in found]]
    return [
        {name: values[i] for name, values in table.items()}
        | {"row": row, "score": score, "similarity": score / model.config.num_codebooks}
        for i, (row, score) in enumerate(found)
    ]


def matching_rows(dataset: Dataset, filters: Mapping[str, Any]) -> np.ndarray:
    """Numbers of the rows that have one of the given values in each of the given columns, int64 `[n]`, ascending.

    Raises:
        ValueError: If there is no such column, no such class, or a value is not of the column's type.
    """
    matches = np.ones(len(dataset), dtype=bool)
    for column, wanted in filters.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {column!r} to filter by; its columns are {dataset.column_names}"
            )
        feature = dataset.features[column]
        values = wanted if isinstance(wanted, (list, tuple, set, np.ndarray)) else [wanted]
        values = [_class_number(feature, column, value) for value in values]
        stored = dataset.select_columns([column]).with_format("arrow")[:].column(0)
        try:
            fits = pc.is_in(stored, value_set=pa.array(values).cast(stored.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(f"column {column!r} holds {stored.type} and cannot be filtered by {wanted!r}") from error
        matches &= fits.to_numpy()
    return np.flatnonzero(matches)


def _class_number(feature: Any, column: str, value: Any) -> Any:
    """Number of a class that is given by its name; any other value as it is."""
    if not isinstance(feature, ClassLabel) or not isinstance(value, str):
        return value
    if value in feature.names:
        return feature.str2int(value)
    raise ValueError(f"column {column!r} has no class {value!r}; its classes are {', '.join(feature.names)}")


def _search_some(index: Any, rows: np.ndarray, embedding: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of the k best of some rows, by their exact codes."""
    if k > len(rows):
        raise ValueError(f"k={k}, but only {len(rows)} rows fit the filter")
    member = faiss.downcast_index(index) if type(index) is faiss.Index else index
    own_codes = isinstance(member, faiss.IndexIVFPQ) and not member.by_residual
    if not own_codes and not isinstance(member, (faiss.IndexPQ, faiss.IndexRefine)):
        raise ValueError(f"a {type(member).__name__} cannot be filtered; attach an index from build_index")
    scores, found = select_rows(member, rows).search(embedding[None], k)
    return scores[0], rows[found[0]]


def _index_name(dataset: Dataset, index_name: str | None) -> str:
    names = dataset.list_indexes()
    if not names:
        raise ValueError("the dataset has no index; attach one with add_code_index(dataset, 'codes', model)")
    if index_name is None and len(names) > 1:
        raise ValueError(f"the dataset has several indexes, choose index_name from {names}")
    if index_name is not None and index_name not in names:
        raise ValueError(f"the dataset has no index {index_name!r}; attached: {names}")
    return index_name or names[0]


def _embedding(
    dataset: Dataset, query: Any, model: "TCQModel", processor: "TCQImageProcessor | None", image_column: str
) -> np.ndarray:
    if isinstance(query, (list, tuple)) or getattr(query, "ndim", 0) == 4:
        raise TypeError("query must be one picture, row or embedding; call search() once for each of several")
    if isinstance(query, torch.Tensor):
        query = (query.float() if query.is_floating_point() else query).detach().cpu().numpy()
    if isinstance(query, np.ndarray) and query.dtype.kind == "f":
        return _check_embedding(query, model)
    if processor is None:
        raise ValueError("a picture as query needs the processor; without it pass an embedding, float [D]")
    return _embed_picture(_picture(dataset, query, image_column), model, processor)


def _picture(dataset: Dataset, query: Any, image_column: str) -> Any:
    """The picture of a query that may be a row or the number of one."""
    if isinstance(query, (int, np.integer)):
        if not 0 <= query < len(dataset):
            raise ValueError(f"query row must be from 0 to {len(dataset) - 1}, got {query}")
        with dataset.formatted_as(None):
            query = dataset[int(query)]
    return query[image_column] if isinstance(query, Mapping) and image_column in query else query


def _embed_picture(query: Any, model: "TCQModel", processor: "TCQImageProcessor") -> np.ndarray:
    if isinstance(query, (str, os.PathLike)) and not str(query).startswith(("http://", "https://")):
        if not os.path.isfile(query):
            raise FileNotFoundError(f"query: no file {query}")
    try:
        return encode_pictures(model, processor, query)[0]
    except (OSError, PIL.Image.DecompressionBombError) as error:
        place = f" {query}" if isinstance(query, (str, os.PathLike)) else ""
        raise OSError(f"the query picture{place} cannot be read: {error}") from error


def _check_embedding(query: np.ndarray, model: "TCQModel") -> np.ndarray:
    config = model.config
    if query.shape != (config.embedding_dim,):
        raise ValueError(f"a query embedding must have shape [{config.embedding_dim}], got {list(query.shape)}")
    norms = np.linalg.norm(query.astype(np.float32).reshape(config.num_codebooks, -1), axis=1)
    if not np.abs(norms - 1).max() <= 1e-2:
        raise ValueError(
            "a query embedding must have unit-norm sub-vectors, as model(...).embeddings has; "
            f"their norms reach from {norms.min():.3g} to {norms.max():.3g}"
        )
    return query.astype(np.float32)
