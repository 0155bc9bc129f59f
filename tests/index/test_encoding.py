"""encoding: rows in, rows out, in order; the cache, its keys and its interruptions; pictures that cannot be read."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value

from tcq_hf import TCQImageProcessor, codes_array, encode_dataset, extract_features
from tcq_hf.index.encoding import encode_pictures
from tcq_hf.index.inference import Inference
from tcq_hf.index.streams import stream_count

# Other batch sizes sum in another order: a few float32 roundings of values below 1.
EMBEDDING_TOLERANCE = 1e-5


# A cache of its own for each test.
pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("tcq_hf.index.encoding.CHUNK_ROWS", 8)


@pytest.fixture
def paths(pictures, tmp_path):
    """Files of the drawn pictures that a test may change."""
    (tmp_path / "files").mkdir()
    found = [tmp_path / "files" / f"{i:02d}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, found, strict=True):
        picture.save(path)
    return list(map(str, found))


@pytest.fixture
def files(paths):
    """A dataset of paths that a test may change, with the Image feature."""
    return images(paths)


def images(values):
    return Dataset.from_dict({"image": values, "number": list(range(len(values)))}).cast_column("image", Image())


def one_by_one(model, processor, pictures):
    """Codes and embeddings of pictures, each in a forward pass of its own."""
    with torch.no_grad():
        outputs = [model(pixel_values=processor(picture, return_tensors="pt")["pixel_values"]) for picture in pictures]
    return np.concatenate([o.codes for o in outputs]), np.concatenate([o.embeddings for o in outputs])


@pytest.fixture
def expected(model, processor, pictures):
    """Codes and embeddings of the drawn pictures, in the order of their numbers."""
    codes, embeddings = one_by_one(model, processor, pictures)
    apart = np.linalg.norm(embeddings[:, None] - embeddings, axis=-1) + np.eye(len(embeddings))
    assert apart.min() > 100 * EMBEDDING_TOLERANCE, "the pictures must be told apart for order to mean anything"
    return codes, embeddings


@pytest.fixture
def forwards(model, expected):
    """Rows of each forward pass of the model, from here on."""
    counts = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return counts


def embeddings_of(encoded):
    return np.asarray(encoded.with_format("numpy")["embedding"][:])


def assert_rows(encoded, expected, rows=None):
    """The encoded rows are these rows of the expected codes and embeddings, in order."""
    codes, embeddings = (values if rows is None else values[rows] for values in expected)
    assert len(encoded) == len(codes)
    np.testing.assert_array_equal(codes_array(encoded), codes)
    if "embedding" in encoded.column_names:
        assert np.abs(embeddings_of(encoded) - embeddings).max() <= EMBEDDING_TOLERANCE


# --- Invariant 4: rows and order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 32, 1000])
def test_invariant_4_rows_in_rows_out(
    files, model, processor, expected, small_chunks, batch_size, num_workers, embeddings
):
    encoded = encode_dataset(
        files, model, processor, batch_size=batch_size, num_workers=num_workers, embeddings=embeddings
    )
    assert_rows(encoded, expected)
    assert encoded["number"][:] == list(range(32))
    assert ("embedding" in encoded.column_names) == embeddings


@pytest.mark.parametrize("chunk_rows", [1, 7, 31, 32, 33])
def test_invariant_4_chunks_join_without_a_seam(files, model, processor, expected, monkeypatch, chunk_rows):
    monkeypatch.setattr("tcq_hf.index.encoding.CHUNK_ROWS", chunk_rows)
    assert_rows(encode_dataset(files, model, processor, batch_size=5, embeddings=True), expected)


class Interrupted(Exception):
    """A run that was stopped from outside."""


def stop_after(model, batches):
    """Let the model raise in the forward pass that follows so many."""
    left = [batches]

    def hook(*_):
        if not left[0]:
            raise Interrupted
        left[0] -= 1

    return model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 7])
def test_invariant_4_an_interrupted_run_goes_on_where_it_stopped(
    files, model, processor, expected, small_chunks, cache_folder, tmp_path, monkeypatch, batches, num_workers, forwards
):
    arguments = {"batch_size": 4, "num_workers": num_workers, "embeddings": True}
    stop = stop_after(model, batches)
    with pytest.raises(Interrupted):
        encode_dataset(files, model, processor, **arguments)
    stop.remove()
    forwards.clear()
    kept = len(list(cache_folder.glob("*.arrow")))
    # Two batches of four make a chunk of eight; one stream may be ahead of another by what may be under way.
    ahead = 0 if num_workers else 2 * stream_count(8)
    assert (batches - ahead) // 2 <= kept <= batches // 2
    resumed = encode_dataset(files, model, processor, **arguments)
    assert sum(forwards) == 32 - kept * 8
    assert_rows(resumed, expected)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "fresh")
    fresh = encode_dataset(files, model, processor, **arguments)
    np.testing.assert_array_equal(codes_array(resumed), codes_array(fresh))
    np.testing.assert_array_equal(embeddings_of(resumed), embeddings_of(fresh))


@pytest.mark.parametrize("lost", [{0}, {1, 3}, {2}, {0, 1, 2, 3}])
def test_invariant_4_lost_chunks_alone_are_encoded_again(
    files, model, processor, expected, small_chunks, forwards, cache_folder, lost
):
    encode_dataset(files, model, processor, batch_size=3)
    by_age = sorted(cache_folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for number in lost:
        by_age[number].unlink()
    forwards.clear()
    assert_rows(encode_dataset(files, model, processor, batch_size=5), expected)
    assert sum(forwards) == 8 * len(lost)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_invariant_4_an_iterable_dataset_gives_the_same_rows(files, model, processor, expected, batch_size, embeddings):
    stream = encode_dataset(
        files.to_iterable_dataset(num_shards=3), model, processor, batch_size=batch_size, embeddings=embeddings
    )
    assert isinstance(stream, IterableDataset)
    rows = list(stream)
    assert [row["number"] for row in rows] == list(range(32))
    np.testing.assert_array_equal([row["codes"] for row in rows], expected[0])
    assert all(isinstance(row["image"], PIL.Image.Image) for row in rows)
    if embeddings:
        assert np.abs(np.array([row["embedding"] for row in rows]) - expected[1]).max() <= EMBEDDING_TOLERANCE


@pytest.mark.parametrize("rows", [[3, 1, 2], [5] * 3, list(range(20, 28)), list(range(31, -1, -1))])
def test_invariant_4_a_selection_keeps_its_order(files, model, processor, expected, small_chunks, rows):
    encoded = encode_dataset(files.select(rows), model, processor, embeddings=True)
    assert_rows(encoded, expected, rows)
    assert encoded["number"][:] == rows


def test_invariant_4_a_shuffled_dataset_keeps_its_order(files, model, processor, expected, small_chunks):
    shuffled = files.shuffle(seed=0)
    encoded = encode_dataset(shuffled, model, processor, embeddings=True)
    assert encoded["number"][:] == shuffled["number"][:] != list(range(32))
    assert_rows(encoded, expected, shuffled["number"][:])


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("kind", ["PIL", "paths", "bytes", "undecoded", "large paths"])
def test_every_kind_of_picture_column(paths, pictures, model, processor, expected, kind, iterable):
    made = {
        "PIL": lambda: Dataset.from_dict({"image": pictures}),
        "paths": lambda: Dataset.from_dict({"image": paths}),
        "bytes": lambda: Dataset.from_dict({"image": list(map(png, pictures))}),
        "undecoded": lambda: images(paths).cast_column("image", Image(decode=False)),
        "large paths": lambda: Dataset.from_dict({"image": paths}, features=Features({"image": Value("large_string")})),
    }[kind]()
    given = made.to_iterable_dataset() if iterable else made
    encoded = encode_dataset(given, model, processor)
    np.testing.assert_array_equal([row["codes"] for row in encoded], expected[0])
    assert next(iter(encoded))["image"] == next(iter(given))["image"]


def test_a_generator_without_features_is_encoded(pictures, model, processor, expected):
    stream = IterableDataset.from_generator(lambda: ({"image": picture} for picture in pictures))
    rows = list(encode_dataset(stream, model, processor, batch_size=5))
    np.testing.assert_array_equal([row["codes"] for row in rows], expected[0])


def test_an_imagefolder_is_encoded(dataset, model, processor):
    codes, _ = one_by_one(model, processor, dataset["image"])
    encoded = encode_dataset(dataset, model, processor)
    np.testing.assert_array_equal(codes_array(encoded), codes)
    assert encoded["label"][:] == dataset["label"][:]


# --- What comes back -------------------------------------------------------------------------------------------------


def test_features_and_columns_of_the_result(dataset, model, processor):
    encoded = encode_dataset(dataset, model, processor, embeddings=True)
    added = {"codes": List(Value("uint8"), length=4), "embedding": List(Value("float32"), length=32)}
    assert encoded.features == Features({**dataset.features, **added})
    assert list(encoded.features) == ["image", "label", "codes", "embedding"]
    stream = encode_dataset(dataset.to_iterable_dataset(), model, processor, embeddings=True)
    assert stream.features == encoded.features
    assert dataset.column_names == ["image", "label"]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_the_format_is_kept(files, model, processor, expected, kind, shuffled):
    given = (files.shuffle(seed=0) if shuffled else files).with_format(kind)
    encoded = encode_dataset(given, model, processor)
    assert encoded.format["type"] == kind
    np.testing.assert_array_equal(
        codes_array(encoded), expected[0][files.shuffle(seed=0)["number"][:] if shuffled else slice(None)]
    )


def test_a_transform_is_kept(files, model, processor, expected):
    given = files.with_transform(lambda rows: {"doubled": [2 * number for number in rows["number"]]})
    encoded = encode_dataset(given, model, processor)
    np.testing.assert_array_equal(codes_array(encoded), expected[0])
    assert encoded[3] == {"doubled": 6}


def test_an_iterable_dataset_with_a_format_is_encoded(files, model, processor, expected):
    stream = encode_dataset(files.to_iterable_dataset().with_format("torch"), model, processor)
    rows = list(stream)
    np.testing.assert_array_equal([np.asarray(row["codes"]) for row in rows], expected[0])
    assert all(isinstance(row["codes"], torch.Tensor) for row in rows)


@pytest.mark.parametrize("kind", [None, "torch"])
def test_an_empty_dataset_gains_its_columns(files, model, processor, kind):
    encoded = encode_dataset(files.select([]).with_format(kind), model, processor, embeddings=True)
    assert len(encoded) == 0
    assert encoded.features == encode_dataset(files, model, processor, embeddings=True).features
    assert encoded.format["type"] == kind
    assert codes_array(encoded).shape == (0, 4)


def test_an_empty_iterable_dataset_stays_empty(files, model, processor):
    empty = files.to_iterable_dataset().filter(lambda row: False)
    assert list(encode_dataset(empty, model, processor)) == []


def test_an_empty_folder_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError), match=r"empty|data"
    ):
        datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "empty"), split="train")


def test_the_result_survives_the_disk(files, model, processor, expected, tmp_path):
    encode_dataset(files, model, processor, embeddings=True).save_to_disk(str(tmp_path / "saved"))
    assert_rows(datasets.load_from_disk(str(tmp_path / "saved")), expected)


def test_results_of_two_models_have_two_fingerprints(files, model, processor):
    first = encode_dataset(files, model, processor)
    with torch.no_grad():
        model.quantizer.codebooks.mul_(-1)
    second = encode_dataset(files, model, processor)
    assert first._fingerprint != second._fingerprint
    sums = [encoded.map(lambda row: {"sum": sum(row["codes"])})["sum"][:] for encoded in (first, second)]
    assert sums == [codes_array(encoded).sum(axis=1).tolist() for encoded in (first, second)]


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_training_mode_of_every_module_comes_back(files, model, processor, training, frozen):
    model.train(training)
    if frozen:
        model.backbone.eval()
    before = modes(model)
    encode_dataset(files, model, processor)
    encode_pictures(model, processor, files[0]["image"])
    extract_features(files, model, processor)
    assert modes(model) == before


def test_the_training_mode_comes_back_after_an_error(files, model, processor):
    model.train()
    stop_after(model, 1)
    with pytest.raises(Interrupted):
        encode_dataset(files, model, processor, batch_size=5)
    assert model.training


def test_encoding_runs_in_evaluation_mode_without_gradients(files, model, processor):
    seen = []
    model.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.embeddings.requires_grad))
    )
    encode_dataset(files, model.train(), processor)
    assert set(seen) == {(False, False)}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_dtype_of_the_backbone(files, model, processor, expected, dtype):
    encoded = encode_dataset(files, model, processor, embeddings=True, dtype=dtype)
    found = embeddings_of(encoded)
    assert found.dtype == np.float32
    assert np.abs(np.linalg.norm(found.reshape(-1, 4, 8), axis=-1) - 1).max() <= 1e-6
    assert not np.array_equal(found, expected[1])
    # Ten or so roundings at 2^-9 turn a sub-vector by far less than 0.2; the cosine falls by half the square of that.
    assert (found * expected[1]).sum(axis=1).min() >= 4 * (1 - 0.2**2 / 2)


def test_the_device_is_taken(files, model, processor, expected):
    assert_rows(encode_dataset(files, model, processor, device="cpu"), expected)


# --- The cache -------------------------------------------------------------------------------------------------------


def test_a_repeated_call_does_no_forward_pass(files, model, processor, forwards):
    first = encode_dataset(files, model, processor, batch_size=5)
    assert sum(forwards) == 32
    second = encode_dataset(files, model, processor, batch_size=32)
    assert sum(forwards) == 32
    np.testing.assert_array_equal(codes_array(first), codes_array(second))


@pytest.mark.parametrize("rows", [[4, 2], list(range(5, 9))])
def test_a_repeated_selection_does_no_forward_pass(files, model, processor, forwards, rows):
    for _ in range(2):
        encode_dataset(files.select(rows), model, processor)
    assert sum(forwards) == len(rows)


def one_weight(model):
    with torch.no_grad():
        model.backbone.norm.weight[0] += 0.5


def one_codeword(model):
    with torch.no_grad():
        model.quantizer.codebooks[0, 0].neg_()


@pytest.mark.parametrize("change", [one_weight, one_codeword])
def test_the_cache_is_keyed_by_weights_and_codebooks(files, model, processor, forwards, change):
    encode_dataset(files, model, processor, embeddings=True)
    change(model)
    encoded = encode_dataset(files, model, processor, embeddings=True)
    assert sum(forwards) == 64
    assert_rows(encoded, one_by_one(model, processor, files["image"]))


def test_the_cache_is_keyed_by_the_processor(files, model, processor, forwards):
    other = TCQImageProcessor.from_dict(processor.to_dict() | {"image_mean": [0.1, 0.2, 0.3]})
    encode_dataset(files, model, processor, embeddings=True)
    encoded = encode_dataset(files, model, other, embeddings=True)
    assert sum(forwards) == 64
    assert_rows(encoded, one_by_one(model, other, files["image"]))


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"embeddings": True}])
def test_the_cache_is_keyed_by_dtype_and_columns(files, model, processor, forwards, change):
    encode_dataset(files, model, processor)
    encode_dataset(files, model, processor, **change)
    assert sum(forwards) == 64


def test_the_cache_is_keyed_by_the_rows(files, pictures, model, processor, forwards, expected):
    encode_dataset(files.select(range(8)), model, processor)
    encoded = encode_dataset(files.select(range(8, 16)), model, processor)
    assert_rows(encoded, expected, range(8, 16))
    for part in (pictures[:4], pictures[4:8]):
        encoded = encode_dataset(Dataset.from_dict({"image": part}), model, processor)
    assert_rows(encoded, expected, range(4, 8))
    assert sum(forwards) == 24


@pytest.mark.parametrize("column", ["image", "string", "large_string"])
def test_a_file_replaced_under_its_path_is_encoded_again(
    paths, pictures, model, processor, expected, forwards, small_chunks, column
):
    made = images(paths)
    if column != "image":
        made = Dataset.from_dict({"image": paths}, features=Features({"image": Value(column)}))
    encode_dataset(made, model, processor, embeddings=True)
    forwards.clear()
    pictures[20].save(paths[3])
    encoded = encode_dataset(made, model, processor, embeddings=True)
    assert_rows(encoded, expected, [0, 1, 2, 20, *range(4, 32)])
    assert sum(forwards) == 8


def test_a_replaced_file_of_a_shuffled_dataset_is_encoded_again(files, paths, pictures, model, processor, expected):
    shuffled = files.shuffle(seed=0)
    order = shuffled.remove_columns("image")["number"][:]
    encode_dataset(shuffled, model, processor, embeddings=True)
    pictures[20].save(paths[3])
    encoded = encode_dataset(shuffled, model, processor, embeddings=True)
    assert_rows(encoded, expected, [20 if number == 3 else number for number in order])


def test_pictures_of_a_shuffled_dataset_stay_files(files, model, processor):
    """No copy of the pictures is made, in any format."""
    for given in (files.shuffle(seed=0), files.shuffle(seed=0).with_format("numpy")):
        encoded = encode_dataset(given, model, processor).with_format(None)
        assert raw(encoded) == raw(files.shuffle(seed=0))


def test_a_file_of_another_time_is_encoded_again(files, paths, model, processor, forwards, small_chunks):
    encode_dataset(files, model, processor)
    forwards.clear()
    os.utime(paths[9], (1, 1))
    encode_dataset(files, model, processor)
    assert sum(forwards) == 8


@pytest.fixture
def no_caching():
    datasets.disable_caching()
    yield
    datasets.enable_caching()


def test_with_caching_disabled_every_call_encodes(
    files, model, processor, forwards, expected, no_caching, cache_folder
):
    for _ in range(2):
        assert_rows(encode_dataset(files, model, processor), expected)
    assert_rows(encode_dataset(files.shuffle(seed=0), model, processor), expected, files.shuffle(seed=0)["number"][:])
    assert sum(forwards) == 96
    assert not cache_folder.exists()


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import datasets, numpy as np, torch
from datasets import Dataset
from tcq_hf import TCQConfig, TCQImageProcessor, TCQModel, encode_dataset

datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = TCQModel(TCQConfig(**json.loads(sys.argv[2])))
processor = TCQImageProcessor.from_backbone(model.config.backbone, image_size=32)
dataset = Dataset.from_dict({"image": Path(sys.argv[3]).read_text().splitlines()})
report = {}
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    encode_dataset(dataset, model, processor)
except Exception as error:
    report["error"], report["is_os_error"] = str(error), isinstance(error, OSError)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
report["left"] = [path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
report["rows"] = len(encode_dataset(dataset, model, processor))
print(json.dumps(report))
"""


