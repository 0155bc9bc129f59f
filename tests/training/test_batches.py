"""batches: the order of an epoch, the same views whatever loads them, pictures that cannot be read, labels."""

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from tcq_hf import TCQImageProcessor
from tcq_hf.training.batches import EpochOrder, EvaluationViews, TrainingViews, as_batch, class_labels
from tcq_hf.training.views import _DRAWS, PRESETS, cut, draw_view

SIDE, SEED = 32, 7


@pytest.fixture
def views(dataset, processor):
    return TrainingViews(dataset, processor, "image", SIDE, PRESETS["photo"], SEED)


def loader(views, order, batch_size=6, num_workers=0, persistent=False):
    return torch.utils.data.DataLoader(
        views,
        batch_size=batch_size,
        sampler=order,
        collate_fn=as_batch,
        num_workers=num_workers,
        persistent_workers=persistent,
    )


def by_row(batches, keys, rows):
    """Crops `[rows, 2, C, S, S]` and draws `[rows, 2, draws]` of the batches of one epoch, in the order of the rows."""
    crops, draws = (
        torch.cat([torch.stack(batch[name].chunk(2), dim=1) for batch in batches]) for name in ("crops", "draws")
    )
    assert len(crops) == len(draws) == len(keys)
    place = torch.tensor(keys).remainder(rows).argsort()
    return crops[place].numpy(), draws[place].numpy()


def one_by_one(dataset, epoch, processor, seed=SEED):
    """What `by_row` must give, from one picture and one draw at a time."""
    draws = np.stack([[draw_view(seed, epoch, row, view) for view in (0, 1)] for row in range(len(dataset))])
    pictures = [processor.process_image(picture) for picture in dataset["image"]]
    crops = [
        [cut(picture, draw, PRESETS["photo"], SIDE) for draw in pair]
        for picture, pair in zip(pictures, draws, strict=True)
    ]
    return np.array(crops), draws


def test_a_partner_gives_the_picture_of_the_second_view(dataset, processor):
    """One partner is another row of the batch, one is outside of it, one is the row itself."""
    of = {0: 3, 3: 9, 5: 5}
    views = TrainingViews(dataset, processor, "image", SIDE, PRESETS["photo"], SEED, lambda epoch, row: of[row] + epoch)
    batch = views.__getitems__([len(dataset) + row for row in of])
    crops, draws = one_by_one(dataset, 1, processor)
    rows, seconds = list(of), [row + 1 for row in of.values()]
    assert batch["rows"].tolist() == rows
    np.testing.assert_array_equal(batch["crops"], np.concatenate([crops[rows, 0], crops[seconds, 1]]))
    np.testing.assert_array_equal(batch["draws"], np.concatenate([draws[rows, 0], draws[seconds, 1]]))


# --- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("epoch", [0, 1, 19])
def test_an_epoch_visits_every_row_once_and_its_keys_name_row_and_epoch(rows, epoch):
    order = EpochOrder(rows, seed=3)
    order.set_epoch(epoch)
    keys = list(order)
    assert len(order) == rows
    assert sorted(keys) == list(range(epoch * rows, (epoch + 1) * rows))
    assert all(type(key) is int for key in keys)


