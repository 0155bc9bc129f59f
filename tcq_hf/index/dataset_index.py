"""Attach an index to a dataset, ask it with a picture, get rows back."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

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
        mode: `"exact"` or `"fast"`, as for `build_index`.

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
    return dataset


def search(
    dataset: Dataset,
    query: Any,
    model: "TCQModel",
    processor: "TCQImageProcessor | None" = None,
    k: int = 10,
    index_name: str | None = None,
    image_column: str = "image",
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
    scores, rows = dataset.search(index_name, embedding, k=k)
    found = [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
    with dataset.formatted_as(None):
        table = dataset[[row for row, _ in found]]
    return [
        {name: values[i] for name, values in table.items()}
        | {"row": row, "score": score, "similarity": score / model.config.num_codebooks}
        for i, (row, score) in enumerate(found)
    ]


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
