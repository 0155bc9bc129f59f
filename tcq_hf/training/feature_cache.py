"""Pictures in, backbone features of several views on disk, batches of two views of each out."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm

from tcq_hf.index.code_cache import CHUNK_ROWS, chunk_path, weights_digest
from tcq_hf.index.decoding import read_picture, row_batches
from tcq_hf.index.inference import evaluation_mode
from tcq_hf.index.streams import in_streams
from tcq_hf.index.writing import written_aside

from .batches import Batch, Partner, TrainingViews
from .views import PRESETS, ViewPreset, augment, cut, draw_view

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel


class FeatureCache:
    """Backbone features of several views of each picture, memory-mapped: a frozen backbone runs once, not every epoch.

    View 0 is the picture as search sees it, the others are augmented. Finished parts of 8,192 rows are kept in the
    `datasets` cache, keyed by the weights of the backbone, the processor, the preset, the seed, the view and the data;
    an interrupted call goes on where it stopped, and one with more views adds to what is there.

    Args:
        dataset: Rows with pictures.
        model: A `TCQModel`; its projection and codebooks play no part.
        processor: Its image processor.
        views: Number V of views of each picture.
        preset: A `ViewPreset`, or the name of one.
        seed: Seed of the views.
        image_column: Column of the pictures.
        batch_size: Pictures in one forward pass.

    Raises:
        TypeError: If it is no dataset of one split.
        ValueError: For an impossible value, a missing column, an unreadable picture or features that are not finite.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: "TCQModel",
        processor: "TCQImageProcessor",
        views: int = 1,
        preset: ViewPreset | str = "photo",
        seed: int = 0,
        image_column: str = "image",
        batch_size: int = 32,
    ) -> None:
        if not isinstance(dataset, Dataset):
            hint = "; choose a split, e.g. dataset['train']" if isinstance(dataset, dict) else ""
            raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}{hint}")
        for name, value in (("views", views), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if image_column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {image_column!r}; its columns are {dataset.column_names}")
        if isinstance(preset, str) and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        self.dataset, self.processor, self.views = dataset, processor, views
        chosen = PRESETS[preset] if isinstance(preset, str) else preset
        source = TrainingViews(dataset, processor, image_column, model.config.image_size, chosen, seed)
        self._width = model.projection.in_features
        self._parts = _computed(source, model, views, batch_size)
        # Where each picture lies in the parts.
        self._places = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, rows: Sequence[int] | np.ndarray) -> "FeatureCache":
        """Some of the pictures, in the given order, on the same files: nothing is computed or copied.

        Raises:
            ValueError: If they are not row numbers from 0 to N - 1.
        """
        rows = np.asarray(rows) if len(rows) else np.empty(0, np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or ((rows < 0) | (rows >= len(self))).any():
            raise ValueError(f"rows must be numbers from 0 to {len(self) - 1}, got {rows.dtype} {rows}")
        chosen = copy.copy(self)
        chosen.dataset, chosen._places = self.dataset.select(rows), self._places[rows]
        return chosen

    def features(self, view: int = 0) -> np.ndarray:
        """Features of one view of every picture, float32 `[N, F]`, copied from the disk."""
        found = np.empty((len(self), self._width), np.float32)
        for number, part in enumerate(self._parts[view]):
            inside = self._places // CHUNK_ROWS == number
            found[inside] = part[self._places[inside] % CHUNK_ROWS]
        return found

    def rows(self, rows: Sequence[int], views: Sequence[int]) -> torch.Tensor:
        """Features of the given view of each given row, float32 `[n, F]`."""
        places = self._places[list(rows)].tolist()
        pairs = zip(views, places, strict=True)
        found = [self._parts[view][place // CHUNK_ROWS][place % CHUNK_ROWS] for view, place in pairs]
        return torch.from_numpy(np.stack(found))


class TrainingFeatures(torch.utils.data.Dataset):
    """Features of two views of each picture, drawn anew in each epoch.

    Args:
        cache: Where they come from; with one view only, both are that one.
        seed: Seed of the choice.
        partner: Chooses the picture of the second view; by default it is the same.
    """

    def __init__(self, cache: FeatureCache, seed: int, partner: Partner | None = None) -> None:
        self.cache, self.seed, self.partner = cache, seed, partner

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """`features` float32 `[2n, F]` and `rows` int64 `[n]` of n keys from `EpochOrder`."""
        places = [divmod(key, len(self)) for key in keys]
        rows = [row for _, row in places]
        seconds = rows if self.partner is None else [self.partner(*place) for place in places]
        pairs = np.array([self._pair(*place) for place in places])
        features = self.cache.rows([*rows, *seconds], pairs.T.ravel().tolist())
        return {"features": features, "rows": torch.tensor(rows)}

    def _pair(self, epoch: int, row: int) -> np.ndarray:
        count = self.cache.views
        if count == 1:
            return np.zeros(2, dtype=np.int64)
        return np.random.default_rng((self.seed, epoch, row)).choice(count, 2, replace=False)


class EvaluationFeatures(torch.utils.data.Dataset):
    """Features of each picture as search sees it, of one view of it where there is one, and its label.

    Args:
        cache: Where they come from.
        labels: int64 `[N]`, -1 where there is none.
        with_view: Give the view too.
    """

    def __init__(self, cache: FeatureCache, labels: np.ndarray, with_view: bool) -> None:
        self.cache, self.labels = cache, labels
        self.with_view = with_view and cache.views > 1

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """`features` float32 `[n, F]`, or `[2n, F]` with the view, and `labels` int64 `[n]`."""
        rows, views = (list(keys) * 2, [0] * len(keys) + [1] * len(keys)) if self.with_view else (keys, [0] * len(keys))
        return {"features": self.cache.rows(rows, views), "labels": torch.from_numpy(self.labels[list(keys)])}


def _computed(source: TrainingViews, model: "TCQModel", views: int, batch_size: int) -> list[list[np.ndarray]]:
    """Memory-mapped features `[rows, F]` of each part of each view, computed where they are missing."""
    count = len(source)
    spans = [range(start, min(start + CHUNK_ROWS, count)) for start in range(0, count, CHUNK_ROWS)]
    weights = weights_digest(model.backbone)
    keys = [_key(source, model, weights, view) for view in range(views)]
    paths = [[chunk_path(key, source.pictures, s.start, s.stop).with_suffix(".npy") for s in spans] for key in keys]
    missing = [
        (path, view, span)
        for view, row in enumerate(paths)
        for path, span in zip(row, spans, strict=True)
        if not path.exists()
    ]
    done = views * count - sum(len(span) for *_, span in missing)
    if missing:
        with tqdm(total=views * count, initial=done, unit="view", desc="Caching features") as bar:
            for path, view, span in missing:
                _write(path, source, model, view, row_batches(span, batch_size), bar.update)
    return [[np.load(path, mmap_mode="r") for path in row] for row in paths]


def _key(source: TrainingViews, model: "TCQModel", weights: str, view: int) -> str:
    """Everything that the features of a view depend on, as one string."""
    config = model.config
    parts = {
        "data": source.pictures._fingerprint,
        "backbone": [weights, config.backbone, config.backbone_kwargs, config.pooling, config.image_size],
        # Where its code lies changes no pixel.
        "processor": {name: value for name, value in source.processor.to_dict().items() if name != "auto_map"},
        "view": view,
        # The first view is the picture as search sees it: no draw, no preset.
        "draws": [repr(source.preset), source.seed] if view else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _write(
    path: Path,
    source: TrainingViews,
    model: "TCQModel",
    view: int,
    batches: list[range],
    advance: Callable[[int], object],
) -> None:
    """Compute one part of one view and write it aside until it is whole."""
    parts = []
    with evaluation_mode(model), closing(in_streams(_step(source, model, view), batches)) as stream:
        for rows, features in zip(batches, stream, strict=True):
            finite = np.isfinite(features).all(axis=1)
            if not finite.all():
                raise ValueError(f"the features of row {rows[int(np.argmin(finite))]} are not finite")
            parts.append(features)
            advance(len(rows))
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.save(file, np.concatenate(parts))


def _step(source: TrainingViews, model: "TCQModel", view: int) -> Callable[[range], np.ndarray]:
    """Rows in, features float32 `[n, F]` of one of their views out."""
    processor = source.processor

    def pixel_values(rows: range) -> torch.Tensor:
        pictures = [read_picture(source.pictures, processor, row) for row in rows]
        if view == 0:
            return processor(pictures, return_tensors="pt")["pixel_values"]
        draws = [draw_view(source.seed, view, row, 0) for row in rows]
        crops = [cut(*pair, source.preset, source.side) for pair in zip(pictures, draws, strict=True)]
        crops, draws = torch.from_numpy(np.stack(crops)), torch.from_numpy(np.stack(draws))
        return augment(crops.to(model.device), draws, source.preset, processor.image_mean, processor.image_std)

    def run(rows: range) -> np.ndarray:
        with torch.inference_mode():
            # A copy: the class token is a view that would keep all tokens of the batch alive.
            return model.get_image_features(pixel_values(rows)).float().cpu().numpy().copy()

    return run