def test_the_order_depends_on_seed_and_epoch_alone():
    def keys(seed, epoch):
        order = EpochOrder(40, seed)
        order.set_epoch(5)
        list(order)  # an order that was read before leaves nothing behind
        order.set_epoch(epoch)
        return tuple(key % 40 for key in order)

    orders = {(seed, epoch): keys(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(keys(*place) == order for place, order in orders.items())
    assert tuple(range(40)) not in orders.values()


def test_every_row_comes_first_equally_often():
    order, epochs, rows = EpochOrder(4, seed=0), 2000, 4
    counts = np.zeros((rows, rows))
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for place, key in enumerate(order):
            counts[place, key % rows] += 1
    # Five deviations of a binomial share of 1/4.
    assert np.abs(counts / epochs - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / epochs)


# --- Views of a batch ------------------------------------------------------------------------------------------------


def test_rows_i_and_n_plus_i_are_the_views_of_image_i(views, dataset, processor):
    keys = [5, 0, 31, 32 + 5, 64 + 9]  # the last two of the epochs 1 and 2
    batch = views.__getitems__(keys)
    assert batch["crops"].shape == (10, 3, SIDE, SIDE)
    assert batch["crops"].dtype == torch.uint8
    assert batch["draws"].shape == (10, len(_DRAWS))
    assert batch["draws"].dtype == torch.float32
    pictures = dataset["image"][:]
    for i, (epoch, row) in enumerate([(0, 5), (0, 0), (0, 31), (1, 5), (2, 9)]):
        for place, view in ((i, 0), (5 + i, 1)):
            draw = draw_view(SEED, epoch, row, view)
            crop = cut(processor.process_image(pictures[row]), draw, PRESETS["photo"], SIDE)
            np.testing.assert_array_equal(batch["draws"][place], draw)
            np.testing.assert_array_equal(batch["crops"][place], crop)
    assert len({crop.numpy().tobytes() for crop in batch["crops"]}) == 10


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_views_are_the_same_whatever_loads_them(views, dataset, processor, batch_size, num_workers):
    order = EpochOrder(len(views), SEED)
    order.set_epoch(3)
    batches = list(loader(views, order, batch_size, num_workers))
    assert [len(batch["crops"]) // 2 for batch in batches] == [
        min(batch_size, 32 - start) for start in range(0, 32, batch_size)
    ]
    for found, expected in zip(by_row(batches, list(order), 32), one_by_one(dataset, 3, processor), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_persistent_workers_draw_anew_in_each_epoch(views, dataset, processor, num_workers):
    order = EpochOrder(len(views), SEED)
    batches = loader(views, order, 6, num_workers, persistent=True)
    draws = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        found = by_row(list(batches), list(order), 32)
        for values, expected in zip(found, one_by_one(dataset, epoch, processor), strict=True):
            np.testing.assert_array_equal(values, expected)
        draws.append(found[1])
    assert (draws[0] != draws[1]).any(axis=2).all()


def test_defect_9_two_workers_draw_differently_and_a_seed_reproduces_it(dataset, processor):
    def epoch_of(seed):
        np.random.seed(0)  # noqa: NPY002 the generator that MeCoQ shares among its workers
        torch.manual_seed(0)
        views = TrainingViews(dataset, processor, "image", SIDE, PRESETS["photo"], seed)
        order = EpochOrder(len(views), seed)
        return by_row(list(loader(views, order, 4, 2)), list(order), 32)

    crops, draws = epoch_of(1)
    # Batches go to the workers by turns; no draw of either is one of the other, nor of another batch.
    assert len({draw.tobytes() for draw in draws.reshape(64, -1)}) == 64
    for values, again in zip((crops, draws), epoch_of(1), strict=True):
        np.testing.assert_array_equal(values, again)
    assert (draws != epoch_of(2)[1]).any(axis=2).all()


def test_rows_keep_their_views_when_rows_are_added(views, dataset, processor):
    fewer = TrainingViews(dataset.select(range(10)), processor, "image", SIDE, PRESETS["photo"], SEED)
    for name, values in fewer.__getitems__(range(10)).items():
        assert torch.equal(values, views.__getitems__(range(10))[name])


def test_a_selection_is_numbered_by_its_own_rows(views, dataset, processor):
    chosen = TrainingViews(dataset.select([30, 2]), processor, "image", SIDE, PRESETS["photo"], SEED)
    batch = chosen.__getitems__([0])
    assert torch.equal(batch["draws"], views.__getitems__([0])["draws"])
    crop = cut(processor.process_image(dataset[30]["image"]), batch["draws"][0].numpy(), PRESETS["photo"], SIDE)
    np.testing.assert_array_equal(batch["crops"][0], crop)


def test_grey_pictures_have_one_channel(dataset):
    processor = TCQImageProcessor.from_backbone("vit_tiny_patch16_224", image_size=SIDE, num_channels=1)
    views = TrainingViews(dataset, processor, "image", SIDE, PRESETS["grey"], SEED)
    assert views.__getitems__([0, 1])["crops"].shape == (4, 1, SIDE, SIDE)


def test_several_threads_make_the_same_batch(views):
    expected, threads = views.__getitems__(range(9)), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = views.__getitems__(range(9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], expected[name]) for name in ("crops", "draws"))


# --- Pictures that cannot be read ------------------------------------------------------------------------------------


BAD = ["truncated.jpg", "text.png", "empty.png", "missing.png", None]


@pytest.fixture
def quick_exit(monkeypatch):
    # After an error torch does not tell the worker to end, waits so long and ends it.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)


@pytest.mark.usefixtures("quick_exit")
@pytest.mark.parametrize("kind", [TrainingViews, EvaluationViews])
@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in BAD), (BAD[0], 1), (BAD[3], 2)])
def test_a_bad_picture_names_row_and_path_in_a_worker_too(
    picture_folder, bad_files, processor, name, num_workers, kind
):
    paths = sorted(map(str, picture_folder.rglob("*.png")))[:12]
    paths[9] = bad_files[name] if name else None
    made = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    views = TrainingViews(made, processor, "image", SIDE, PRESETS["photo"], SEED)
    if kind is EvaluationViews:
        views = EvaluationViews(views, np.zeros(12, np.int64), with_view=False)
    batches = iter(loader(views, range(12), 4, num_workers))
    assert [len(next(batches)), len(next(batches))] == ([3, 3] if kind is TrainingViews else [2, 2])
    with pytest.raises(ValueError, match=r"cannot read the picture in row 9\b") as caught:
        next(batches)
    assert name is None or bad_files[name] in str(caught.value)
    if num_workers:
        batches._shutdown_workers()


