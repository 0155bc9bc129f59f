"""A query in, whatever form it has, its embedding out."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset

from .encoding import encode_pictures

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel


def is_embedding(query: Any) -> bool:
    """Whether a query is an embedding, float array or tensor or list of floats, and no picture or row."""
    if isinstance(query, torch.Tensor):
        return query.is_floating_point()
    if isinstance(query, np.ndarray):
        return query.dtype.kind == "f"
    return isinstance(query, list) and bool(query) and all(isinstance(value, float) for value in query)


def query_embedding(
    dataset: Dataset, query: Any, model: "TCQModel", processor: "TCQImageProcessor | None", image_column: str
) -> np.ndarray:
    """Embedding float32 `[D]` of a picture, a row, the number of a row of the dataset, or an embedding as it is.

    Raises:
        TypeError: If it is several.
        OSError: If its file is missing or no picture.
        ValueError: If a picture comes without processor, or an embedding or a row number is impossible.
    """
    if isinstance(query, list) and is_embedding(query):
        query = np.array(query, np.float32)  # as a row of a dataset has it
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