def test_a_full_disk_leaves_no_partial_chunk(paths, cache_folder, tiny_config, tmp_path):
    (tmp_path / "paths.txt").write_text("\n".join(paths))
    config = {name: getattr(tiny_config, name) for name in ("backbone", "backbone_kwargs", "image_size")}
    command = [sys.executable, "-c", FULL_DISK, cache_folder.parent, json.dumps(config), tmp_path / "paths.txt"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    assert report["is_os_error"]
    assert "File too large" in report["error"]
    assert report["left"] == []
    assert report["rows"] == 32


# --- Pictures that cannot be read ------------------------------------------------------------------------------------


BAD = ["truncated.jpg", "text.png", "empty.png", "bomb.png", "missing.png", None]


def spoilt(paths, bad_files, name, row):
    values = list(paths)
    values[row] = bad_files[name] if name else None
    return images(values)


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_stops_and_names_row_and_path(paths, bad_files, model, processor, small_chunks, name, iterable):
    given = spoilt(paths, bad_files, name, 19)
    with pytest.raises(ValueError, match=r"cannot read the picture in row 19\b") as caught:
        list(encode_dataset(given.to_iterable_dataset() if iterable else given, model, processor, batch_size=6))
    assert "on_error='skip'" in str(caught.value)
    assert name is None or bad_files[name] in str(caught.value)


@pytest.mark.parametrize("column", ["string", "binary"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_of_a_plain_column_names_its_row(paths, bad_files, model, processor, column, num_workers):
    values = paths[:]
    values[7] = bad_files["text.png"]
    if column == "binary":
        values = [Path(path).read_bytes() for path in values]
    made = Dataset.from_dict({"image": values})
    with pytest.raises(ValueError, match=r"cannot read the picture in row 7\b"):
        encode_dataset(made, model, processor, batch_size=5, num_workers=num_workers)


def test_a_picture_of_one_pixel_works(model, processor):
    pixel = PIL.Image.new("RGB", (1, 1), (200, 30, 40))
    encoded = encode_dataset(Dataset.from_dict({"image": [pixel]}), model, processor)
    np.testing.assert_array_equal(codes_array(encoded), one_by_one(model, processor, [pixel])[0])


BAD_ROWS = {0: "text.png", 9: "truncated.jpg", 10: None, 31: "missing.png"}
GOOD_ROWS = [row for row in range(32) if row not in BAD_ROWS]


@pytest.fixture
def damaged(paths, bad_files):
    values = list(paths)
    for row, name in BAD_ROWS.items():
        values[row] = bad_files[name] if name else None
    return images(values)


def assert_reported(caplog, rows=BAD_ROWS):
    """Each bad row was logged once, with its path, and their number."""
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tcq_hf")]
    for row, name in rows.items():
        named = [message for message in messages if message.startswith(f"left out row {row}")]
        assert len(named) == 1
        assert name is None or name in named[0]
    counts = [int(message.split()[2]) for message in messages if message.endswith("unreadable pictures")]
    assert sum(counts) == len(rows)


@pytest.mark.parametrize("batch_size", [1, 6, 32])
def test_skip_leaves_out_exactly_the_bad_rows(
    damaged, model, processor, expected, small_chunks, forwards, caplog, batch_size
):
    arguments = {"batch_size": batch_size, "embeddings": True, "on_error": "skip"}
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            encoded = encode_dataset(damaged, model, processor, **arguments)
        assert_rows(encoded, expected, GOOD_ROWS)
        assert encoded["number"][:] == GOOD_ROWS
        assert_reported(caplog)
        caplog.clear()
        assert sum(forwards) == 28


@pytest.mark.parametrize("batch_size", [1, 6, 32])
def test_skip_of_an_iterable_dataset(damaged, model, processor, expected, caplog, batch_size):
    stream = encode_dataset(damaged.to_iterable_dataset(), model, processor, batch_size=batch_size, on_error="skip")
    with caplog.at_level(logging.WARNING):
        rows = list(stream)
    assert [row["number"] for row in rows] == GOOD_ROWS
    np.testing.assert_array_equal([row["codes"] for row in rows], expected[0][GOOD_ROWS])
    assert_reported(caplog)


def test_skip_of_a_shuffled_dataset(damaged, model, processor, expected):
    shuffled = damaged.shuffle(seed=1)
    left = [number for number in shuffled.remove_columns("image")["number"][:] if number not in BAD_ROWS]
    encoded = encode_dataset(shuffled, model, processor, embeddings=True, on_error="skip")
    assert encoded["number"][:] == left
    assert_rows(encoded, expected, left)


def test_a_cached_skip_still_raises_when_asked_to(damaged, model, processor):
    encode_dataset(damaged, model, processor, on_error="skip")
    with pytest.raises(ValueError, match=r"cannot read the picture in row 0\b.*text\.png"):
        encode_dataset(damaged, model, processor)


def test_a_repaired_file_is_encoded(damaged, bad_files, pictures, model, processor, expected, paths, tmp_path):
    late = str(tmp_path / "late.png")
    given = images([*paths[:5], late])
    assert len(encode_dataset(given, model, processor, on_error="skip")) == 5
    shutil.copy(paths[5], late)
    assert_rows(encode_dataset(given, model, processor, on_error="skip"), expected, range(6))


def test_nothing_but_bad_pictures(bad_files, model, processor):
    given = images([bad_files["text.png"]] * 3)
    assert len(encode_dataset(given, model, processor, on_error="skip")) == 0
    assert list(encode_dataset(given.to_iterable_dataset(), model, processor, on_error="skip")) == []
    assert extract_features(given, model, processor, on_error="skip").shape == (0, 32)


# --- Bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_column": "picture"}, r"no column 'picture'; its columns are \['image', 'number'\]"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must"),
    ],
)
def test_bad_arguments_are_refused(files, model, processor, arguments, match, iterable):
    with pytest.raises(ValueError, match=match):
        encode_dataset(files.to_iterable_dataset() if iterable else files, model, processor, **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_column": "picture"}, "no column 'picture'"),
        ({"on_error": "ignore"}, "on_error"),
        ({"batch_size": 0}, "0"),
    ],
)
def test_bad_arguments_of_extract_features_are_refused(files, model, processor, arguments, match):
    with pytest.raises(ValueError, match=match):
        extract_features(files, model, processor, **arguments)


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize(("column", "embeddings"), [("codes", False), ("embedding", True)])
def test_a_column_that_is_there_already_is_refused(files, model, processor, column, embeddings, iterable):
    given = files.rename_column("number", column)
    with pytest.raises(ValueError, match=f"has a column '{column}' already; remove it first"):
        encode_dataset(given.to_iterable_dataset() if iterable else given, model, processor, embeddings=embeddings)


