"""Attach an index to a dataset, ask it with a picture, get rows back."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .code_index import faiss, select_rows
from .faiss_index import Mode, build_index, check_index_belongs, members_of
from .query_embedding import is_embedding, query_embedding

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel

# Scores float32 and numbers int64 of rows `[Q, k]`, as FAISS gives them.
Ranking = tuple[np.ndarray, np.ndarray]
Rerank = Callable[[np.ndarray, np.ndarray, np.ndarray], Ranking]


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
    devices = [member.getDevice() if hasattr(member, "getDevice") else None for member in members_of(index)]
    if None in devices or not devices:
        return None
    return devices if len(devices) > 1 else devices[0]


def search(
    dataset: Dataset,
    query: Any,
    model: "TCQModel",
    processor: "TCQImageProcessor | None" = None,
    k: int = 10,
    index_name: str | None = None,
    image_column: str = "image",
    filters: Mapping[str, Any] | None = None,
    rerank: Rerank | None = None,
    fuse: Callable[..., Ranking] | None = None,
    depth: int = 400,
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
        rerank: A fitted re-ranker of `tcq_hf.rerank`, whose graph has the rows of this dataset; it sees the `depth`
            best rows and their similarities.
        fuse: A `tcq_hf.rerank.fusion.Fusion` with the other indexes of the dataset whose lists of the `depth` best rows
            are merged with that of this one, before any re-ranking.
        depth: Rows to find for both, at least k of them.

    Returns:
        Rows, best first, each with `row` (its number), `score` (inner product with the stored code, larger is closer,
        at most M; after re-ranking or fusion theirs) and `similarity`, the inner product / M whatever the order.

    Raises:
        RuntimeError: If the re-ranker was not fitted.
        TypeError: If `rerank` is a class, `fuse` no `Fusion`, or the query is several.
        ValueError: If the index belongs to another model, k exceeds its size, the query has a wrong shape, rows are
            filtered that a re-ranker could bring back, its gallery is another one, an embedding of one model is to be
            fused with lists of others, depth is below 1, or the index, being on a GPU, gives no single rows.
    """
    index_name = _index_name(dataset, index_name)
    clash = {"row", "score", "similarity"} & set(dataset.column_names)
    if clash:
        raise ValueError(f"the dataset has a column {sorted(clash)[0]!r}, which search() adds; rename it")
    if rerank is not None:
        _check_reranker(rerank, len(dataset), filters)
    if fuse is not None and is_embedding(query):
        raise ValueError("an embedding is that of one model and fuse asks others too; give a picture or a row as query")
    if fuse is not None and (isinstance(fuse, type) or not hasattr(fuse, "others")):
        name = fuse.__name__ if hasattr(fuse, "__name__") else type(fuse).__name__
        raise TypeError(f"fuse must be a Fusion of further indexes, tcq_hf.rerank.Fusion(others), got {name}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if rerank is not None or fuse is not None:
        _with_single_rows(dataset.get_index(index_name).faiss_index)
    allowed = matching_rows(dataset, filters) if filters else None
    count = k if rerank is None and fuse is None else max(k, depth)

    def ask(name: str, model: "TCQModel", processor: "TCQImageProcessor | None") -> Ranking:
        embedding = query_embedding(dataset, query, model, processor, image_column)
        return _find(dataset, name, model, embedding, k, count, allowed)

    embedding = query_embedding(dataset, query, model, processor, image_column)
    scores, rows = _find(dataset, index_name, model, embedding, k, count, allowed)
    similarity = _Similarity(dataset.get_index(index_name).faiss_index, embedding, model.config.num_codebooks)
    similarity.learn(scores[0], rows[0])
    if fuse is not None:
        scores, rows = fuse(ask, scores, rows)
    if rerank is not None:
        scores, rows = rerank(embedding[None], similarity(rows[0])[None], rows)
    there = rows[0, :k] >= 0
    scores, rows = scores[0, :k][there], rows[0, :k][there]
    similarities = similarity(rows)
    with dataset.formatted_as(None):
        table = dataset[rows.tolist()]
    added = {"row": rows.tolist(), "score": scores.tolist(), "similarity": similarities.tolist()}
    return [{name: values[i] for name, values in (table | added).items()} for i in range(len(rows))]


def _find(
    dataset: Dataset,
    name: str,
    model: "TCQModel",
    embedding: np.ndarray,
    k: int,
    count: int,
    allowed: np.ndarray | None,
) -> Ranking:
    """Scores float32 and numbers int64 `[1, n]` of the `count` best rows of an index, at least k, or of all it has."""
    index = dataset.get_index(_index_name(dataset, name)).faiss_index
    check_index_belongs(index, model)
    if not 1 <= k <= index.ntotal:
        raise ValueError(f"k must be from 1 to {index.ntotal}, the rows in the index, got {k}")
    if allowed is not None:
        if k > len(allowed):
            raise ValueError(f"k={k}, but only {len(allowed)} rows fit the filter")
        return _search_some(index, allowed, embedding, min(count, len(allowed)))
    scores, rows = dataset.search(name, embedding, k=min(count, index.ntotal))
    return np.asarray(scores)[None], np.asarray(rows)[None]


class _Similarity:
    """Inner products / M of one embedding with rows of an index, by their exact codes."""

    def __init__(self, index: Any, embedding: np.ndarray, num_codebooks: int) -> None:
        self._index, self._embedding, self._num_codebooks = index, embedding, num_codebooks
        self._scores: dict[int, float] = {}

    def learn(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Take over scores `[n]` of a search."""
        self._scores |= zip(rows.tolist(), scores.tolist(), strict=True)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Those of rows int64 `[n]`, float64 `[n]`; -inf where the number is -1."""
        there = rows[rows >= 0]
        if not self._scores.keys() >= set(there.tolist()):
            scores, numbers = _search_some(self._index, there, self._embedding, len(there))
            self.learn(scores[0], numbers[0])
        found = np.full(len(rows), -np.inf)
        found[rows >= 0] = [self._scores[row] / self._num_codebooks for row in there.tolist()]
        return found


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
        except (OverflowError, pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
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


def _search_some(index: Any, rows: np.ndarray, embedding: np.ndarray, k: int) -> Ranking:
    """Scores and numbers `[1, k]` of the k best of some rows, by their exact codes."""
    scores, found = select_rows(_with_single_rows(index), rows).search(embedding[None], k)
    return scores, rows[found]


def _with_single_rows(index: Any) -> Any:
    """The index, if its codes can be read row by row; ValueError if not."""
    member = faiss.downcast_index(index) if type(index) is faiss.Index else index
    own_codes = isinstance(member, faiss.IndexIVFPQ) and not member.by_residual
    if not own_codes and not isinstance(member, (faiss.IndexPQ, faiss.IndexRefine)):
        raise ValueError(
            f"a {type(member).__name__} does not give single rows, as filters, rerank and fuse need them; attach an "
            "index from build_index"
        )
    return member


def _check_reranker(rerank: Any, count: int, filters: Any) -> None:
    if isinstance(rerank, type):
        raise TypeError(f"rerank must be a fitted re-ranker, got the class; use {rerank.__name__}().fit(graph)")
    if filters:
        raise ValueError("filters cannot go with rerank, which ranks all rows of its graph; leave one of them out")
    known = getattr(rerank, "num_rows", count)
    if known != count:
        raise ValueError(f"rerank knows a gallery of {known} rows, the dataset has {count}: the graph is another one's")


def _index_name(dataset: Dataset, index_name: str | None) -> str:
    names = dataset.list_indexes()
    if not names:
        raise ValueError("the dataset has no index; attach one with add_code_index(dataset, 'codes', model)")
    if index_name is None and len(names) > 1:
        raise ValueError(f"the dataset has several indexes, choose index_name from {names}")
    if index_name is not None and index_name not in names:
        raise ValueError(f"the dataset has no index {index_name!r}; attached: {names}")
    return index_name or names[0]
