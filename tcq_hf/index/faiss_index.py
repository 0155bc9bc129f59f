"""Codebooks and codes in, a FAISS index out; save and load it with its recipe. FAISS and NumPy only."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from .code_index import CodeIndex, check_codebooks, codebooks_of, faiss, held
from .fast_index import FastIndex
from .gpu_index import gpu_codebooks, has_zero_centroids
from .ivf_index import IVFIndex
from .writing import written_aside

Mode = Literal["exact", "fast", "ivf"]
AnyIndex = CodeIndex | FastIndex | IVFIndex
# What FAISS reads from a file, and what it becomes.
_KINDS = {faiss.IndexPQ: CodeIndex, faiss.IndexRefine: FastIndex, faiss.IndexIVFPQ: IVFIndex}


def build_index(codebooks: Any, codes: Any = None, mode: Mode = "exact") -> AnyIndex:
    """A FAISS index from learned codebooks, empty or filled with codes.

    Args:
        codebooks: float32 `[M, K, d]` of unit-norm codewords, or an object with `codebooks()`, such as a `TCQModel`.
        codes: Integers `[N, M]` below K, or None for an empty index.
        mode: `"exact"` compares a query with all codes. `"fast"` keeps a 4-bit copy too, scans it at the speed of
            memory, and gives what it finds its exact score; about one in a hundred of the best rows is missed.
            `"ivf"` compares it with the rows of the nearest lists only, for tens of millions of rows; about one in
            twenty of the best is missed, and its `recall` says how many.

    Returns:
        An index with N rows, in the order of `codes`.

    Raises:
        TypeError: If the codes are not integers.
        ValueError: If the shapes do not fit, a codeword has no unit norm, a code is not below K, the mode is unknown,
            or `"ivf"` gets no codes to learn its lists from.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    index = CodeIndex.of(check_codebooks(codebooks))
    if codes is not None:
        index.add_codes(codes)
    if mode == "ivf":
        return IVFIndex.of(index)
    return FastIndex(index) if mode == "fast" else index


def index_codebooks(index: Any) -> np.ndarray | None:
    """Codebooks inside an index, float32 `[M, K, d]`; None for an index without any, or on a GPU."""
    if hasattr(index, "codebooks"):
        return index.codebooks()
    index = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    return codebooks_of(index) if hasattr(index, "pq") else None


def members_of(index: Any) -> list[Any]:
    """The indexes inside one that hold its rows: each of its shards or replicas, the one behind transforms, or itself.

    They live as long as it does.
    """
    if isinstance(index, faiss.IndexPreTransform):
        return members_of(faiss.downcast_index(index.index))
    if isinstance(index, (faiss.IndexReplicas, faiss.IndexShards)):
        each = [members_of(faiss.downcast_index(index.at(number))) for number in range(index.count())]
        return [member for members in each for member in members]
    return [index]


def check_index_belongs(index: Any, codebooks: Any) -> None:
    """Raise ValueError unless an index holds these codebooks, in each of its shards and behind its transforms.

    Those in the form of `zero_coarse_index` count too. An index on a GPU hides its own and is taken on trust.
    """
    expected = check_codebooks(codebooks)
    for member in members_of(index):
        if not hasattr(member, "getDevice"):
            _check_member(member, expected)


def _check_member(index: Any, expected: np.ndarray) -> None:
    found, metric = index_codebooks(index), getattr(index, "metric_type", faiss.METRIC_INNER_PRODUCT)
    if found is None or metric != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"the index is a {type(index).__name__} without the model's codebooks; use build_index(model)")
    residual = isinstance(index, faiss.IndexIVFPQ) and index.by_residual
    if residual and not has_zero_centroids(index):
        raise ValueError("the index encodes residuals: its scores are not those of the model; use build_index(model)")
    if _alike(found, gpu_codebooks(expected) if residual else expected):
        return
    raise ValueError(
        f"the index belongs to another model: its codebooks {list(found.shape)} differ from the model's "
        f"{list(expected.shape)}; build the index from this model's codes"
    )


def _alike(found: np.ndarray, expected: np.ndarray) -> bool:
    # Processors normalise codewords with other last bits.
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= 1e-5)