def test_an_embedding_column_of_the_users_own_stays(files, model, processor):
    encoded = encode_dataset(files.rename_column("number", "embedding"), model, processor)
    assert encoded["embedding"][:] == list(range(32))


def test_all_splits_at_once_are_refused_with_a_hint(files, model, processor):
    with pytest.raises(TypeError, match=r"got DatasetDict; choose a split, e\.g\. dataset\['train'\]"):
        encode_dataset(DatasetDict(train=files), model, processor)
    with pytest.raises(TypeError, match="got list"):
        encode_dataset(files["image"][:], model, processor)


def test_broken_weights_name_the_row(files, model, processor, cache_folder):
    with torch.no_grad():
        model.projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="embedding of row 0 is not finite"):
        encode_dataset(files, model, processor)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


@pytest.mark.parametrize("iterable", [False, True])
def test_an_overflow_in_one_picture_names_its_row(damaged, model, processor, iterable):
    white = PIL.Image.new("RGB", (40, 48), "white")
    with torch.no_grad():
        white_features = model.get_image_features(processor(white, return_tensors="pt")["pixel_values"])

    def overflow(_, __, output):
        same = torch.isclose(output, white_features, atol=1e-4).all(dim=1, keepdim=True)
        return torch.where(same, torch.inf, output)

    model.backbone.register_forward_hook(overflow)
    values = [{"path": None, "bytes": png(white)} if row == 21 else value for row, value in enumerate(raw(damaged))]
    given = images(values)
    with pytest.raises(ValueError, match="embedding of row 21 is not finite"):
        list(
            encode_dataset(
                given.to_iterable_dataset() if iterable else given, model, processor, batch_size=6, on_error="skip"
            )
        )


