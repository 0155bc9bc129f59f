"""Rows of a dataset in, batches of views out, for the data loaders of the Trainer.

The crops of a batch of n images come as `[2n, ...]`: rows i and n + i are the two views of image i.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from tcq_hf.index.decoding import raw_pictures, read_picture

from .views import ViewPreset, cut, draw_view

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor

Batch = dict[str, torch.Tensor]
# (epoch, row) in, the row that the second view is of.
Partner = Callable[[int, int], int]


class EpochOrder(torch.utils.data.Sampler):
    """A random order of the rows, another one in each epoch, as numbers that name both: epoch * rows + row.

    With the epoch in the number, what a worker makes of it depends on nothing that the worker remembers.

    Args:
        rows: Number of rows.
        seed: Seed of the orders.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        yield from (self.epoch * self.rows + order).tolist()


class TrainingViews(torch.utils.data.Dataset):
    """Two crops of each picture and the draws that `augment` makes the views with.

    Args:
        dataset: Rows with pictures.
        processor: Reads pictures of any kind.
        image_column: Their column.
        side: Side of the crops in pixels.
        preset: Ranges of the draws.
        seed: Seed of the draws.
        partner: Chooses the picture of the second view; by default it is the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: "TCQImageProcessor",
        image_column: str,
        side: int,
        preset: ViewPreset,
        seed: int,
        partner: Partner | None = None,
    ) -> None:
        self.pictures, self.processor = raw_pictures(dataset, image_column), processor
        self.side, self.preset, self.seed, self.partner = side, preset, seed, partner

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """`crops` uint8 `[2n, C, S, S]`, `draws` float32 `[2n, draws]`, `rows` int64 `[n]` of n keys of an order."""
        places = [divmod(key, len(self)) for key in keys]
        seconds = [(epoch, row if self.partner is None else self.partner(epoch, row)) for epoch, row in places]
        rows = torch.tensor([row for _, row in places])
        return _crops(self, [*places, *seconds], [0] * len(places) + [1] * len(places)) | {"rows": rows}


class EvaluationViews(torch.utils.data.Dataset):
    """Each picture as search sees it, one view of it that is always the same, and its label.

    Args:
        views: Where pictures and views come from.
        labels: int64 `[N]`, -1 where there is none.
        with_view: Give the view too.
    """

    def __init__(self, views: TrainingViews, labels: np.ndarray, with_view: bool) -> None:
        self.views, self.labels, self.with_view = views, labels, with_view

    def __len__(self) -> int:
        return len(self.views)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """`pixel_values` float32 `[n, C, S, S]`, `labels` int64 `[n]`, and `crops` and `draws` of the views."""
        views = self.views
        pictures = [read_picture(views.pictures, views.processor, row) for row in rows]
        batch = _crops(views, [(0, row) for row in rows], [0] * len(rows)) if self.with_view else {}
        return batch | {
            "pixel_values": views.processor(pictures, return_tensors="pt")["pixel_values"],
            "labels": torch.from_numpy(self.labels[list(rows)]),
        }


def class_labels(dataset: Dataset, column: str) -> np.ndarray:
    """Labels of a column as int64 `[N]`, -1 where there is none; all -1 if the dataset has no such column.

    Raises:
        TypeError: If the column holds anything but integers.
    """
    if column not in dataset.column_names:
        return np.full(len(dataset), -1, dtype=np.int64)
    values = dataset.with_format(None)[column][:]
    if not all(value is None or isinstance(value, int) for value in values):
        raise TypeError(
            f"the label column {column!r} must hold integers, got {dataset.features[column]}; turn it into class "
            f"labels with dataset.class_encode_column({column!r}), or choose another with label_column"
        )
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def as_batch(batch: Batch) -> Batch:
    """The collator of all datasets here: what they give is a batch already."""
    return batch


def _crops(views: TrainingViews, places: Sequence[tuple[int, int]], numbers: Sequence[int]) -> Batch:
    """Crop and draw of one view, by its number, of the picture at each (epoch, row)."""
    draws = np.stack([draw_view(views.seed, *place, number) for place, number in zip(places, numbers, strict=True)])
    wanted: dict[int, list[int]] = {}
    for index, (_, row) in enumerate(places):
        wanted.setdefault(row, []).append(index)

    def crops_of(row: int) -> list[np.ndarray]:
        picture = read_picture(views.pictures, views.processor, row)
        return [cut(picture, draws[index], views.preset, views.side) for index in wanted[row]]

    # In a worker process torch has one thread; in the process of the model the other cores can help.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = [crop for crops in pool.map(crops_of, wanted) for crop in crops]
    order = np.argsort([index for indices in wanted.values() for index in indices])
    return {"crops": torch.from_numpy(np.stack(found)[order]), "draws": torch.from_numpy(draws)}
