"""Codebooks and codes in, a FAISS index on CPU or GPU out; save and load it with its recipe. FAISS and NumPy only."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .writing import written_aside

try:
    import faiss
except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises RuntimeError
    raise ImportError(
        "tcq_hf needs FAISS to index and search: pip install 'tcq_hf[cpu]' (faiss-cpu) or 'tcq_hf[gpu]' (faiss-gpu)"
    ) from error

# Sub-quantizer counts for which faiss-gpu has a kernel whose float32 tables fit into shared memory.
_GPU_NUM_CODEBOOKS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
_BLOCK_ROWS = 1 << 20


class CodeIndex(faiss.IndexPQ):
    """An exhaustive FAISS index over learned codes whose codebooks cannot be trained away.

    Scores are inner products of the float query with the stored codewords: larger is closer, at most M. `add(x)`
    encodes float embeddings with the learned codebooks, as the model does. `faiss.write_index` stores a plain
    `IndexPQ`.
    """

    def train(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Always raises: training would overwrite the learned codebooks."""
        raise RuntimeError("this index holds learned codebooks; train() would overwrite them (leave train_size unset)")

    def add(self, x: np.ndarray, *args: Any, **kwargs: Any) -> None:
        """Encode float embeddings `[n, D]` with the learned codebooks and store their codes."""
        super().add(_check_vectors(x, self.d, "embeddings"), *args, **kwargs)

    def search(self, x: np.ndarray, k: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[Q, k]`, larger is closer, and row ids int64 `[Q, k]` of the k best rows of each query."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > self.ntotal:
            raise ValueError(f"k={k} is larger than the index, which holds {self.ntotal} rows")
        return super().search(_check_vectors(x, self.d, "queries"), k, **kwargs)


def build_index(codebooks: Any, codes: Any = None) -> CodeIndex:
    """A FAISS index from learned codebooks, empty or filled with codes.

    Args:
        codebooks: float32 `[M, K, d]` of unit-norm codewords, or an object with `codebooks()`, such as a `TCQModel`.
        codes: Integers `[N, M]` below K, or None for an empty index.

    Returns:
        An index with N rows, in the order of `codes`.

    Raises:
        TypeError: If the codes are not integers.
        ValueError: If the shapes do not fit, a codeword has no unit norm or a code is not below K.
    """
    codebooks = _check_codebooks(codebooks)
    num_codebooks, codebook_size, sub_dim = codebooks.shape
    num_bits = codebook_size.bit_length() - 1
    index = CodeIndex(num_codebooks * sub_dim, num_codebooks, num_bits, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    if codes is not None:
        add_codes(index, codes)
    return index


def add_codes(index: faiss.IndexPQ, codes: Any) -> None:
    """Append codes, integers `[N, M]` below K, to an index from `build_index`; checked before anything is added."""
    codes = np.asarray(codes)
    num_codebooks, num_bits = index.pq.M, index.pq.nbits
    if codes.ndim != 2 or codes.shape[1] != num_codebooks:
        raise ValueError(f"codes must have shape [N, {num_codebooks}], got {list(codes.shape)}")
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes must be integers, got {codes.dtype}; floats go through index.add(embeddings)")
    if codes.size and not 0 <= codes.min() <= codes.max() < 1 << num_bits:
        row, book = np.argwhere((codes < 0) | (codes >= 1 << num_bits))[0]
        raise ValueError(f"codes must be below codebook_size={1 << num_bits}, got {codes[row, book]} in row {row}")
    for start in range(0, len(codes), _BLOCK_ROWS):
        index.add_sa_codes(_pack(codes[start : start + _BLOCK_ROWS], num_bits))


def index_codebooks(index: Any) -> np.ndarray | None:
    """Codebooks inside an index, float32 `[M, K, d]`; None for an index without any, or on a GPU."""
    index = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    quantizer = getattr(index, "pq", None)
    return (
        None
        if quantizer is None
        else faiss.vector_to_array(quantizer.centroids).reshape(quantizer.M, quantizer.ksub, quantizer.dsub)
    )


def check_index_belongs(index: Any, codebooks: Any) -> None:
    """Raise ValueError unless an index holds these codebooks; one on a GPU hides its own and is taken on trust."""
    expected, found = _check_codebooks(codebooks), index_codebooks(index)
    if found is None and (hasattr(index, "getDevice") or isinstance(index, (faiss.IndexReplicas, faiss.IndexShards))):
        return
    if found is None or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"the index is a {type(index).__name__} without the model's codebooks; use build_index(model)")
    # Processors normalise codewords with other last bits.
    if found.shape != expected.shape or not np.abs(found - expected).max() <= 1e-5:
        raise ValueError(
            f"the index belongs to another model: its codebooks {list(found.shape)} differ from the model's "
            f"{list(expected.shape)}; build the index from this model's codes"
        )


def save_index(index: faiss.Index, path: str | os.PathLike, model_id: str | None = None) -> None:
    """Write an index as plain FAISS, readable from any language, and its recipe beside it as `<path>.json`.

    Both files are written aside and renamed, so that a failure leaves earlier files as they were.

    Args:
        index: An index from `build_index`.
        path: File to write.
        model_id: Hub name or folder of the model, kept in the recipe.

    Raises:
        OSError: If the disk refuses the file; what was there before is kept.
    """
    if not isinstance(index, faiss.IndexPQ) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise TypeError(f"only an index from build_index can be saved, got {type(index).__name__}; keep the CPU index")
    codebooks = _check_codebooks(index_codebooks(index))
    path = Path(path)
    recipe = {
        "model": model_id,
        "metric": "inner_product",
        "embedding_dim": index.d,
        "num_codebooks": codebooks.shape[0],
        "codebook_size": codebooks.shape[1],
        "count": index.ntotal,
        "codebooks_sha256": _digest(codebooks),
        "faiss": faiss.__version__,
    }
    # Both files are whole before either takes its place.
    with written_aside(path) as aside, written_aside(_recipe_path(path)) as recipe_aside:
        _write_faiss(index, aside)
        recipe["file_bytes"] = aside.stat().st_size
        recipe_aside.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def load_index(path: str | os.PathLike, codebooks: Any = None) -> CodeIndex:
    """Read an index from `save_index`, or any FAISS `IndexPQ` file of unit-norm codebooks.

    Args:
        path: File to read; `<path>.json`, where it exists, is held against it.
        codebooks: Codebooks `[M, K, d]` or a model that the index must belong to; None skips that check.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not what the recipe says, is another kind of index or belongs to
            another model.
    """
    path = Path(path)
    recipe = read_recipe(path)
    if recipe is not None and path.stat().st_size != recipe["file_bytes"]:
        raise ValueError(
            f"index file {path} has {path.stat().st_size} bytes, its recipe says {recipe['file_bytes']}: it is "
            "truncated or was replaced"
        )
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"index file {path} is truncated or no FAISS index: {error}") from error
    if type(index) is not faiss.IndexPQ or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"{path} holds a {type(index).__name__}; expected an IndexPQ with inner product")
    found = _check_codebooks(index_codebooks(index))
    if recipe is not None and (recipe["count"], recipe["codebooks_sha256"]) != (index.ntotal, _digest(found)):
        raise ValueError(f"index file {path} does not match its recipe {_recipe_path(path)}: one of them was replaced")
    if codebooks is not None:
        check_index_belongs(index, codebooks)
    # FAISS hands out its own class; ours adds no data, only the refusal to train.
    index.__class__ = CodeIndex
    return index


def read_recipe(path: str | os.PathLike) -> dict[str, Any] | None:
    """The recipe beside an index file, or None; FileNotFoundError if the index file itself is missing."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no index file {path}")
    file = _recipe_path(Path(path))
    if not file.exists():
        return None
    try:
        recipe = json.loads(file.read_text(encoding="utf-8"))
        return {name: recipe[name] for name in ("file_bytes", "count", "codebooks_sha256")} | recipe
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the recipe {file} is damaged; delete it to read the index without its checks") from error


def zero_coarse_index(index: faiss.IndexPQ, num_lists: int = 128) -> faiss.IndexIVFPQ:
    """The same codes as an IVFPQ index with equal zero centroids, all of them probed: the form that a GPU takes.

    The residual to a zero centroid is the vector itself, so scores are those of the flat index. Rows are dealt round
    robin over the lists, so that a GPU scans one query with many blocks.

    Args:
        index: An index from `build_index`.
        num_lists: Lists L; near the number of multiprocessors for few queries, 8 to 16 for large batches.
    """
    codebooks, num_bits = index_codebooks(index), index.pq.nbits
    coarse = faiss.IndexFlat(index.d, faiss.METRIC_INNER_PRODUCT)
    coarse.add(np.zeros((num_lists, index.d), dtype=np.float32))
    inverted = faiss.IndexIVFPQ(coarse, index.d, num_lists, index.pq.M, num_bits, faiss.METRIC_INNER_PRODUCT)
    inverted.own_fields = True
    coarse.this.disown()  # the inverted index frees its quantizer
    faiss.copy_array_to_vector(codebooks.ravel(), inverted.pq.centroids)
    inverted.is_trained = True
    inverted.nprobe = num_lists
    packed = faiss.vector_to_array(index.codes).reshape(index.ntotal, index.code_size)
    for start in range(0, len(packed), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(packed)), dtype=np.int64)
        lists = (rows % num_lists).astype("<u8").view(np.uint8).reshape(-1, 8)[:, : inverted.coarse_code_size()]
        inverted.add_sa_codes(np.ascontiguousarray(np.hstack([lists, packed[rows]])), rows)
    return inverted


def to_gpu(index: faiss.IndexPQ, device: int = 0, num_lists: int = 128) -> Any:
    """Copy an index onto a GPU, with the scores of the CPU index.

    Args:
        index: An index from `build_index`.
        device: Number of the GPU.
        num_lists: See `zero_coarse_index`.

    Returns:
        A `faiss.GpuIndexIVFPQ`, ready for `dataset.add_faiss_index(custom_index=...)`. It answers k up to 2048 and
        ignores an IDSelector.

    Raises:
        RuntimeError: If FAISS has no GPU support here or sees no such GPU.
        ValueError: If M or K is one that the GPU kernels refuse.
    """
    num_codebooks, codebook_size = index.pq.M, index.pq.ksub
    if codebook_size != 256:
        raise ValueError(f"FAISS on a GPU takes codebook_size=256 only, got {codebook_size}; search on the CPU")
    if num_codebooks not in _GPU_NUM_CODEBOOKS:
        raise ValueError(f"FAISS on a GPU takes num_codebooks in {_GPU_NUM_CODEBOOKS}, got {num_codebooks}")
    if not 1 <= num_lists <= 2048:
        raise ValueError(f"num_lists must be from 1 to 2048, got {num_lists}")
    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("this FAISS has no GPU support: pip uninstall faiss-cpu && pip install 'tcq_hf[gpu]'")
    if device >= faiss.get_num_gpus():
        raise RuntimeError(f"device={device}, but FAISS sees {faiss.get_num_gpus()} GPUs")
    options = faiss.GpuClonerOptions()
    options.indicesOptions = faiss.INDICES_32_BIT if index.ntotal < 1 << 31 else faiss.INDICES_64_BIT
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, zero_coarse_index(index, num_lists), options)


def _write_faiss(index: faiss.Index, path: Path) -> None:
    # Through a file of Python: FAISS's own ignores what fails at closing, as on a full disk.
    with path.open("wb") as file:
        failed: list[OSError] = []

        def write(data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                failed.append(error)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        if failed:
            raise failed[0]


def _recipe_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _check_codebooks(codebooks: Any) -> np.ndarray:
    codebooks = codebooks.codebooks() if hasattr(codebooks, "codebooks") else codebooks
    codebooks = np.ascontiguousarray(codebooks, dtype=np.float32)
    if codebooks.ndim != 3 or not codebooks.size:
        raise ValueError(f"codebooks must have shape [M, K, d], got {list(codebooks.shape)}")
    size = codebooks.shape[1]
    if not 2 <= size <= 256 or size & (size - 1):
        raise ValueError(f"codebook_size must be a power of two from 2 to 256, got {size}")
    deviation = np.abs(np.linalg.norm(codebooks, axis=-1) - 1).max()
    if not deviation <= 1e-5:
        raise ValueError(
            f"codewords must have unit norm (the norms deviate by up to {deviation:.3g}); use model.codebooks()"
        )
    return codebooks


def _check_vectors(vectors: Any, width: int, name: str) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"{name} must have shape [n, {width}], got {list(vectors.shape)}")
    if vectors.dtype.kind != "f":
        raise TypeError(f"{name} must be floats, got {vectors.dtype}; codes go through add_codes or build_index")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, row {int(np.argmin(finite))} is not")
    return vectors


def _pack(codes: np.ndarray, num_bits: int) -> np.ndarray:
    if num_bits == 8:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    if num_bits == 4 and codes.shape[1] % 2 == 0:  # as pack_bitstrings does, many times faster
        low, high = codes[:, 0::2].astype(np.uint8), codes[:, 1::2].astype(np.uint8)
        return np.ascontiguousarray(low | high << 4)
    return faiss.pack_bitstrings(np.ascontiguousarray(codes, dtype=np.int32), num_bits)


def _digest(codebooks: np.ndarray) -> str:
    return hashlib.sha256(codebooks.tobytes()).hexdigest()
