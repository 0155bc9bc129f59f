"""Images in, codes and embeddings out, as columns of a dataset."""

import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils import tqdm

from .code_cache import CHUNK_ROWS, cache_key, chunk_path, write_chunk
from .decoding import PictureBatch, raw_pictures, row_batches
from .inference import Inference, check_finite, evaluation_mode
from .streams import in_streams, stream_count

if TYPE_CHECKING:
    from tcq_hf.model.image_processing_tcq import TCQImageProcessor
    from tcq_hf.model.modeling_tcq import TCQModel

logger = logging.getLogger(__name__)

# Column of a cache file: why a picture could not be read, or null.
_ERROR = "_error"

# Rows of a stream of pictures that are held at the same time, as long as a batch has fewer.
_ROWS_AT_ONCE = 512


def encode_dataset(
    dataset: Dataset | IterableDataset,
    model: "TCQModel",
    processor: "TCQImageProcessor",
    image_column: str = "image",
    embeddings: bool = False,
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Dataset | IterableDataset:
    """Add a column `codes`, uint8 `[M]`, and on request `embedding`, float32 `[D]`, to a dataset of pictures.

    A `Dataset` is encoded now. Finished parts of 8,192 rows are kept in the `datasets` cache, keyed by weights,
    codebooks, processor and data (for files also their size and time), so an interrupted call goes on where it stopped
    and a repeated one reads. An `IterableDataset` comes back as one, encoded as it is read (pictures are then decoded
    in threads only). Memory does not grow with the number of rows.

    Args:
        dataset: Rows with pictures, of one split.
        model: A `TCQModel`; its training mode is left as it was.
        processor: Its image processor.
        image_column: Column of images: the `Image` feature, paths or encoded bytes.
        embeddings: Add the `embedding` column too.
        batch_size: Pictures in one forward pass.
        num_workers: Processes that decode beside the model. None takes 0 on a CPU, where each core decodes and encodes
            batches of its own, and otherwise a process a core but one, at most 8.
        device: Moves the model there; None leaves it where it is.
        dtype: Autocast dtype of the backbone, `torch.bfloat16` or `torch.float16`; None runs as the weights are.
        on_error: `"raise"` stops at the first picture that cannot be read, naming row and path; `"skip"` leaves such
            rows out and logs each of them and their number.

    Returns:
        The dataset with the new columns and all its rows in order (less those skipped).

    Raises:
        TypeError: If it is no dataset of one split.
        ValueError: For a missing or present column, an unreadable picture, an embedding that is not finite.
    """
    _check_dataset(dataset, image_column)
    names = ["codes", "embedding"] if embeddings else ["codes"]
    taken = set(names) & set(dataset.column_names or ())
    if taken:
        raise ValueError(f"the dataset has a column {sorted(taken)[0]!r} already; remove it first")
    config = model.config
    columns = {"codes": List(Value("uint8"), length=config.num_codebooks)}
    if embeddings:
        columns["embedding"] = List(Value("float32"), length=config.embedding_dim)
    job = Inference(model, processor, image_column, batch_size, num_workers, device, dtype, on_error)
    if isinstance(dataset, IterableDataset):
        return _encode_iterable(dataset, job, columns)
    return _encode_table(dataset, job, columns)


def extract_features(
    dataset: Dataset,
    model: "TCQModel",
    processor: "TCQImageProcessor",
    image_column: str = "image",
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> np.ndarray:
    """Backbone features of every picture: what `TCQModel.initialize` learns from.

    Arguments are those of `encode_dataset`. A few thousand random pictures suffice:
    `dataset.shuffle(seed=0).take(20_000)`.

    Returns:
        float32 `[N, F]`, in the order of the rows (less those skipped).
    """
    _check_dataset(dataset, image_column)
    if not isinstance(dataset, Dataset):
        raise TypeError("extract_features needs a Dataset; take a part of an IterableDataset into one first")
    job = Inference(model, processor, image_column, batch_size, num_workers, device, dtype, on_error)
    pictures = raw_pictures(dataset, image_column)
    parts, skipped = [], []
    batches = row_batches(range(len(dataset)), batch_size)
    with (
        tqdm(total=len(dataset), unit="img", desc="Extracting features") as bar,
        closing(job.stream(pictures, batches, job.features)) as stream,
    ):
        for batch, found in stream:
            for position, message in batch.errors.items():
                skipped.append(job.refuse(batch.rows[position], message))
            parts += found.values()
            bar.update(len(batch.rows))
    _report_skipped(skipped)
    return np.concatenate(parts) if parts else np.empty((0, model.projection.in_features), np.float32)


def encode_pictures(model: "TCQModel", processor: "TCQImageProcessor", pictures: Any) -> np.ndarray:
    """Embeddings float32 `[N, D]` of a picture or a list of pictures of any kind that the processor takes."""
    job = Inference(model, processor, "", 1, 0, device=None, dtype=None, on_error="raise")
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
    with evaluation_mode(model):
        return job.run(job.encode, pixel_values)["embedding"]


def _encode_table(dataset: Dataset, job: Inference, columns: dict[str, Any]) -> Dataset:
    if len(dataset) == 0:
        features = Features({**dataset.features, **columns})
        return _formatted(Dataset.from_dict({name: [] for name in features}, features=features), dataset)
    given, dataset = dataset, dataset.with_format(None)
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    pictures = raw_pictures(dataset, job.image_column)
    key = cache_key(dataset, job.model, job.processor, job.image_column, list(columns), str(job.dtype))
    spans = [(start, min(start + CHUNK_ROWS, len(dataset))) for start in range(0, len(dataset), CHUNK_ROWS)]
    paths = [chunk_path(key, pictures, *span) for span in spans]
    missing = [(path, span) for path, span in zip(paths, spans, strict=True) if not path.exists()]
    if missing:
        _encode_chunks(pictures, missing, job, Features({**columns, _ERROR: Value("string")}), len(dataset))
    encoded = datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
    messages = encoded.data.column(_ERROR)
    bad = pc.indices_nonzero(pc.is_valid(messages)).to_pylist()
    _report_skipped([job.refuse(row, messages[row].as_py()) for row in bad])
    encoded = datasets.concatenate_datasets([dataset, encoded.remove_columns(_ERROR)], axis=1)
    if bad:
        encoded = encoded.select(np.setdiff1d(np.arange(len(dataset)), bad))
    return _formatted(encoded, given)


def _formatted(encoded: Dataset, given: Dataset) -> Dataset:
    """The encoded dataset in the format of the one it came from."""
    kind, options = given.format["type"], given.format["format_kwargs"]
    return encoded.with_format(kind, **options) if kind else encoded


def _encode_chunks(
    pictures: Dataset,
    missing: list[tuple[Path, tuple[int, int]]],
    job: Inference,
    features: Features,
    total: int,
) -> None:
    """Encode the missing chunks, each written aside and renamed when whole."""
    batches = [batch for _, span in missing for batch in row_batches(range(*span), job.batch_size)]
    done = total - sum(stop - start for _, (start, stop) in missing)
    with (
        tqdm(total=total, initial=done, unit="img", desc="Encoding") as bar,
        closing(job.stream(pictures, batches, job.encode)) as stream,
    ):
        for path, (_, stop) in missing:
            parts: list[pa.Table] = []
            for batch, found in stream:
                for position, message in batch.errors.items():
                    job.refuse(batch.rows[position], message)
                parts.append(_batch_table(batch, found, features))
                bar.update(len(batch.rows))
                if batch.rows[-1] == stop - 1:
                    break
            write_chunk(path, pa.concat_tables(parts))


def _batch_table(batch: PictureBatch, found: dict[str, np.ndarray], features: Features) -> pa.Table:
    """Codes, embeddings and error messages of one batch; an unreadable row holds zeros and its message."""
    count, good = len(batch.rows), batch.readable()
    if found:
        check_finite(found["embedding"], [batch.rows[position] for position in good])
    arrays = []
    for name, feature in features.items():
        if name == _ERROR:
            arrays.append(pa.array([batch.errors.get(position) for position in range(count)], pa.string()))
            continue
        values = np.zeros((count, feature.length), dtype=feature.feature.dtype)
        if found:
            values[good] = found[name]
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), feature.length))
    return pa.Table.from_arrays(arrays, schema=features.arrow_schema)


