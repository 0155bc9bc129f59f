"""SegmentedIndex: an index that lives in a folder and changes there, a segment at a time."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from .code_index import CodeIndex, check_codebooks, check_codes, check_vectors
from .faiss_index import Mode, build_index, load_index, save_index, write_faiss
from .fast_index import FastIndex
from .writing import written_aside

_MANIFEST, _LOCK, _FORMAT = "index.json", ".lock", 1


@dataclass(frozen=True)
class Segment:
    """What the manifest says of one segment.

    Args:
        file: Name of its FAISS file, a plain `IndexPQ`.
        rows: Number of its rows.
        bytes: Size of the file.
        sha256: Sum of the file.
        first: The ids are `first`, `first + 1`, ...; None where they stand in `ids`.
        ids: Name of a NumPy file of the ids, int64 `[rows]`.
        ids_sha256: Sum of that file.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    first: int | None = None
    ids: str | None = None
    ids_sha256: str | None = None


@dataclass(frozen=True)
class _Part:
    """A segment that is open: its codes mapped, its ids int64 `[rows]`."""

    segment: Segment
    index: CodeIndex
    ids: np.ndarray


class SegmentedIndex:
    """Codes in a folder: `index.json` and a FAISS file for each segment, memory-mapped.

    Appending writes one segment and renames `index.json`; removing writes the segments anew that lose rows. No file is
    changed: a process that dies leaves the index as it was, and a search goes on over the rows it began with. Rows have
    ids that stay; changes from several processes wait for each other.

    Use `create` or `open`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], parts: Iterable[_Part], codebooks: np.ndarray) -> None:
        self.folder, self._manifest, self._parts, self._codebooks = folder, manifest, tuple(parts), codebooks

    @classmethod
    def create(cls, folder: str | os.PathLike, codebooks: Any, model_id: str | None = None) -> "SegmentedIndex":
        """Make an index without rows.

        Args:
            folder: Folder to make.
            codebooks: float32 `[M, K, d]`, or a model.
            model_id: Hub name or folder of the model, kept in `index.json`.

        Raises:
            FileExistsError: If there is an index already.
        """
        folder, codebooks = Path(folder), check_codebooks(codebooks)
        folder.mkdir(parents=True, exist_ok=True)
        shape = dict(zip(("num_codebooks", "codebook_size", "sub_dim"), codebooks.shape, strict=True))
        manifest = {"format": _FORMAT, "model": model_id, "metric": "inner_product", **shape, "changes": 0}
        manifest |= {"next_id": 0, "next_segment": 0, "segments": []}
        with FileLock(folder / _LOCK):
            if (folder / _MANIFEST).exists():
                raise FileExistsError(f"there is an index in {folder}; use SegmentedIndex.open")
            # An empty index holds the codebooks.
            empty = _write(folder, "codebooks.faiss", CodeIndex.of(codebooks))
            manifest["codebooks"] = {"file": empty.file, "bytes": empty.bytes, "sha256": empty.sha256}
            _write_manifest(folder, manifest)
        return cls(folder, manifest, (), codebooks)

    @classmethod
    def open(cls, folder: str | os.PathLike, codebooks: Any = None, verify: bool = False) -> "SegmentedIndex":
        """Open an index: sizes and codebooks of its files are checked, their contents are mapped.

        Args:
            folder: Folder of the index.
            codebooks: Codebooks `[M, K, d]` or a model that the index must belong to; None skips that check.
            verify: Read all files and compare their sums.

        Raises:
            FileNotFoundError: If there is no index or a file of it is missing.
            ValueError: If a file is not what `index.json` says, or belongs to another model.
        """
        folder = Path(folder)
        with _locked(folder):
            manifest = _read_manifest(folder)
            own = _load(folder, Segment(rows=0, **manifest["codebooks"]), codebooks, verify)
            found = check_codebooks(own)
            parts = [_opened(folder, Segment(**entry), found, verify) for entry in manifest["segments"]]
        return cls(folder, manifest, parts, found)

    def __len__(self) -> int:
        return self.ntotal

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return sum(part.segment.rows for part in self._parts)

    @property
    def d(self) -> int:
        """Width D of the embeddings."""
        return self._codebooks.shape[0] * self._codebooks.shape[2]

    @property
    def segments(self) -> list[Segment]:
        """What the manifest says of the segments, in order."""
        return [part.segment for part in self._parts]

    def codebooks(self) -> np.ndarray:
        """The learned codebooks, float32 `[M, K, d]`."""
        return self._codebooks

    def ids(self) -> np.ndarray:
        """Ids of all rows, int64 `[ntotal]`, in the order in which they are stored."""
        return _joined([part.ids for part in self._parts], np.empty(0, np.int64))

    def codes_array(self) -> np.ndarray:
        """Codes of all rows, uint8 `[ntotal, M]`, in the same order."""
        empty = np.empty((0, len(self._codebooks)), np.uint8)
        return _joined([part.index.codes_array() for part in self._parts], empty)

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[Q, k]`, larger is closer, and ids int64 `[Q, k]` of the k best rows of each query."""
        x, parts = check_vectors(x, self.d, "queries"), self._parts
        count = sum(part.segment.rows for part in parts)
        if not 1 <= k <= count:
            raise ValueError(f"k must be from 1 to {count}, the rows of the index, got {k}")
        found = []
        for part in parts:
            scores, rows = part.index.search(x, min(k, part.segment.rows))
            found.append((scores, part.ids[rows]))
        scores, ids = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)

    def append(self, codes: Any, ids: Any = None) -> np.ndarray:
        """Write rows as a new segment.

        Args:
            codes: Integers `[n, M]` below K.
            ids: Integers `[n]`, at least 0 and new; by default they go on from the largest that there ever was.

        Returns:
            The ids, int64 `[n]`.

        Raises:
            TypeError: If codes or ids are no integers.
            ValueError: If codes do not fit, or an id is negative, given twice or there already.
        """
        codes = check_codes(codes, *self._codebooks.shape[:2])
        with self._changing() as manifest:
            first = manifest["next_id"]
            ids = np.arange(first, first + len(codes)) if ids is None else _check_ids(ids, len(codes), self.ids())
            if len(codes):
                self._replace(manifest, [*self._parts, self._new(manifest, codes, ids)])
        return ids

    def remove(self, ids: Any) -> int:
        """Remove rows; segments without any of them stay as they are.

        Args:
            ids: Integers `[n]`.

        Returns:
            How many rows went.

        Raises:
            ValueError: If an id is not in the index.
        """
        ids = np.unique(_integers(ids, "ids"))
        with self._changing() as manifest:
            unknown = np.setdiff1d(ids, self.ids())
            if len(unknown):
                raise ValueError(f"id {unknown[0]} is not in the index in {self.folder}")
            parts = []
            for part in self._parts:
                kept = ~np.isin(part.ids, ids)
                if kept.all():
                    parts.append(part)
                elif kept.any():
                    parts.append(self._new(manifest, part.index.codes_array()[kept], part.ids[kept]))
            if len(ids):
                self._replace(manifest, parts)
        return len(ids)

    def merge(self, parts: int = 1) -> None:
        """Write all rows into one segment, or into several of equal size, a shard for each machine.

        Args:
            parts: Number of segments.

        Raises:
            ValueError: If there would be none, or more than rows.
        """
        with self._changing() as manifest:
            if not 1 <= parts <= max(1, self.ntotal):
                raise ValueError(f"parts must be from 1 to {max(1, self.ntotal)}, the rows of the index, got {parts}")
            codes, ids = self.codes_array(), self.ids()
            if len(codes):
                blocks = zip(np.array_split(codes, parts), np.array_split(ids, parts), strict=True)
                self._replace(manifest, [self._new(manifest, *block) for block in blocks])

    def in_memory(self, mode: Mode = "exact") -> tuple[CodeIndex | FastIndex, np.ndarray]:
        """All rows as one index of `build_index`, and the id of each of its rows, int64 `[ntotal]`."""
        return build_index(self._codebooks, self.codes_array(), mode), self.ids()

    def export(self, path: str | os.PathLike, mode: Mode = "exact") -> np.ndarray:
        """Write all rows as one FAISS file, which `datasets` and any FAISS read.

        Args:
            path: File to write, its recipe beside it.
            mode: `"exact"` or `"fast"`, as for `build_index`.

        Returns:
            The id of each row of the file, int64 `[ntotal]`: `dataset.select(ids)` has the same rows.
        """
        index, ids = self.in_memory(mode)
        save_index(index, path, model_id=self._manifest["model"])
        return ids

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Hold the folder, with what other processes have done to it, and a manifest to fill."""
        with FileLock(self.folder / _LOCK):
            manifest = _read_manifest(self.folder)
            if manifest["changes"] != self._manifest["changes"]:
                fresh = [Segment(**entry) for entry in manifest["segments"]]
                known = {part.segment: part for part in self._parts}
                self._parts = tuple(known.get(s) or _opened(self.folder, s, self._codebooks, False) for s in fresh)
                self._manifest = manifest
            yield dict(manifest)

    def _new(self, manifest: dict[str, Any], codes: np.ndarray, ids: np.ndarray) -> _Part:
        """Write a segment that no manifest names yet."""
        number, first = manifest["next_segment"], int(ids[0])
        manifest["next_segment"] = number + 1
        manifest["next_id"] = max(manifest["next_id"], int(ids.max()) + 1)
        index = CodeIndex.of(self._codebooks)
        index.add_codes(codes)
        segment = _write(self.folder, f"segment-{number:05}.faiss", index)
        if np.array_equal(ids, np.arange(first, first + len(ids))):
            segment = Segment(**asdict(segment) | {"first": first})
        else:
            name = f"segment-{number:05}.ids.npy"
            with written_aside(self.folder / name) as aside, aside.open("wb") as file:
                np.save(file, ids)
            segment = Segment(**asdict(segment) | {"ids": name, "ids_sha256": _digest(self.folder / name)})
        return _opened(self.folder, segment, self._codebooks, False)

    def _replace(self, manifest: dict[str, Any], parts: list[_Part]) -> None:
        """Let the manifest name these segments, then delete those that none names any more."""
        manifest |= {"changes": manifest["changes"] + 1, "segments": [asdict(part.segment) for part in parts]}
        _write_manifest(self.folder, manifest)
        gone = {part.segment for part in self._parts} - {part.segment for part in parts}
        self._manifest, self._parts = manifest, tuple(parts)
        for segment in gone:
            for name in filter(None, (segment.file, segment.ids)):
                (self.folder / name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder while its files are opened; where nothing can be written, nothing changes either."""
    if not (folder / _MANIFEST).exists():
        raise FileNotFoundError(f"no index in {folder}: {_MANIFEST} is missing")
    if os.access(folder, os.W_OK):
        with FileLock(folder / _LOCK):
            yield
    else:
        yield


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, this package reads {_FORMAT}")
        for name in ("changes", "next_id", "next_segment"):
            int(manifest[name])
        entries = [Segment(**entry) for entry in manifest["segments"]]
        if any(Path(name).name != name for e in entries for name in (e.file, e.ids) if name):
            raise ValueError("a segment lies outside the folder")
        Segment(rows=0, **manifest["codebooks"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _MANIFEST} is damaged: {error!r}") from error
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with written_aside(folder / _MANIFEST) as aside:
        aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write(folder: Path, name: str, index: CodeIndex) -> Segment:
    with written_aside(folder / name) as aside:
        write_faiss(index, aside)
    return Segment(name, index.ntotal, (folder / name).stat().st_size, _digest(folder / name))


def _load(folder: Path, segment: Segment, codebooks: Any, verify: bool) -> CodeIndex:
    """One FAISS file, mapped, held against the manifest."""
    path = folder / segment.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which {folder / _MANIFEST} names")
    if path.stat().st_size != segment.bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, {_MANIFEST} says {segment.bytes}: it is truncated or was replaced"
        )
    _verify(path, segment.sha256 if verify else None)
    index = load_index(path, codebooks, mmap=True)
    if index.ntotal != segment.rows:
        raise ValueError(f"{path} has {index.ntotal} rows, {_MANIFEST} says {segment.rows}: it was replaced")
    return index


