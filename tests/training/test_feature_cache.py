"""feature_cache: features against one picture at a time; what is computed again and what is not; interruptions."""

import copy
import errno
import itertools
import math
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict, Image

from tcq_hf import TCQConfig, TCQImageProcessor, TCQModel, extract_features
from tcq_hf.training.feature_cache import EvaluationFeatures, FeatureCache, TrainingFeatures
from tcq_hf.training.views import PRESETS, ViewPreset, augment, cut, draw_view

# Other batch sizes sum in another order: a few float32 roundings, relative to the largest feature.
TOLERANCE = 1e-5


# A cache of its own for each test.
pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("tcq_hf.training.feature_cache.CHUNK_ROWS", 8)


@pytest.fixture
def one_stream():
    """Batches one after the other, so that a stop comes at the same batch every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forwards(model):
    """Rows of each forward pass of the backbone."""
    counts = []
    model.backbone.register_forward_hook(lambda _, __, output: counts.append(len(output)))
    return counts


@pytest.fixture
def paths(pictures, tmp_path):
    """Files of the drawn pictures that a test may change."""
    (tmp_path / "files").mkdir()
    found = [str(tmp_path / "files" / f"{i:02d}.png") for i in range(len(pictures))]
    for picture, path in zip(pictures, found, strict=True):
        picture.save(path)
    return found


def images(values):
    return Dataset.from_dict({"image": values}).cast_column("image", Image())


def one_by_one(dataset, model, processor, view, preset="photo", seed=0):
    """Features of one view of every picture, each in a forward pass of its own."""
    preset, side = PRESETS[preset], model.config.image_size
    mean, std = processor.image_mean, processor.image_std
    rows = []
    for row, picture in enumerate(dataset["image"]):
        if view:
            draw = draw_view(seed, view, row, 0)
            crop = torch.tensor(cut(processor.process_image(picture), draw, preset, side))
            pixel_values = augment(crop[None], torch.from_numpy(draw)[None], preset, mean, std)
        else:
            pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows.append(model.get_image_features(pixel_values)[0].numpy())
    return np.stack(rows)


def assert_close(found, expected):
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())


def files_of(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- Features --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_view_0_equals_extract_features(dataset, model, processor, batch_size):
    cache = FeatureCache(dataset, model, processor, views=2, batch_size=batch_size)
    np.testing.assert_array_equal(
        cache.features(), extract_features(dataset, model, processor, batch_size=batch_size, num_workers=0)
    )
    assert_close(cache.features(0), one_by_one(dataset, model, processor, 0))


@pytest.mark.parametrize("preset", ["photo", "small"])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_other_views_equal_cut_and_augment_one_by_one(dataset, model, processor, preset, batch_size):
    cache = FeatureCache(dataset, model, processor, views=3, preset=preset, seed=5, batch_size=batch_size)
    expected = [one_by_one(dataset, model, processor, view, preset, seed=5) for view in range(3)]
    for view in range(3):
        assert_close(cache.features(view), expected[view])
    for a, b in itertools.combinations(expected, 2):
        assert np.abs(a - b).max(axis=1).min() > 100 * TOLERANCE * np.abs(a).max(), "views must be told apart"


@pytest.mark.parametrize("chunk_rows", [1, 7, 31, 32, 33])
def test_chunks_join_without_a_seam(dataset, model, processor, monkeypatch, chunk_rows):
    whole = FeatureCache(dataset, model, processor, views=2)
    rows, views = [31, 0, 7, 6, 8, 7], [0, 1, 1, 0, 0, 0]
    expected = [whole.features(0), whole.features(1), whole.rows(rows, views).numpy()]
    monkeypatch.setattr("tcq_hf.training.feature_cache.CHUNK_ROWS", chunk_rows)
    parts = FeatureCache(dataset, model, processor, views=2, batch_size=5)
    for found, values in zip(
        [parts.features(0), parts.features(1), parts.rows(rows, views).numpy()], expected, strict=True
    ):
        assert_close(found, values)
    assert len(parts) == 32


def test_rows_are_the_given_view_of_each_given_row(dataset, model, processor):
    cache = FeatureCache(dataset, model, processor, views=2)
    found = cache.rows([3, 3, 0], [0, 1, 1])
    assert found.dtype == torch.float32
    for i, (row, view) in enumerate([(3, 0), (3, 1), (0, 1)]):
        np.testing.assert_array_equal(found[i], cache.features(view)[row])
    with pytest.raises(ValueError, match="zip"):
        cache.rows([1, 2], [0])


def test_the_features_stay_on_the_disk_and_what_is_handed_out_is_a_copy(dataset, model, processor):
    cache = FeatureCache(dataset, model, processor, views=2)
    assert all(isinstance(part, np.memmap) and part.mode == "r" for view in cache._parts for part in view)
    before = cache.features(1)
    assert not isinstance(before, np.memmap)
    changed, rows = cache.features(1), cache.rows([0], [1])
    changed[:] = 0
    rows[:] = 0
    np.testing.assert_array_equal(cache.features(1), before)


def test_several_streams_give_what_one_gives(dataset, model, processor, tmp_path, monkeypatch):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"streams{count}")
            cache = FeatureCache(dataset, model, processor, views=2, batch_size=5)
            found.append([cache.features(view) for view in (0, 1)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


def test_a_selection_and_an_empty_dataset(dataset, model, processor):
    whole = FeatureCache(dataset, model, processor).features()
    assert_close(FeatureCache(dataset.select([30, 2]), model, processor).features(), whole[[30, 2]])
    empty = FeatureCache(dataset.select([]), model, processor, views=2)
    assert len(empty) == 0
    assert empty.features(1).shape == (0, 32)


@pytest.mark.parametrize("chunk_rows", [7, 8192])
def test_chosen_rows_share_the_files(dataset, model, processor, forwards, monkeypatch, chunk_rows):
    monkeypatch.setattr("tcq_hf.training.feature_cache.CHUNK_ROWS", chunk_rows)
    whole = FeatureCache(dataset, model, processor, views=2)
    forwards.clear()
    rows = np.array([30, 2, 7, 6, 2])
    chosen = whole.select(rows)
    assert len(chosen) == 5
    assert chosen.dataset["label"][:] == [whole.dataset["label"][row] for row in rows]
    for view in (0, 1):
        np.testing.assert_array_equal(chosen.features(view), whole.features(view)[rows])
    np.testing.assert_array_equal(chosen.rows([4, 0], [1, 0]), whole.rows([2, 30], [1, 0]))
    # A choice of a choice counts in the choice; training draws from it as from any cache.
    np.testing.assert_array_equal(chosen.select([1, 0]).features(), whole.features()[[2, 30]])
    batch = TrainingFeatures(chosen, 0).__getitems__([5 + 3])["features"]
    assert sorted(map(tuple, batch.tolist())) == sorted(map(tuple, whole.rows([6, 6], [0, 1]).tolist()))
    assert forwards == []
    assert chosen._parts is whole._parts
    assert len(whole) == 32


def test_no_rows_and_wrong_rows_chosen(dataset, model, processor):
    whole = FeatureCache(dataset, model, processor)
    assert whole.select([]).features().shape == (0, 32)
    for wrong in ([32], [-1], [0.5], [[1]], [True, False]):
        with pytest.raises(ValueError, match="rows must be numbers from 0 to 31"):
            whole.select(wrong)


def test_grey_pictures(dataset, tiny_config):
    torch.manual_seed(0)
    model = TCQModel(TCQConfig(**{**tiny_config.to_dict(), "num_channels": 1})).eval()
    processor = TCQImageProcessor.from_backbone("vit_tiny_patch16_224", image_size=32, num_channels=1)
    cache = FeatureCache(dataset, model, processor, views=2, preset="grey")
    for view in (0, 1):
        assert_close(cache.features(view), one_by_one(dataset, model, processor, view, "grey"))


# --- What is computed again ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_an_equal_call_runs_no_forward_pass(dataset, model, processor, forwards):
    first = FeatureCache(dataset, model, processor, views=2, batch_size=6)
    assert sum(forwards) == 64
    forwards.clear()
    again = FeatureCache(dataset, model, processor, views=2, batch_size=9)
    assert forwards == []
    for view in (0, 1):
        np.testing.assert_array_equal(again.features(view), first.features(view))


def test_more_views_add_what_is_missing_and_fewer_nothing(dataset, model, processor, forwards):
    first = FeatureCache(dataset, model, processor).features()
    forwards.clear()
    three = FeatureCache(dataset, model, processor, views=3)
    assert sum(forwards) == 2 * 32
    np.testing.assert_array_equal(three.features(0), first)
    forwards.clear()
    two = FeatureCache(dataset, model, processor, views=2)
    assert forwards == []
    np.testing.assert_array_equal(two.features(1), three.features(1))


def changed_weights(model, **_):
    with torch.no_grad():
        model.backbone.norm.bias += 0.5


def changed_processor(arguments, processor, **_):
    arguments["processor"] = copy.deepcopy(processor)
    arguments["processor"].image_mean = [0.1, 0.2, 0.3]


def half_precision(model, **_):
    model.backbone.to(torch.bfloat16)


CHANGES = {
    "weights": (changed_weights, 64),
    "precision": (half_precision, 64),
    "processor": (changed_processor, 64),
    "data": (lambda arguments, dataset, **_: arguments.update(dataset=dataset.select(range(31, -1, -1))), 64),
    # The first view is the picture as search sees it, whatever preset and seed.
    "preset": (lambda arguments, **_: arguments.update(preset="grey"), 32),
    "a preset of one's own": (lambda arguments, **_: arguments.update(preset=ViewPreset(flip=0.5)), 32),
    "seed": (lambda arguments, **_: arguments.update(seed=1), 32),
    # Nothing that a feature depends on.
    "projection": (lambda model, **_: torch.nn.init.normal_(model.projection.weight), 0),
    "codebooks": (lambda model, **_: torch.nn.init.normal_(model.quantizer.codebooks), 0),
    "softmax_scale": (lambda model, **_: setattr(model.config, "softmax_scale", 3.0), 0),
    "training mode": (lambda model, **_: model.train(), 0),
    "frozen": (lambda model, **_: model.freeze_backbone(), 0),
    "preset by value": (lambda arguments, **_: arguments.update(preset=PRESETS["photo"]), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_holds_what_a_feature_depends_on_and_nothing_else(dataset, model, processor, forwards, change):
    arguments = {"dataset": dataset, "processor": processor}
    before = FeatureCache(model=model, views=2, **arguments)
    alter, expected = CHANGES[change]
    alter(model=model, arguments=arguments, dataset=dataset, processor=processor)
    forwards.clear()
    after = FeatureCache(model=model, views=2, **arguments)
    assert sum(forwards) == expected
    for view, differs in ((0, expected == 64), (1, expected > 0)):
        assert (np.abs(after.features(view) - before.features(view)).max() > 1e-3) == differs


def test_the_side_of_the_pictures_is_part_of_the_key(dataset, pictures):
    # A convolutional backbone has the same weights at any side.
    torch.manual_seed(0)
    model = TCQModel(TCQConfig(backbone="test_resnet", image_size=64, embedding_dim=32, num_codebooks=4)).eval()
    processor = TCQImageProcessor.from_backbone("test_resnet", image_size=64)
    few = dataset.select(range(3))
    before = FeatureCache(few, model, processor, views=2).features(1)
    model.config.image_size = 48
    with pytest.raises(ValueError, match=r"shape \[N, 3, 48, 48\]"):
        FeatureCache(few, model, processor, views=2)  # the features of side 64 are none of this model
    processor.crop_size = {"height": 48, "width": 48}
    after = FeatureCache(few, model, processor, views=2).features(1)
    assert np.abs(after - before).max() > 1e-3
    assert_close(after, one_by_one(few, model, processor, 1))


def test_pictures_that_are_no_files_are_told_apart(pictures, model, processor, forwards):
    first, second, again = (
        Dataset.from_dict({"image": given}).cast_column("image", Image())
        for given in (pictures[:6], pictures[6:12], pictures[:6])
    )
    features = [FeatureCache(given, model, processor).features() for given in (first, second, again)]
    assert sum(forwards) == 12
    np.testing.assert_array_equal(features[2], features[0])
    assert_close(features[1], one_by_one(second, model, processor, 0))


def test_a_changed_file_is_read_again(paths, pictures, model, processor, forwards):
    before = FeatureCache(images(paths), model, processor).features()
    shutil.copy(paths[5], paths[7])
    os.utime(paths[7], (1, 1))
    forwards.clear()
    after = FeatureCache(images(paths), model, processor).features()
    assert sum(forwards) == 32
    np.testing.assert_array_equal(after[7], after[5])
    assert_close(np.delete(after, 7, axis=0), np.delete(before, 7, axis=0))


# --- Interruptions ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A run that was stopped from outside."""