def _encode_iterable(dataset: IterableDataset, job: Inference, columns: dict[str, Any]) -> IterableDataset:
    column, features = job.image_column, dataset.features
    image = features.get(column) if features else None
    decodes = isinstance(image, Image) and image.decode
    raw = dataset.cast_column(column, Image(decode=False)) if decodes else dataset
    encode = partial(_encode_rows, job=job, names=list(columns), decode=image.decode_example if decodes else None)
    # So many batches at once that every stream has work.
    batches = 2 * stream_count(_ROWS_AT_ONCE // job.batch_size) if job.in_streams else 1
    return raw.map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=job.batch_size * batches,
        features=Features({**features, **columns}) if features else None,
    )


def _encode_rows(
    rows: dict[str, list],
    indices: list[int],
    job: Inference,
    names: list[str],
    decode: Callable[[dict], Any] | None,
) -> dict[str, list]:
    pictures = rows[job.image_column]
    batches = row_batches(range(len(indices)), job.batch_size)
    shared = job.in_streams and stream_count(len(batches)) > 1
    threads = 1 if shared else job.num_workers or None

    def work(batch: range) -> tuple[PictureBatch, dict[str, np.ndarray]]:
        return job.read_and_run(pictures[batch.start : batch.stop], batch, job.encode, threads)

    with evaluation_mode(job.model):
        done = list(in_streams(work, batches) if shared else map(work, batches))
    good, messages = [], []
    for batch, found in done:
        messages += [job.refuse(indices[batch.rows[position]], text) for position, text in batch.errors.items()]
        readable = [batch.rows[position] for position in batch.readable()]
        if found:
            check_finite(found["embedding"], [indices[position] for position in readable])
        good += readable
    _report_skipped(messages)
    kept = {name: [values[position] for position in good] for name, values in rows.items()}
    if decode is not None:
        kept[job.image_column] = [decode(picture) for picture in kept[job.image_column]]
    return kept | {name: [row for _, found in done if found for row in found[name].tolist()] for name in names}


def _check_dataset(dataset: Any, image_column: str) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = "; choose a split, e.g. dataset['train']" if isinstance(dataset, dict) else ""
        raise TypeError(f"dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}{hint}")
    if dataset.column_names is not None and image_column not in dataset.column_names:
        raise ValueError(f"the dataset has no column {image_column!r}; its columns are {dataset.column_names}")


def _report_skipped(skipped: list[str]) -> None:
    for text in skipped:
        logger.warning("left out %s", text)
    if skipped:
        logger.warning("left out %d unreadable pictures", len(skipped))