def test_the_row_of_a_bad_picture_is_its_row_in_any_epoch(bad_files, processor):
    made = Dataset.from_dict({"image": [bad_files["text.png"]] * 5}).cast_column("image", Image())
    views = TrainingViews(made, processor, "image", SIDE, PRESETS["photo"], SEED)
    with pytest.raises(ValueError, match=r"row 3 \(.*text\.png\)"):
        views.__getitems__([4 * 5 + 3])


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluation_views(dataset, processor, with_view=True, seed=SEED):
    labels = class_labels(dataset, "label")
    views = TrainingViews(dataset, processor, "image", SIDE, PRESETS["photo"], seed)
    return EvaluationViews(views, labels, with_view)


def test_evaluation_sees_what_search_sees_and_one_fixed_view(dataset, processor):
    rows, pictures = [3, 31, 0], dataset["image"][:]
    batch = evaluation_views(dataset, processor).__getitems__(rows)
    expected = processor([pictures[row] for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [dataset[row]["label"] for row in rows]
    assert batch["crops"].shape == (3, 3, SIDE, SIDE)
    for i, row in enumerate(rows):
        draw = draw_view(SEED, 0, row, 0)
        np.testing.assert_array_equal(batch["draws"][i], draw)
        np.testing.assert_array_equal(
            batch["crops"][i], cut(processor.process_image(pictures[row]), draw, PRESETS["photo"], SIDE)
        )


def test_evaluation_without_the_view_has_no_crops(dataset, processor):
    views = evaluation_views(dataset, processor, with_view=False)
    batch = views.__getitems__([1, 2])
    assert set(batch) == {"pixel_values", "labels"}
    assert len(views) == 32


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 32])
def test_evaluation_is_the_same_whatever_loads_it(dataset, processor, batch_size, num_workers):
    views = evaluation_views(dataset, processor)
    whole = views.__getitems__(range(32))
    batches = list(loader(views, range(32), batch_size, num_workers))
    for name in ("pixel_values", "labels", "crops", "draws"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), whole[name])


# --- Labels ----------------------------------------------------------------------------------------------------------

LABELS = {
    "int64": Value("int64"),
    "uint8": Value("uint8"),
    "classes": ClassLabel(names=["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_come_as_they_are(kind):
    made = Dataset.from_dict({"label": [2, 0, 1, 2]}, features=Features({"label": LABELS[kind]}))
    found = class_labels(made, "label")
    assert found.dtype == np.int64
    assert found.tolist() == [2, 0, 1, 2]
    for fmt in ("numpy", "torch"):
        np.testing.assert_array_equal(class_labels(made.with_format(fmt), "label"), found)


@pytest.mark.parametrize("kind", LABELS)
def test_a_row_without_a_label_is_minus_one(kind):
    made = Dataset.from_dict({"label": [2, None, 1]}, features=Features({"label": LABELS[kind]}))
    assert class_labels(made, "label").tolist() == [2, -1, 1]
    assert class_labels(made.select([1, 0]), "label").tolist() == [-1, 2]


def test_without_the_column_nothing_has_a_label():
    found = class_labels(Dataset.from_dict({"image": ["a", "b", "c"]}), "label")
    assert found.dtype == np.int64
    assert found.tolist() == [-1, -1, -1]


def test_an_empty_dataset_has_no_labels():
    for made in (Dataset.from_dict({"label": []}), Dataset.from_dict({"image": []})):
        found = class_labels(made, "label")
        assert found.dtype == np.int64
        assert found.shape == (0,)


@pytest.mark.parametrize("values", [["cat", "dog"], [0.0, 1.0], [[0], [1]], [1.5, None]])
def test_labels_that_are_no_integers_are_refused_with_a_hint(values):
    made = Dataset.from_dict({"kind": values})
    with pytest.raises(TypeError, match="label column 'kind' must hold integers") as caught:
        class_labels(made, "kind")
    assert "dataset.class_encode_column('kind')" in str(caught.value)


def test_the_hint_works():
    made = Dataset.from_dict({"kind": ["cat", "dog", "cat"]}).class_encode_column("kind")
    assert class_labels(made, "kind").tolist() == [0, 1, 0]


def test_the_collator_hands_the_batch_on(views):
    batch = views.__getitems__([0, 1])
    assert as_batch(batch) is batch


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        list(EpochOrder(4, seed=-1))


def test_a_missing_column_is_refused(dataset, processor):
    with pytest.raises(ValueError, match="picture"):
        TrainingViews(dataset, processor, "picture", SIDE, PRESETS["photo"], SEED)


def test_a_picture_of_one_pixel_works(processor):
    made = Dataset.from_dict({"image": [PIL.Image.new("RGB", (1, 1), (200, 30, 40))]})
    batch = TrainingViews(made, processor, "image", SIDE, PRESETS["photo"], SEED).__getitems__([0])
    assert (batch["crops"] == torch.tensor([200, 30, 40])[:, None, None]).all()
