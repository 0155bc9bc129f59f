"""ShardActors: an exact FAISS index whose rows live in several Ray actors."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .code_index import CodeIndex, check_codebooks, check_vectors
from .ray_encoding import import_ray
from .segment_files import Segment, open_segment
from .segments import SegmentedIndex, best_of

# Reads codes uint8 `[n, M]` and ids int64 `[n]`.
_Load = Callable[[], tuple[np.ndarray, np.ndarray]]


class ShardActors:
    """An exact FAISS index whose rows live in several Ray actors; it answers as one index of all rows does.

    An actor that dies is started again, up to `max_restarts` times, and reads the same rows as before. A search that
    any actor cannot answer raises: no answer is ever made of some of the rows.

    Use `from_lance` or `from_segments`.
    """

    def __init__(self, loads: Sequence[tuple[_Load, int]], codebooks: Any, num_cpus: float, max_restarts: int) -> None:
        self._codebooks = check_codebooks(codebooks)
        self.ntotal = sum(rows for _, rows in loads)
        ray = import_ray()
        options = {"num_cpus": num_cpus, "max_restarts": max_restarts, "max_task_retries": max_restarts}
        actor = ray.remote(_Shard).options(scheduling_strategy="SPREAD", **options)
        self.actors = [actor.remote(load, self._codebooks, rows) for load, rows in loads]
        try:
            self._answers("ready", (), None)
        except RuntimeError:
            self.close()
            raise

    @classmethod
    def from_lance(
        cls,
        uri: str | os.PathLike,
        codebooks: Any,
        num_actors: int,
        id_column: str = "id",
        num_cpus: float = 1,
        max_restarts: int = 3,
        storage_options: dict[str, str] | None = None,
    ) -> "ShardActors":
        """Shards of the `codes` of a Lance dataset, at its present version; it needs no index of Lance.

        Args:
            uri: Folder or address of the dataset.
            codebooks: float32 `[M, K, d]`, or a model.
            num_actors: Number of shards, at most one a fragment.
            id_column: Column of ids, integers.
            num_cpus: CPUs, and threads of FAISS, of an actor.
            max_restarts: How often an actor may die and be started again.
            storage_options: Keys and address of the object store, as for `lance.dataset`.

        Raises:
            FileNotFoundError: If there is no dataset.
            ValueError: If a column is missing, its codes are not those of its embeddings under the codebooks, or there
                are fewer fragments than actors.
        """
        from .lance_files import check_codes_belong, full_address, open_dataset

        uri = full_address(uri)
        dataset = open_dataset(uri, None, storage_options)
        check_codes_belong(dataset, check_codebooks(codebooks))
        rows = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
        loads = [
            (
                partial(_load_lance, uri, dataset.version, part, id_column, storage_options),
                sum(map(rows.get, part)),
            )
            for part in _deal(list(rows), num_actors, "fragments")
        ]
        return cls(loads, codebooks, num_cpus, max_restarts)

    @classmethod
    def from_segments(
        cls, folder: str | os.PathLike, codebooks: Any, num_actors: int, num_cpus: float = 1, max_restarts: int = 3
    ) -> "ShardActors":
        """Shards of the segments of a `SegmentedIndex`, at its present state, in a folder that all machines can read.

        Arguments are those of `from_lance`.

        Raises:
            FileNotFoundError: If there is no index or a file of it is missing.
            ValueError: If it belongs to other codebooks, or there are fewer segments than actors.
        """
        codebooks = check_codebooks(codebooks)
        segments = SegmentedIndex.open(folder, codebooks).segments
        loads = [
            (partial(_load_segments, Path(folder).absolute(), part, codebooks), sum(segment.rows for segment in part))
            for part in _deal(segments, num_actors, "segments")
        ]
        return cls(loads, codebooks, num_cpus, max_restarts)

    def search(self, x: np.ndarray, k: int, timeout: float | None = 60.0) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[Q, k]`, larger is closer, and ids int64 `[Q, k]` of the k best rows of each query.

        Args:
            x: Queries, float32 `[Q, D]`.
            k: Number of rows.
            timeout: Seconds to wait for the slowest actor, which may have to start again; None waits for ever.

        Raises:
            RuntimeError: If an actor died for good, or does not answer in time.
            TypeError: If the queries are not floats.
            ValueError: If their shape does not fit, or k is not from 1 to the number of rows.
        """
        x = check_vectors(x, self._codebooks.shape[0] * self._codebooks.shape[2], "queries")
        if not 1 <= k <= self.ntotal:
            raise ValueError(f"k must be from 1 to {self.ntotal}, the rows of all shards, got {k}")
        return best_of(self._answers("search", (import_ray().put(x), k), timeout), k)

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            import_ray().kill(actor)

    def _answers(self, method: str, arguments: tuple, timeout: float | None) -> list[Any]:
        ray = import_ray()
        try:
            return ray.get([getattr(actor, method).remote(*arguments) for actor in self.actors], timeout=timeout)
        except ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"one of {len(self.actors)} shards is lost, no answer without it: {reason}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(
                f"one of {len(self.actors)} shards did not answer in {timeout} s; a cluster without room for an actor "
                "that has to start again keeps it waiting (timeout=None waits for ever)"
            ) from error


class _Shard:
    """Some rows of an index, in an actor."""

    def __init__(self, load: _Load, codebooks: np.ndarray, rows: int) -> None:
        codes, self._ids = load()
        if len(codes) != rows:
            raise ValueError(f"the shard had {rows} rows and now has {len(codes)}")
        self._index = CodeIndex.of(codebooks)
        self._index.add_codes(codes)

    def ready(self) -> int:
        return self._index.ntotal

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._index.search(x, min(k, self._index.ntotal))
        return scores, self._ids[rows]


def _deal(items: list[Any], hands: int, what: str) -> list[list[Any]]:
    if not 1 <= hands <= len(items):
        raise ValueError(f"num_actors must be from 1 to {len(items)}, the number of {what}, got {hands}")
    return [items[start::hands] for start in range(hands)]


def _load_lance(
    uri: str, version: int, fragment_ids: list[int], id_column: str, storage_options: dict[str, str] | None
) -> tuple[np.ndarray, np.ndarray]:
    from .lance_files import open_dataset, read_codes

    return read_codes(open_dataset(uri, version, storage_options), id_column, fragment_ids)


def _load_segments(folder: Path, segments: list[Segment], codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [open_segment(folder, segment, codebooks, verify=False) for segment in segments]
    return np.concatenate([part.index.codes_array() for part in parts]), np.concatenate([part.ids() for part in parts])
