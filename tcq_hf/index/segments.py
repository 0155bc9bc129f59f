"""SegmentedIndex: an index that lives in a folder and changes there, a segment at a time."""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from .code_index import CodeIndex, check_codebooks, check_codes, check_vectors
from .faiss_index import AnyIndex, Mode, build_index, save_index
from .row_ids import LARGEST_ID, check_ids
from .segment_files import (
    FORMAT,
    LOCK,
    MANIFEST,
    Part,
    Segment,
    locked,
    open_segment,
    read_manifest,
    read_segment,
    write_manifest,
    write_segment,
)


class SegmentedIndex:
    """Codes in a folder: `index.json` and a FAISS file for each segment, memory-mapped.

    Appending writes one segment and renames `index.json`; removing writes the segments anew that lose rows. No file is
    changed: a process that dies leaves the index as it was, and a search goes on over the rows it began with. Rows have
    ids that stay; changes from several processes wait for each other. An object refuses to change an index that was
    made in its folder after it was opened.

    Use `create` or `open`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], parts: Iterable[Part], codebooks: np.ndarray) -> None:
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
        manifest = {"format": FORMAT, "id": uuid.uuid4().hex, "model": model_id, "metric": "inner_product", **shape}
        manifest |= {"changes": 0, "next_id": 0, "next_segment": 0, "segments": []}
        with FileLock(folder / LOCK):
            if (folder / MANIFEST).exists():
                raise FileExistsError(f"there is an index in {folder}; use SegmentedIndex.open")
            # An empty index holds the codebooks.
            empty = write_segment(folder, "codebooks.faiss", CodeIndex.of(codebooks))
            manifest["codebooks"] = {"file": empty.file, "bytes": empty.bytes, "sha256": empty.sha256}
            write_manifest(folder, manifest)
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
        with locked(folder):
            manifest = read_manifest(folder)
            own = read_segment(folder, Segment(rows=0, **manifest["codebooks"]), codebooks, verify)
            found = check_codebooks(own)
            parts = [open_segment(folder, Segment(**entry), found, verify) for entry in manifest["segments"]]
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
        return _ids(self._parts)

    def codes_array(self) -> np.ndarray:
        """Codes of all rows, uint8 `[ntotal, M]`, in the same order."""
        return self._codes(self._parts)

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[Q, k]`, larger is closer, and ids int64 `[Q, k]` of the k best rows of each query."""
        x, parts = check_vectors(x, self.d, "queries"), self._parts
        count = sum(part.segment.rows for part in parts)
        if not 1 <= k <= count:
            raise ValueError(f"k must be from 1 to {count}, the rows of the index, got {k}")
        found = []
        for part in parts:
            scores, rows = part.index.search(x, min(k, part.segment.rows))
            found.append((scores, part.ids_of(rows)))
        return best_of(found, k)

    def append(self, codes: Any, ids: Any = None) -> np.ndarray:
        """Write rows as a new segment.

        Args:
            codes: Integers `[n, M]` below K.
            ids: Integers `[n]` from 0 to 2**63 - 2, new; by default they go on from the largest that there ever was.

        Returns:
            The ids, int64 `[n]`.

        Raises:
            TypeError: If codes or ids are no integers.
            ValueError: If codes do not fit, an id is out of range, given twice or there already, or the folder has
                another index by now.
        """
        codes = check_codes(codes, *self._codebooks.shape[:2])
        with self._changing() as manifest:
            ids = self._new_ids(ids, len(codes), manifest["next_id"])
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
            TypeError: If ids are no integers.
            ValueError: If an id is not in the index, or the folder has another index by now.
        """
        ids = np.unique(check_ids(ids))
        with self._changing() as manifest:
            unknown = np.setdiff1d(ids, self.ids())
            if len(unknown):
                raise ValueError(f"id {unknown[0]} is not in the index in {self.folder}")
            parts = []
            for part in self._parts:
                there = part.ids()
                kept = ~np.isin(there, ids)
                if kept.all():
                    parts.append(part)
                elif kept.any():
                    parts.append(self._new(manifest, part.index.codes_array()[kept], there[kept]))
            if len(ids):
                self._replace(manifest, parts)
        return len(ids)

    def merge(self, parts: int = 1) -> None:
        """Write all rows into one segment, or into several of equal size, a shard for each machine.

        Args:
            parts: Number of segments.

        Raises:
            ValueError: If there would be none, or more than rows, or the folder has another index by now.
        """
        with self._changing() as manifest:
            if not 1 <= parts <= max(1, self.ntotal):
                raise ValueError(f"parts must be from 1 to {max(1, self.ntotal)}, the rows of the index, got {parts}")
            codes, ids = self.codes_array(), self.ids()
            if len(codes):
                blocks = zip(np.array_split(codes, parts), np.array_split(ids, parts), strict=True)
                self._replace(manifest, [self._new(manifest, *block) for block in blocks])

    def in_memory(self, mode: Mode = "exact") -> tuple[AnyIndex, np.ndarray]:
        """All rows as one index of `build_index`, and the id of each of its rows, int64 `[ntotal]`."""
        parts = self._parts
        return build_index(self._codebooks, self._codes(parts), mode), _ids(parts)

    def export(self, path: str | os.PathLike, mode: Mode = "exact") -> np.ndarray:
        """Write all rows as one FAISS file, which `datasets` and any FAISS read.

        Args:
            path: File to write, its recipe beside it.
            mode: `"exact"`, `"fast"` or `"ivf"`, as for `build_index`.

        Returns:
            The id of each row of the file, int64 `[ntotal]`: `dataset.select(ids)` has the same rows.
        """
        index, ids = self.in_memory(mode)
        save_index(index, path, model_id=self._manifest["model"])
        return ids

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Hold the folder, with what other processes have done to it, and a manifest to fill."""
        with FileLock(self.folder / LOCK):
            manifest = read_manifest(self.folder)
            if manifest["id"] != self._manifest["id"]:
                raise ValueError(f"another index was made in {self.folder} since this one was opened; open it again")
            if manifest["changes"] != self._manifest["changes"]:
                fresh = [Segment(**entry) for entry in manifest["segments"]]
                known = {part.segment: part for part in self._parts}
                self._parts = tuple(known.get(s) or open_segment(self.folder, s, self._codebooks, False) for s in fresh)
                self._manifest = manifest
            yield dict(manifest)

    def _codes(self, parts: Iterable[Part]) -> np.ndarray:
        codes = [part.index.codes_array() for part in parts]
        return np.concatenate(codes) if codes else np.empty((0, len(self._codebooks)), np.uint8)

    def _new_ids(self, ids: Any, count: int, first: int) -> np.ndarray:
        """Ids of rows to append, int64 `[count]`: those that were given, checked, or `first` and those behind it."""
        if ids is None:
            if first + count - 1 > LARGEST_ID:
                raise ValueError(f"ids that go on from {first} would pass 2**63 - 2; give ids")
            return np.arange(first, first + count)
        ids = check_ids(ids, count)
        known = np.intersect1d(ids, self.ids())
        if len(known):
            raise ValueError(f"id {known[0]} is in the index already; remove it first")
        return ids

    def _new(self, manifest: dict[str, Any], codes: np.ndarray, ids: np.ndarray) -> Part:
        """Write a segment that no manifest names yet."""
        number = manifest["next_segment"]
        manifest["next_segment"] = number + 1
        manifest["next_id"] = max(manifest["next_id"], int(ids.max()) + 1)
        index = CodeIndex.of(self._codebooks)
        index.add_codes(codes)
        segment = write_segment(self.folder, f"segment-{number:05}.faiss", index, ids)
        return open_segment(self.folder, segment, self._codebooks, False)

    def _replace(self, manifest: dict[str, Any], parts: list[Part]) -> None:
        """Let the manifest name these segments, then delete those that none names any more."""
        manifest |= {"changes": manifest["changes"] + 1, "segments": [vars(part.segment) for part in parts]}
        write_manifest(self.folder, manifest)
        gone = {part.segment for part in self._parts} - {part.segment for part in parts}
        self._manifest, self._parts = manifest, tuple(parts)
        for segment in gone:
            for name in filter(None, (segment.file, segment.ids)):
                (self.folder / name).unlink(missing_ok=True)


def best_of(found: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids `[Q, k]` of the k best rows in what several indexes found, each scores and ids `[Q, n]`."""
    scores, ids = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)


def _ids(parts: Iterable[Part]) -> np.ndarray:
    ids = [part.ids() for part in parts]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)
