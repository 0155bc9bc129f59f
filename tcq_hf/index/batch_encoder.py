"""BatchEncoder: pictures of a batch in, codes and embeddings out, for any engine that calls it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

from .decoding import PictureBatch, row_batches
from .inference import Inference, check_finite, evaluation_mode
from .streams import in_streams, stream_count

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel


class BatchEncoder:
    """Pictures of a batch in, `codes` and `embedding` out: a plain callable that Ray, Spark or Daft can wrap.

    It can be pickled, and loads a model that is given by name in the process that encodes the first batch.

    Args:
        model: A `TCQModel`, or the folder or Hub name of one, which every machine must be able to read.
        processor: Its image processor; by default the one saved with a model that is given by name.
        image_column: Pictures: the `Image` feature undecoded (`{"bytes": ..., "path": ...}`), paths, encoded bytes or
            integer arrays `[H, W, C]`.
        id_column: Column that names a row in messages; without it a row is named by its place in the batch.
        batch_size: Pictures in one forward pass.
        device: Device of the model, e.g. `"cuda"`; by default where it is.
        dtype: Run the backbone in this dtype by autocast.
        on_error: `"raise"` stops at a picture that cannot be read. `"skip"` goes on: such a row gets zeros and, in a
            column `error` that is None elsewhere, what is wrong; drop it before anything is indexed.
        keep_pictures: Give the pictures back too.

    Raises:
        ValueError: If an option is out of range, or no processor is given with a model that is.
    """

    def __init__(
        self,
        model: "TCQModel | str | os.PathLike",
        processor: "TCQImageProcessor | None" = None,
        image_column: str = "image",
        id_column: str | None = "id",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        keep_pictures: bool = False,
    ) -> None:
        if processor is None and not isinstance(model, (str, os.PathLike)):
            raise ValueError("processor must be given with a model; only a model given by name brings its own")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.model, self.processor = model, processor
        self.image_column, self.id_column = image_column, id_column
        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self.on_error, self.keep_pictures = on_error, keep_pictures
        self._job: Inference | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_job": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            batch: Columns of n rows, lists or NumPy arrays.

        Returns:
            The columns, less the pictures, with `codes` uint8 `[n, M]` and `embedding` float32 `[n, D]`.

        Raises:
            ValueError: If a column is missing or taken, a picture cannot be read (`on_error="raise"`), or an embedding
                is not finite.
        """
        check_columns(list(batch), self.image_column, self.id_column)
        job = self._job = self._job or self._load()
        pictures = list(batch[self.image_column])
        names = range(len(pictures)) if self.id_column is None else batch[self.id_column]
        config = job.model.config
        codes = np.zeros((len(pictures), config.num_codebooks), np.uint8)
        embeddings = np.zeros((len(pictures), config.embedding_dim), np.float32)
        errors: list[str | None] = [None] * len(pictures)
        for done, found in _encoded(job, pictures):
            for position, message in done.errors.items():
                row = done.rows[position]
                errors[row] = job.refuse(names[row], message)
            rows = [done.rows[position] for position in done.readable()]
            if found:
                check_finite(found["embedding"], [names[row] for row in rows])
                codes[rows], embeddings[rows] = found["codes"], found["embedding"]
        kept = {name: values for name, values in batch.items() if self.keep_pictures or name != self.image_column}
        encoded = kept | {"codes": codes, "embedding": embeddings}
        return encoded if self.on_error == "raise" else encoded | {"error": np.array(errors, dtype=object)}

    def _load(self) -> Inference:
        model, processor = self.model, self.processor
        if isinstance(model, (str, os.PathLike)):
            processor = processor or AutoImageProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
            if not hasattr(model, "codebooks"):
                raise ValueError(f"{self.model} holds a {type(model).__name__}, expected a TCQModel")
        return Inference(
            model, processor, self.image_column, self.batch_size, 0, self.device, self.dtype, self.on_error
        )


def check_columns(names: Sequence[str], image_column: str, id_column: str | None) -> None:
    """Raise ValueError unless pictures and ids are among the columns, and what `BatchEncoder` adds is not."""
    for name in (image_column, id_column):
        if name is not None and name not in names:
            raise ValueError(f"there is no column {name!r}; the columns are {list(names)}")
    if taken := {"codes", "embedding", "error"} & set(names):
        raise ValueError(f"there is a column {sorted(taken)[0]!r} already; remove it first")


def _encoded(job: Inference, pictures: list[Any]) -> Iterator[tuple[PictureBatch, dict[str, np.ndarray]]]:
    """Batches of pictures, decoded and encoded in as many streams as torch has threads."""
    batches = row_batches(range(len(pictures)), job.batch_size)
    threads = 1 if stream_count(len(batches)) > 1 else torch.get_num_threads()

    def work(rows: range) -> tuple[PictureBatch, dict[str, np.ndarray]]:
        return job.read_and_run(pictures[rows.start : rows.stop], rows, job.encode, threads)

    with evaluation_mode(job.model):
        yield from in_streams(work, batches)
