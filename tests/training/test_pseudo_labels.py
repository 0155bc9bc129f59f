"""pseudo_labels: groups and neighbours against known ones, the masks that come of them, what a checkpoint keeps."""

import logging

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tcq_hf import FeatureCache, TCQModel, TCQTrainer
from tcq_hf.rerank.graph import KNNGraph
from tcq_hf.training import pseudo_labels
from tcq_hf.training.losses import contrastive_loss, view_similarity
from tcq_hf.training.negatives import drop_fraction, same_group
from tcq_hf.training.pseudo_labels import (
    Partners,
    PseudoLabelCallback,
    PseudoLabels,
    find_groups,
    find_pseudo_labels,
)

SIZES = (60, 40, 25, 15)


@pytest.fixture(scope="module")
def clumps():
    """Features of four groups of different sizes, far apart, and the group of each row, in random order."""
    generator = np.random.default_rng(0)
    truth = generator.permutation(np.repeat(range(4), SIZES))
    centres = 6 * np.eye(4, 16)
    return (centres[truth] + generator.standard_normal((140, 16)) * 0.5).astype(np.float32), truth


def same_partition(groups, truth):
    """Whether each of the partitions `[R, N]` is that of the truth `[N]`."""
    return all(
        len({*zip(each.tolist(), truth.tolist(), strict=True)}) == len({*each.tolist()}) == len({*truth.tolist()})
        for each in groups
    )


# --- Groups and neighbours -------------------------------------------------------------------------------------------


def test_groups_of_any_number_and_size_are_found(clumps):
    features, truth = clumps
    found = find_pseudo_labels(features)
    assert same_partition(found.groups, truth)
    assert all(np.bincount(groups).tolist() == list(SIZES) for groups in found.groups)
    same = truth[:, None] == truth
    assert found.share == pytest.approx((same.sum() - 140) / (140 * 139))


def test_scale_shift_and_order_change_nothing(clumps):
    features, truth = clumps
    order = np.random.default_rng(1).permutation(140)
    assert same_partition(find_pseudo_labels(3 * features[order] + 7, seed=5).groups, truth[order])


def test_neighbours_name_each_other(clumps):
    features, _ = clumps
    found = find_pseudo_labels(features)
    # 2 ln 140 = 9.9.
    lists = KNNGraph.build(features - features.mean(axis=0), 10).neighbours.tolist()
    draws = np.stack([found.partners(0, epoch) for epoch in range(300)])
    for row in range(140):
        expected = {other for other in lists[row] if row in lists[other]}
        assert {*found.neighbours[found.starts[row] : found.starts[row + 1]].tolist()} == expected
        drawn = {*draws[:, row].tolist()}
        # Each of at most 11 is missed by 300 draws with probability (10/11)^300 < 1e-12.
        assert drawn == expected | {row}