def save_index(
    index: faiss.Index,
    path: str | os.PathLike,
    model_id: str | None = None,
    pictures: Mapping[str, Any] | None = None,
) -> None:
    """Write an index as plain FAISS, readable from any language, and its recipe beside it as `<path>.json`.

    Both files are written aside and renamed, so that a failure leaves earlier files as they were. Searches go on; a
    change of the rows waits until the file is whole.

    Args:
        index: An index from `build_index`.
        path: File to write.
        model_id: Hub name or folder of the model, kept in the recipe.
        pictures: What tells the pictures of the rows from others, as JSON takes it; kept in the recipe, not looked at.

    Raises:
        OSError: If the disk refuses the file; what was there before is kept.
    """
    kinds = {faiss.IndexPQ: "exact", FastIndex: "fast", IVFIndex: "ivf"}
    modes = [mode for kind, mode in kinds.items() if isinstance(index, kind)]
    if not modes or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise TypeError(f"only an index from build_index can be saved, got {type(index).__name__}; keep the CPU index")
    codebooks = check_codebooks(index_codebooks(index))
    path = Path(path)
    recipe = {
        "model": model_id,
        "pictures": pictures,
        "mode": modes[0],
        "metric": "inner_product",
        "embedding_dim": index.d,
        "num_codebooks": codebooks.shape[0],
        "codebook_size": codebooks.shape[1],
        "codebooks_sha256": _digest(codebooks),
        "faiss": faiss.__version__,
    }
    # Both files are whole before either takes its place.
    with written_aside(path) as aside, written_aside(_recipe_path(path)) as recipe_aside:
        with held(index):
            recipe |= {"count": index.ntotal, "file_sha256": write_faiss(index, aside)}
        recipe["file_bytes"] = aside.stat().st_size
        recipe_aside.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def load_index(path: str | os.PathLike, codebooks: Any = None, mmap: bool = False) -> AnyIndex:
    """Read an index from `save_index`, or any FAISS `IndexPQ` file of unit-norm codebooks.

    Args:
        path: File to read; `<path>.json`, where it exists, is held against it, with its size and sum.
        codebooks: Codebooks `[M, K, d]` or a model that the index must belong to; None skips that check.
        mmap: Map the codes of an exact index instead of reading them: it opens at once, shares its memory with other
            processes, and is read-only. The sum of the file is not taken.

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
    mismatch = f"index file {path} does not match its recipe {_recipe_path(path)}: one of them was replaced"
    if recipe is not None and not mmap and file_sum(path) != recipe["file_sha256"]:
        raise ValueError(mismatch)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except RuntimeError as error:
        raise ValueError(f"index file {path} is truncated or no FAISS index: {error}") from error
    if type(index) not in _KINDS or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"{path} holds a {type(index).__name__}; expected an IndexPQ with inner product")
    if mmap and type(index) is not faiss.IndexPQ:
        raise ValueError(f"{path} holds a fast or ivf index, which has to be read into memory; leave mmap unset")
    # FAISS hands out its own class; ours adds no data, only checks and the refusal to train.
    index.__class__ = _KINDS[type(index)]
    index.check(path)
    found = check_codebooks(index_codebooks(index))
    if recipe is not None and (recipe["count"], recipe["codebooks_sha256"]) != (index.ntotal, _digest(found)):
        raise ValueError(mismatch)
    if codebooks is not None:
        check_index_belongs(index, codebooks)
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
        return {name: recipe[name] for name in ("file_bytes", "file_sha256", "count", "codebooks_sha256")} | recipe
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the recipe {file} is damaged; delete it to read the index without its checks") from error


def write_faiss(index: faiss.Index, path: Path) -> str:
    """Write an index as FAISS does, but raise OSError if anything of it fails; gives what `file_sum` would."""
    digest = hashlib.sha256()
    # Through a file of Python: FAISS's own ignores what fails at closing, as on a full disk.
    with path.open("wb") as file:
        failed: list[OSError] = []

        def write(data: bytes) -> None:
            digest.update(data)
            try:
                file.write(data)
            except OSError as error:
                failed.append(error)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        if failed:
            raise failed[0]
    return digest.hexdigest()


def file_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=2) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _recipe_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _digest(codebooks: np.ndarray) -> str:
    return hashlib.sha256(codebooks.tobytes()).hexdigest()
