"""Pictures of a dataset in, batches of `pixel_values` out, decoded in threads or worker processes."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor


@dataclass
class PictureBatch:
    """Rows, the `pixel_values` of those that could be read, and a message for each that could not.

    Args:
        rows: Numbers of the rows.
        pixel_values: float32 `[n, C, H, W]` of the readable rows, in order; None if there are none.
        errors: Message by position in `rows`.
    """

    rows: Sequence[int]
    pixel_values: torch.Tensor | None
    errors: dict[int, str]

    def readable(self) -> list[int]:
        """Positions in `rows` whose pictures stand in `pixel_values`."""
        return [position for position in range(len(self.rows)) if position not in self.errors]


def raw_pictures(dataset: Dataset, column: str) -> Dataset:
    """The image column alone, undecoded, so that a damaged file surfaces in our hands, with its row."""
    pictures = dataset.with_format(None).select_columns([column])
    return (
        pictures.cast_column(column, Image(decode=False)) if isinstance(dataset.features[column], Image) else pictures
    )


def read_picture(pictures: Dataset, processor: "TCQImageProcessor", row: int) -> PIL.Image.Image:
    """One picture of a dataset from `raw_pictures`, upright, 8-bit, RGB or grey as the processor wants it.

    Raises:
        ValueError: If it cannot be read, naming its row and path.
    """
    (picture,) = pictures[row].values()
    try:
        return processor.process_image(_opened(picture))
    except MemoryError:
        raise  # says nothing about the picture
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise ValueError(
            f"cannot read the picture in row {row}{_place(picture)}: {type(error).__name__}: {error}"
        ) from error


def row_batches(rows: range, size: int) -> list[range]:
    """Consecutive batches of row numbers."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def decoded_batches(
    pictures: Dataset,
    processor: "TCQImageProcessor",
    batches: list[range],
    num_workers: int,
) -> Iterator[PictureBatch]:
    """Decode batches of rows in order, ahead of the reader in `num_workers` processes, or in threads if 0.

    Args:
        pictures: A dataset from `raw_pictures`.
        processor: Turns pictures into `pixel_values`.
        batches: Row numbers of each batch.
        num_workers: Worker processes.
    """
    yield from torch.utils.data.DataLoader(
        _Pictures(pictures, processor),
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=max(0, min(num_workers, len(batches) - 1)),
    )


def decode_batch(
    processor: "TCQImageProcessor", pictures: list[Any], rows: Sequence[int], threads: int | None = None
) -> PictureBatch:
    """Decode one batch, a slice of it in each thread (None: a thread a core); pictures that fail become messages."""
    step = -(-len(pictures) // (threads or os.cpu_count() or 1))
    slices = [range(start, min(start + step, len(pictures))) for start in range(0, len(pictures), step)]
    read = partial(_read, processor, pictures)
    if len(slices) == 1:
        parts = [read(slices[0])]
    else:
        with ThreadPoolExecutor(len(slices)) as pool:
            parts = list(pool.map(read, slices))
    pixels = [values for values, _ in parts if values is not None]
    errors = {position: message for _, messages in parts for position, message in messages.items()}
    return PictureBatch(rows, torch.from_numpy(np.concatenate(pixels)) if pixels else None, errors)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, pictures: Dataset, processor: "TCQImageProcessor") -> None:
        self.pictures, self.processor = pictures, processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, rows: range) -> PictureBatch:
        column = self.pictures.column_names[0]
        threads = 1 if torch.utils.data.get_worker_info() else None
        return decode_batch(self.processor, self.pictures[rows][column], rows, threads)


def _identity(batch: PictureBatch) -> PictureBatch:
    return batch


def _read(
    processor: "TCQImageProcessor", pictures: list[Any], positions: range
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Decode together; where that fails, halve until the pictures at fault stand alone."""
    try:
        return processor([_opened(pictures[position]) for position in positions])["pixel_values"], {}
    except MemoryError:
        raise  # says nothing about the picture
    except Exception as error:  # Pillow raises almost anything on damaged files
        if len(positions) == 1:
            place = _place(pictures[positions[0]])
            return None, {positions[0]: f"{place}: {type(error).__name__}: {error}"}
    middle = len(positions) // 2
    halves = [_read(processor, pictures, positions[:middle]), _read(processor, pictures, positions[middle:])]
    pixels = [values for values, _ in halves if values is not None]
    return np.concatenate(pixels) if pixels else None, halves[0][1] | halves[1][1]


def _opened(picture: Any) -> Any:
    """The picture itself, or, where a streamed dataset names it by an address, what `datasets` reads from there."""
    remote = isinstance(picture, dict) and picture.get("bytes") is None and "://" in (picture.get("path") or "")
    return Image().decode_example(picture) if remote else picture


def _place(picture: Any) -> str:
    path = picture.get("path") if isinstance(picture, dict) else picture if isinstance(picture, str) else None
    return f" ({path})" if path else ""