def test_a_partner_is_a_function_of_seed_epoch_and_row(clumps):
    found = find_pseudo_labels(clumps[0])
    draws = [[Partners(found, seed)(epoch, 3) for epoch in range(50)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    partners = Partners(found, 0)
    assert [partners(epoch, 3) for epoch in reversed(range(50))] == draws[0][::-1]
    np.testing.assert_array_equal([partners(4, row) for row in range(140)], found.partners(0, 4))


def test_a_picture_without_neighbours_is_its_own_partner():
    lone = PseudoLabels(np.zeros((1, 3), np.int64), np.array([0, 0, 1, 1]), np.array([0]))
    assert {tuple(lone.partners(0, epoch).tolist()) for epoch in range(40)} == {(0, 1, 2), (0, 0, 2)}


def test_pictures_beyond_the_graph_join_the_group_of_the_nearest(monkeypatch, clumps):
    features, truth = clumps
    monkeypatch.setattr(pseudo_labels, "_GRAPH_ROWS", 100)
    found = find_pseudo_labels(features)
    assert same_partition(found.groups, truth)
    inside = np.sort(np.random.default_rng(0).permutation(140)[:100])
    outside = np.setdiff1d(np.arange(140), inside)
    assert (np.diff(found.starts)[outside] == 0).all()
    assert {*found.neighbours.tolist()} <= {*inside.tolist()}


def test_equal_seeds_give_equal_labels_and_a_file_keeps_them(clumps, tmp_path):
    first, second = (find_pseudo_labels(clumps[0], seed=3) for _ in range(2))
    second.save(tmp_path)
    for again in (second, PseudoLabels.load(tmp_path)):
        for name in ("groups", "starts", "neighbours"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_what_was_found_is_logged(clumps, caplog):
    with caplog.at_level(logging.INFO, "tcq_hf"):
        find_pseudo_labels(clumps[0])
    # 2 ln 140 = 9.9; 60 of 140 pictures; the share is tested above.
    assert "in the graph of 10 neighbours of each picture: 4, 4, 4 groups of 140 pictures" in caplog.text
    assert "the largest with 42.9% of them: 30.4% of the negatives are taken for false ones" in caplog.text


def test_a_number_of_groups_is_k_means(clumps):
    features, _ = clumps
    assert len({*find_groups(features, 0, 7)[0].tolist()}) == 7
    (groups,) = find_groups(features, 0, 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[groups == group].sum(axis=0) for group in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    # Where k-means ends, each picture is in the group of the nearest mean direction.
    np.testing.assert_array_equal(np.argmax(unit @ means.T, axis=1), groups)


@pytest.mark.parametrize("features", [np.ones((2, 4), np.float32), np.ones(8, np.float32)])
def test_too_few_pictures_are_refused(features):
    with pytest.raises(ValueError, match="at least 3 pictures"):
        find_pseudo_labels(features)


def test_features_that_are_not_finite_are_refused(clumps):
    features = clumps[0].copy()
    features[17, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        find_pseudo_labels(features)


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_a_group_leaves_the_denominators_of_its_own():
    groups = [0, 1, 0, -1, -1, 0]
    expected = [[i != j and g == h >= 0 for j, h in enumerate(groups)] for i, g in enumerate(groups)]
    drop = same_group(torch.tensor(groups))
    assert drop.tolist() == expected


def test_the_share_is_the_mean_over_the_partitions():
    groups = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [-1, -1, -1, 0]])
    labels = PseudoLabels(groups, np.zeros(5, np.int64), np.empty(0, np.int64))
    assert labels.share == pytest.approx((3 / 6 + 2 / 6 + 0) / 3)
    assert str(labels).startswith("2, 2, 1 groups of 4 pictures, the largest with 75.0% of them: 27.8% of")


def test_coarser_partitions_have_larger_groups():
    """A ring of 30 clumps: modularity at a low resolution joins neighbouring ones (Fortunato and Barthelemy 2007)."""
    angles = np.repeat(np.arange(30) * 2 * np.pi / 30, 20) + np.random.default_rng(0).normal(0, 0.03, 600)
    found = find_pseudo_labels(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    numbers = [len(np.unique(groups)) for groups in found.groups]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1]


def test_steps_take_the_partitions_in_turn(trainer):
    made = trainer(negative_filter="auto")
    made.train()
    rows = torch.tensor([3, 1, 4])
    made._groups = torch.arange(3 * 32).reshape(3, 32)
    seen = []
    for made.state.global_step in range(5):
        seen.append(made._groups_of({"rows": rows}).tolist())
    assert seen == [[3, 1, 4], [35, 33, 36], [67, 65, 68], [3, 1, 4], [35, 33, 36]]


def test_the_logged_loss_leaves_the_groups_out(trainer, started, dataset):
    """One step from the loader of the trainer, against the loss with the mask of its groups."""
    made = trainer(negative_filter="auto", positives="neighbours")
    batch = next(iter(made.get_train_dataloader()))
    labels = find_pseudo_labels(made._training_features(), 42)
    model = made.core.train()
    loss = made.compute_loss(model, batch)
    with torch.no_grad():
        output = made._output(model, batch)
        restored = model.quantizer.soft_reconstruct(output.assignments)
        groups = labels.groups[0, batch["rows"]]
        drop = torch.tensor([[i != j and g == h for j, h in enumerate(groups)] for i, g in enumerate(groups)])
        expected = contrastive_loss(view_similarity(restored, restored), made.args.temperature, drop).mean()
    assert 0 < drop.sum() < drop.numel() - len(drop)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_neighbours_alone_drop_no_negative(trainer):
    made = trainer(negative_filter="none", positives="neighbours")
    made.train()
    assert all(log["dropped_share"] == 0 for log in made.state.log_history if "dropped_share" in log)
    assert len(made.pseudo_labels.neighbours)


def test_evaluation_drops_the_share_that_training_found(trainer, dataset):
    made = trainer(negative_filter="auto", eval_dataset=dataset)
    made.train()
    made.model.eval()
    batch = next(iter(made.get_eval_dataloader()))
    batch.pop("labels")
    with torch.no_grad():
        loss, output = made.compute_loss(made.model, batch, return_outputs=True)
        restored = made.core.quantizer.soft_reconstruct(output.assignments)
        similarity = view_similarity(restored, restored)
        count = len(similarity) // 2
        images = (similarity[:count, count:] + similarity[count:, :count]) / 2
        share = made.pseudo_labels.share
        expected = contrastive_loss(similarity, made.args.temperature, drop_fraction(images, share)).mean()
    assert 0 < share < 1
    torch.testing.assert_close(loss, expected)


def test_the_second_view_is_of_a_neighbour(trainer, dataset, processor, started):
    cache = FeatureCache(dataset, started.freeze_backbone(), processor)
    made = trainer(train_dataset=cache, positives="neighbours")
    features, seen = cache.features(), set()
    for epoch in range(20):
        loader = made.get_train_dataloader()
        made.callback_handler.callbacks[-1].order.set_epoch(epoch)
        for batch in loader:
            first, second = batch["features"].chunk(2)
            np.testing.assert_array_equal(first, features[batch["rows"]])
            for row, vector in zip(batch["rows"].tolist(), second.numpy(), strict=True):
                seen.add((row, int(np.flatnonzero((features == vector).all(axis=1))[0])))
    labels = made.pseudo_labels
    for row in range(len(features)):
        neighbours = {row, *labels.neighbours[labels.starts[row] : labels.starts[row + 1]].tolist()}
        assert {other for of, other in seen if of == row} <= neighbours
    assert len({pair for pair in seen if pair[0] != pair[1]}) > 20


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("step", [4, 6])  # the end of an epoch, the middle of one
def test_a_resumed_run_is_the_run(arguments, dataset, processor, tiny_config, stop_at, cached, step):
    """The groups of a checkpoint are taken up again: with a backbone that trains, features now would give others."""
    weights = []
    for folder, stops in (("whole", [None]), ("parts", [step, None])):
        for stop in stops:
            torch.manual_seed(0)
            model = TCQModel(tiny_config)
            if cached:
                model.freeze_backbone()
            data = FeatureCache(dataset, model, processor) if cached else dataset
            given = arguments(
                output_dir=str(arguments().output_dir) + folder,
                negative_filter="auto",
                positives="neighbours",
                num_train_epochs=3,
                backbone_learning_rate=1e-2,
            )
            made = TCQTrainer(model, given, data, None, processor, callbacks=[stop_at(stop)] if stop else None)
            made.add_callback(PseudoLabelCallback(made, every=1, warmup=1, clusters=4))
            made.train(resume_from_checkpoint=stop is None and len(stops) > 1)
        weights.append(made.core.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_groups_are_found_anew_every_few_epochs_after_the_warmup(trainer, dataset):
    made, seen = trainer(num_train_epochs=6), []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append(None if made._groups is None else made._groups.clone())

    made.add_callback(PseudoLabelCallback(made, every=2, warmup=1, clusters=3))
    made.add_callback(Look())
    made.train()
    assert seen[0] is None
    assert all(len(groups.unique()) == 3 for groups in seen[1:])
    assert seen[1] is seen[2] or torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], seen[4])
    dropped = [log["dropped_share"] for log in made.state.log_history if "dropped_share" in log]
    per_epoch = np.array(dropped).reshape(6, -1).mean(axis=1)
    assert per_epoch[0] == 0
    assert (per_epoch[1:] > 0.1).all()


@pytest.mark.parametrize("values", [{"every": 0}, {"warmup": -1}, {"clusters": 1}])
def test_an_impossible_schedule_is_refused(trainer, values):
    with pytest.raises(ValueError, match="every must be at least 1, warmup at least 0 and clusters at least 2"):
        PseudoLabelCallback(trainer(), **values)


def test_a_checkpoint_of_other_pictures_is_refused(trainer, dataset, tmp_path):
    options = {"negative_filter": "auto", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(**options).train()
    with pytest.raises(ValueError, match="has pseudo-labels of 32 pictures, train_dataset has 24"):
        trainer(train_dataset=dataset.select(range(24)), **options | {"max_steps": 3}).train(
            resume_from_checkpoint=True
        )