def stop_after(model, batches):
    """Let the backbone raise in the forward pass that follows so many."""
    left = [batches]

    def hook(*_):
        if not left[0]:
            raise Interrupted
        left[0] -= 1

    return model.backbone.register_forward_pre_hook(hook)


@pytest.mark.usefixtures("small_chunks", "one_stream")
@pytest.mark.parametrize("batches", [0, 1, 2, 7, 8, 9, 15])
def test_an_interrupted_run_goes_on_where_it_stopped(dataset, model, processor, cache_folder, forwards, batches):
    # Batches of 4 in parts of 8: two batches a part, four parts a view.
    arguments = {"views": 2, "batch_size": 4}
    stop = stop_after(model, batches)
    with pytest.raises(Interrupted):
        FeatureCache(dataset, model, processor, **arguments)
    stop.remove()
    assert len(files_of(cache_folder)) == batches // 2
    forwards.clear()
    cache = FeatureCache(dataset, model, processor, **arguments)
    assert sum(forwards) == 64 - 8 * (batches // 2)
    for view in (0, 1):
        assert_close(cache.features(view), one_by_one(dataset, model, processor, view))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_is_cut_off_leaves_no_file(dataset, model, processor, cache_folder, monkeypatch, forwards, error):
    save, calls = np.save, []

    def broken(file, values):
        calls.append(None)
        if len(calls) == 2:
            file.write(b"half of it")
            file.flush()
            raise error
        save(file, values)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", broken)
        with pytest.raises(type(error)) as caught:
            FeatureCache(dataset, model, processor, batch_size=8)
    assert isinstance(error, KeyboardInterrupt) or str(cache_folder) in str(caught.value)
    assert len(files_of(cache_folder)) == 1, "the first part and nothing beside it"
    forwards.clear()
    assert_close(FeatureCache(dataset, model, processor).features(), one_by_one(dataset, model, processor, 0))
    assert sum(forwards) == 24 + 32  # the three other parts, and the reference


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_keeps_its_training_mode(dataset, model, processor):
    model.freeze_backbone().train()
    assert len(set(modes(model))) == 2, "a frozen backbone in evaluation mode, the rest in training mode"
    before = modes(model)
    FeatureCache(dataset, model, processor)
    assert modes(model) == before
    stop_after(model, 1)
    with pytest.raises(Interrupted):
        FeatureCache(dataset, model, processor, seed=1, views=2, batch_size=4)
    assert modes(model) == before


def test_features_are_those_of_evaluation_mode_without_gradient(dataset, model, processor):
    expected = [one_by_one(dataset, model, processor, view) for view in (0, 1)]
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert np.abs(one_by_one(dataset, model, processor, 0) - expected[0]).max() > 0.1, "the dropout must do something"
    cache = FeatureCache(dataset, model, processor, views=2)
    for view in (0, 1):
        assert_close(cache.features(view), expected[view])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"views": -2}, "views must be at least 1, got -2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"preset": "photos"}, "preset must be one of photo, small, grey, got 'photos'"),
        ({"image_column": "picture"}, r"no column 'picture'; its columns are \['image', 'label'\]"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(dataset, model, processor, forwards, arguments, match):
    with pytest.raises(ValueError, match=match):
        FeatureCache(dataset, model, processor, **arguments)
    assert forwards == []


def test_other_kinds_of_datasets_are_refused_with_a_hint(dataset, model, processor):
    with pytest.raises(TypeError, match=r"got DatasetDict; choose a split, e\.g\. dataset\['train'\]"):
        FeatureCache(DatasetDict(train=dataset), model, processor)
    for other in (dataset.to_iterable_dataset(), ["a.png"]):
        with pytest.raises(TypeError, match=f"must be a datasets.Dataset, got {type(other).__name__}"):
            FeatureCache(other, model, processor)


@pytest.mark.usefixtures("small_chunks", "one_stream")
@pytest.mark.parametrize("kind", ["truncated", "text", "missing", None])
def test_an_unreadable_picture_names_row_and_path(paths, model, processor, tmp_path, cache_folder, kind):
    bad = kind and str(tmp_path / f"{kind}.png")
    if kind == "truncated":
        whole = Path(paths[19]).read_bytes()
        Path(bad).write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        Path(bad).write_text("this is no picture")
    with pytest.raises(ValueError, match=r"cannot read the picture in row 19\b") as caught:
        FeatureCache(images([*paths[:19], bad, *paths[20:]]), model, processor, views=2, batch_size=3)
    assert bad is None or bad in str(caught.value)
    assert len(files_of(cache_folder)) == 2, "rows 0 to 7 and 8 to 15"


@pytest.mark.usefixtures("small_chunks", "one_stream")
@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_name_the_row(dataset, model, processor, cache_folder, view, value):
    target = torch.from_numpy(one_by_one(dataset, model, processor, view)[21])

    def overflow(_, __, output):
        broken = output.clone()
        broken[torch.isclose(output, target, atol=1e-4).all(dim=1), 3] = value
        return broken

    model.backbone.register_forward_hook(overflow)
    with pytest.raises(ValueError, match="the features of row 21 are not finite"):
        FeatureCache(dataset, model, processor, views=2, batch_size=3)
    # Whole parts of view 0, or all four of them, then those of view 1: rows 0 to 7 and 8 to 15.
    assert len(files_of(cache_folder)) == 4 * view + 2


# --- Batches for training --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(dataset, model, processor):
    return FeatureCache(dataset, model, processor, views=3)


def test_a_partner_gives_the_picture_of_the_second_view(cache):
    only = cache.select(np.arange(10))
    only.views = 1
    batch = TrainingFeatures(only, 4, lambda epoch, row: (row + epoch) % 10).__getitems__([20, 23])
    np.testing.assert_array_equal(batch["features"], only.features()[[0, 3, 2, 5]])
    assert batch["rows"].tolist() == [0, 3]


def test_a_training_batch_holds_two_different_views_of_each_row(cache):
    features = np.stack([cache.features(view) for view in range(3)])
    rows = list(range(32))
    for epoch in (0, 1, 7):
        batch = TrainingFeatures(cache, 4).__getitems__([epoch * 32 + row for row in rows])
        assert set(batch) == {"features", "rows"}
        assert batch["features"].shape == (64, 32)
        assert batch["rows"].tolist() == rows
        chosen = [
            [view for view in range(3) if np.array_equal(features[view, row], batch["features"][place])]
            for place, row in enumerate([*rows, *rows])
        ]
        assert all(len(found) == 1 for found in chosen)
        assert all(chosen[row] != chosen[32 + row] for row in rows)


def test_the_choice_depends_on_seed_epoch_and_row_alone(cache):
    one = TrainingFeatures(cache, 4)
    together = one.__getitems__([70, 3, 40])["features"]
    for i, key in enumerate([70, 3, 40]):
        alone = TrainingFeatures(cache, 4).__getitems__([key])["features"]
        assert torch.equal(alone, together[[i, 3 + i]])
    keys = range(64)
    for other, given in ((TrainingFeatures(cache, 5), keys), (one, range(64, 128))):
        assert not torch.equal(other.__getitems__(given)["features"], one.__getitems__(keys)["features"])


def test_every_pair_of_views_is_drawn_equally_often(cache):
    count = 3000
    views, features = TrainingFeatures(cache, 0), np.stack([cache.features(view) for view in range(3)])
    batch = views.__getitems__(range(count))["features"].numpy().reshape(2, count, -1)
    rows = np.arange(count) % 32
    chosen = (batch[:, :, None] == features[:, rows].transpose(1, 0, 2)).all(axis=3).argmax(axis=2)
    pairs = {pair: float(np.mean((chosen.T == pair).all(axis=1))) for pair in itertools.permutations(range(3), 2)}
    # Six ordered pairs: five deviations of a binomial share of 1/6.
    assert all(abs(share - 1 / 6) < 5 * math.sqrt(5 / 36 / count) for share in pairs.values())
    assert sum(pairs.values()) == pytest.approx(1)


def test_of_one_view_both_are_that_one(dataset, model, processor):
    cache = FeatureCache(dataset, model, processor)
    batch = TrainingFeatures(cache, 0).__getitems__([5, 32 + 6])["features"]
    np.testing.assert_array_equal(batch, cache.features()[[5, 6, 5, 6]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_features_are_the_same_in_workers(cache, num_workers):
    views = TrainingFeatures(cache, 4)
    assert len(views) == 32
    batches = torch.utils.data.DataLoader(
        views, batch_size=7, sampler=range(64, 96), collate_fn=lambda batch: batch, num_workers=num_workers
    )
    for start, batch in zip(range(64, 96, 7), batches, strict=True):
        expected = views.__getitems__(range(start, min(start + 7, 96)))
        assert torch.equal(batch["features"], expected["features"])


# --- Batches for evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("with_view", [False, True])
def test_evaluation_gives_view_0_and_where_there_is_one_view_1(dataset, model, processor, views, with_view):
    cache = FeatureCache(dataset, model, processor, views=views)
    labels = np.arange(32) - 1
    batches, rows = EvaluationFeatures(cache, labels, with_view), [4, 31, 0]
    assert len(batches) == 32
    batch = batches.__getitems__(rows)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [3, 30, -1]
    expected = [cache.features(0)[rows]] + ([cache.features(1)[rows]] if with_view and views > 1 else [])
    np.testing.assert_array_equal(batch["features"], np.concatenate(expected))
    assert torch.equal(batches.__getitems__(range(32))["features"][rows], batch["features"][:3])


def test_a_picture_of_one_pixel_works(model, processor):
    made = Dataset.from_dict({"image": [PIL.Image.new("RGB", (1, 1), (200, 30, 40))]})
    assert np.isfinite(FeatureCache(made, model, processor, views=3).features(2)).all()