def raw(dataset):
    return dataset.cast_column("image", Image(decode=False))["image"][:]


# --- Features and single pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_extract_features_equals_the_backbone_row_by_row(files, pictures, model, processor, batch_size, num_workers):
    found = extract_features(files, model, processor, batch_size=batch_size, num_workers=num_workers)
    with torch.no_grad():
        rows = [model.get_image_features(processor(p, return_tensors="pt")["pixel_values"]) for p in pictures]
    expected = torch.cat(rows).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= EMBEDDING_TOLERANCE * max(1, np.abs(expected).max())


def test_features_do_not_keep_the_tokens_of_their_batch_alive(pictures, model, processor):
    job = Inference(model, processor, "image", 8, 0, None, None, "raise")
    for count in (1, 8):
        found = job.run(job.features, processor(pictures[:count], return_tensors="pt")["pixel_values"])["features"]
        # The class token is a view of all tokens.
        assert found.base is None


def test_extract_features_follows_a_selection_and_leaves_no_gradient(files, model, processor):
    whole = extract_features(files, model, processor)
    part = extract_features(files.select([3, 1]), model, processor)
    assert np.abs(part - whole[[3, 1]]).max() <= EMBEDDING_TOLERANCE * np.abs(whole).max()
    assert extract_features(files.select([]), model, processor).shape == (0, 32)


def test_extract_features_skips_and_names_bad_rows(damaged, files, model, processor, caplog):
    with pytest.raises(ValueError, match=r"row 0\b.*text\.png"):
        extract_features(damaged, model, processor)
    with caplog.at_level(logging.WARNING):
        found = extract_features(damaged, model, processor, batch_size=5, on_error="skip")
    whole = extract_features(files, model, processor)
    assert np.abs(found - whole[GOOD_ROWS]).max() <= EMBEDDING_TOLERANCE * np.abs(whole).max()
    assert_reported(caplog)


def test_extract_features_refuses_an_iterable_dataset(files, model, processor):
    with pytest.raises(TypeError, match="needs a Dataset"):
        extract_features(files.to_iterable_dataset(), model, processor)


def test_encode_pictures_takes_one_or_many(pictures, paths, model, processor, expected):
    for given, count in ((pictures[0], 1), (pictures, 32), (paths[0], 1), (paths, 32), (png(pictures[0]), 1)):
        found = encode_pictures(model, processor, given)
        assert found.shape == (count, 32)
        assert np.abs(found - expected[1][:count]).max() <= EMBEDDING_TOLERANCE
