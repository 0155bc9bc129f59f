"""Batches of rows in, what a model makes of their pictures out, without gradients."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from .decoding import PictureBatch, decode_batch, decoded_batches
from .streams import in_streams, stream_count

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel

# pixel_values on the device of the model in, arrays by name out.
Step = Callable[[torch.Tensor], dict[str, np.ndarray]]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back afterwards."""
    # A frozen backbone may stand in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class Inference:
    """A model, its processor and how pictures go through both; arguments as of `encode_dataset`."""

    model: "TCQModel"
    processor: "TCQImageProcessor"
    image_column: str
    batch_size: int
    num_workers: int | None
    device: str | torch.device | None
    dtype: torch.dtype | None
    on_error: str

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.device is not None:
            self.model.to(self.device)
        on_cpu = self.model.device.type == "cpu"
        if self.num_workers is None:
            self.num_workers = 0 if on_cpu else max(1, min(8, (os.cpu_count() or 1) - 1))
        self.in_streams = on_cpu and self.num_workers == 0

    def run(self, step: Step, pixel_values: torch.Tensor | None) -> dict[str, np.ndarray]:
        """One step without gradients, in this thread, which may be one of many; nothing for no picture."""
        if pixel_values is None:
            return {}
        mixed = nullcontext() if self.dtype is None else torch.autocast(self.model.device.type, dtype=self.dtype)
        with torch.inference_mode(), mixed:
            return step(pixel_values.to(self.model.device))

    def stream(
        self, pictures: Dataset, batches: list[range], step: Step
    ) -> Iterator[tuple[PictureBatch, dict[str, np.ndarray]]]:
        """Every batch of rows, decoded, with what the step makes of its readable pictures."""
        with evaluation_mode(self.model):
            if self.in_streams and stream_count(len(batches)) > 1:
                column = pictures[pictures.column_names[0]]
                yield from in_streams(lambda rows: self.read_and_run(column[rows], rows, step, threads=1), batches)
                return
            for batch in decoded_batches(pictures, self.processor, batches, self.num_workers):
                yield batch, self.run(step, batch.pixel_values)

    def read_and_run(
        self, pictures: list[Any], rows: Sequence[int], step: Step, threads: int | None
    ) -> tuple[PictureBatch, dict[str, np.ndarray]]:
        """Decode one batch in this thread, or in several, and run the step on it."""
        batch = decode_batch(self.processor, pictures, rows, threads)
        return batch, self.run(step, batch.pixel_values)

    def refuse(self, row: int, message: str) -> str:
        """Raise for an unreadable picture, or give the text to log for it."""
        text = f"row {row}{message}"
        if self.on_error == "raise":
            raise ValueError(f"cannot read the picture in {text} (on_error='skip' leaves such rows out)")
        return text

    def encode(self, pixel_values: torch.Tensor) -> dict[str, np.ndarray]:
        """A step: codes uint8 `[n, M]` and embedding float32 `[n, D]`."""
        output = self.model(pixel_values=pixel_values)
        return {"codes": output.codes.cpu().numpy(), "embedding": output.embeddings.cpu().numpy()}

    def features(self, pixel_values: torch.Tensor) -> dict[str, np.ndarray]:
        """A step: backbone features float32 `[n, F]`."""
        # A copy: the class token is a view that would keep all tokens of the batch alive.
        return {"features": self.model.get_image_features(pixel_values).float().cpu().numpy().copy()}


def check_finite(embeddings: np.ndarray, rows: list[int]) -> None:
    """Refuse embeddings `[n, D]` of rows `[n]` that are not finite, naming the first such row."""
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the embedding of row {rows[int(np.argmin(finite))]} is not finite: the weights are broken or overflow in "
            "the chosen dtype"
        )