def _opened(folder: Path, segment: Segment, codebooks: np.ndarray, verify: bool) -> _Part:
    index = _load(folder, segment, codebooks, verify)
    if segment.ids is None:
        return _Part(segment, index, np.arange(segment.first, segment.first + segment.rows))
    path = folder / segment.ids
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which {folder / _MANIFEST} names")
    _verify(path, segment.ids_sha256 if verify else None)
    try:
        ids = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no NumPy file: {error}") from error
    if ids.dtype != np.int64 or ids.shape != (segment.rows,):
        raise ValueError(f"{path} has {ids.dtype} {list(ids.shape)}, {_MANIFEST} says {segment.rows} ids: replaced")
    return _Part(segment, index, ids)


def _verify(path: Path, expected: str | None) -> None:
    if expected is not None and _digest(path) != expected:
        raise ValueError(f"{path} has another sum than {_MANIFEST} says: it was changed or replaced")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays) if arrays else empty


def _integers(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values)
    values = values.astype(np.int64) if not values.size else values
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers [n], got {values.dtype} {list(values.shape)}")
    return values.astype(np.int64)


def _check_ids(ids: Any, count: int, there: np.ndarray) -> np.ndarray:
    ids = _integers(ids, "ids")
    if len(ids) != count:
        raise ValueError(f"there are {count} codes but {len(ids)} ids")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"ids must be at least 0, got {ids.min()}")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"id {values[counts > 1][0]} is given twice")
    known = np.intersect1d(ids, there)
    if len(known):
        raise ValueError(f"id {known[0]} is in the index already; remove it first")
    return ids
