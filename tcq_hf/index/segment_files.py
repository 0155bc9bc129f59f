"""Files of an index in a folder: its manifest, its segments, their sizes and sums."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from .code_index import CodeIndex
from .faiss_index import file_sum, load_index, write_faiss
from .writing import written_aside

MANIFEST, LOCK, FORMAT = "index.json", ".lock", 1


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
class Part:
    """A segment that is open: its codes mapped, its ids too where they are no range."""

    segment: Segment
    index: CodeIndex
    listed: np.ndarray | None

    def ids(self) -> np.ndarray:
        """Ids of all rows, int64 `[rows]`."""
        return self.ids_of(np.arange(self.segment.rows)) if self.listed is None else self.listed

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Ids of the rows of these numbers, int64, in the shape of `rows`."""
        return self.segment.first + rows if self.listed is None else self.listed[rows]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder while its files are opened; where nothing can be written, nothing changes either."""
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"no index in {folder}: {MANIFEST} is missing")
    if os.access(folder, os.W_OK):
        with FileLock(folder / LOCK):
            yield
    else:
        yield


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `index.json` says; ValueError, naming it, if it says nothing sensible."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this package reads {FORMAT}")
        for name in ("changes", "next_id", "next_segment"):
            int(manifest[name])
        if not isinstance(manifest["model"], str | None) or not isinstance(manifest["id"], str):
            raise ValueError(f"model {manifest['model']}, id {manifest['id']}")
        segments = [Segment(**entry) for entry in manifest["segments"]]
        entries = [*segments, Segment(rows=0, **manifest["codebooks"])]
        if any(Path(name).name != name for e in entries for name in (e.file, e.ids) if name):
            raise ValueError("a file lies outside the folder")
        for segment in segments:
            if segment.ids is None and not isinstance(segment.first, int):
                raise ValueError(f"{segment.file} has neither a first id nor a file of ids")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Let another manifest take the place of the one that is there: the moment at which a change happens."""
    with written_aside(folder / MANIFEST) as aside:
        aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_segment(folder: Path, name: str, index: CodeIndex, ids: np.ndarray | None = None) -> Segment:
    """Write the rows of an index, and their ids int64 `[rows]` where they are no range, as files of this name."""
    with written_aside(folder / name) as aside:
        digest = write_faiss(index, aside)
    segment = Segment(name, index.ntotal, (folder / name).stat().st_size, digest)
    if ids is None:
        return segment
    if (np.diff(ids) == 1).all():
        return replace(segment, first=int(ids[0]))
    path = (folder / name).with_suffix(".ids.npy")
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, ids)
    return replace(segment, ids=path.name, ids_sha256=file_sum(path))


def read_segment(folder: Path, segment: Segment, codebooks: Any, verify: bool) -> CodeIndex:
    """One FAISS file, mapped, held against the manifest."""
    path = folder / segment.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which {folder / MANIFEST} names")
    if path.stat().st_size != segment.bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {segment.bytes}: it is truncated or was replaced"
        )
    _verify(path, segment.sha256 if verify else None)
    index = load_index(path, codebooks, mmap=True)
    if index.ntotal != segment.rows:
        raise ValueError(f"{path} has {index.ntotal} rows, {MANIFEST} says {segment.rows}: it was replaced")
    return index


def open_segment(folder: Path, segment: Segment, codebooks: np.ndarray, verify: bool) -> Part:
    """Codes and ids of a segment, mapped, held against the manifest and, with `verify`, against their sums."""
    index = read_segment(folder, segment, codebooks, verify)
    if segment.ids is None:
        return Part(segment, index, None)
    path = folder / segment.ids
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which {folder / MANIFEST} names")
    _verify(path, segment.ids_sha256 if verify else None)
    try:
        ids = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no NumPy file: {error}") from error
    if ids.dtype != np.int64 or ids.shape != (segment.rows,):
        raise ValueError(f"{path} has {ids.dtype} {list(ids.shape)}, {MANIFEST} says {segment.rows} ids: replaced")
    return Part(segment, index, ids)


def _verify(path: Path, expected: str | None) -> None:
    if expected is not None and file_sum(path) != expected:
        raise ValueError(f"{path} has another sum than {MANIFEST} says: it was changed or replaced")
