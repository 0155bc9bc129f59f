"""TCQTrainer: what is trained, logged, evaluated; resuming; the defects of published code; bad input."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import TrainerCallback

from tcq_hf import FeatureCache, TCQModel, TCQTrainer, encode_dataset, evaluate, load_index
from tcq_hf.training.batches import TrainingViews
from tcq_hf.training.losses import contrastive_loss, view_similarity
from tcq_hf.training.negatives import image_similarity, negative_filter
from tcq_hf.training.views import PRESETS, augment


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- Invariant 2: what can be trained is trained ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["soft", "cross"])
def test_invariant_2_one_step_changes_every_trainable_tensor(trainer, started, form):
    before = weights(started)
    trainer(max_steps=1, loss_form=form).train()
    assert changed(before, weights(started)) == set(dict(started.named_parameters()))


def test_invariant_2_a_frozen_backbone_does_not_change(trainer, started):
    before = weights(started.freeze_backbone())
    trainer(max_steps=2).train()
    assert changed(before, weights(started)) == {"projection.weight", "projection.bias", "quantizer.codebooks"}


def test_invariant_2_thawed_blocks_change_and_the_frozen_ones_do_not(trainer, started):
    started.freeze_backbone().backbone.blocks[-1:].requires_grad_(True)
    before = weights(started)
    trainer(max_steps=1).train()
    trained = {name for name, parameter in started.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone.blocks.1.") for name in trained)
    assert changed(before, weights(started)) == trained


# --- The loss of a step ----------------------------------------------------------------------------------------------


def test_the_logged_loss_is_the_loss_of_the_views(trainer, started, dataset, processor):
    start = copy.deepcopy(started)
    run = trainer(max_steps=1, negative_share=0.3, temperature=0.2)
    run.train()
    first = {k: v for k, v in run.state.log_history[0].items()}
    # The same step, by hand: order and draws are functions of the seed.
    order = np.random.default_rng((42, 0)).permutation(32)[:8]
    views = TrainingViews(dataset, processor, "image", 32, PRESETS["photo"], seed=42).__getitems__(order.tolist())
    pixels = augment(views["crops"], views["draws"], PRESETS["photo"], processor.image_mean, processor.image_std)
    with torch.no_grad():
        output = start(pixel_values=pixels)
        restored = start.quantizer.soft_reconstruct(output.assignments)
    similarity = view_similarity(restored, restored)
    drop = negative_filter("fraction", share=0.3)(image_similarity(similarity))
    expected = float(contrastive_loss(similarity, 0.2, drop).mean())
    # The Trainer rounds what it logs to no fewer than four digits; the rest is float32 in another batch order.
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert first["dropped_share"] == pytest.approx(2 / 7)
    assert 1 <= first["codebook_perplexity"] <= 16
    assert 0 < first["embedding_spread"] <= 1


def test_clipping_begins_at_its_epoch(trainer):
    run = trainer(num_train_epochs=2, clip_start=1.0, negative_share=0.3)
    run.train()
    shares = [entry["dropped_share"] for entry in run.state.log_history if "loss" in entry]
    assert shares == [0.0] * 4 + [pytest.approx(2 / 7)] * 4


def test_accumulated_gradients_keep_the_scale_of_the_loss(trainer, started):
    start = copy.deepcopy(started)
    single = trainer(max_steps=2, learning_rate=0.0, backbone_learning_rate=0.0)
    single.train()
    joined = trainer(
        model=start, max_steps=1, learning_rate=0.0, backbone_learning_rate=0.0, gradient_accumulation_steps=2
    )
    joined.train()
    losses = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
    assert joined.state.log_history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_training_lowers_the_loss_of_the_same_views(trainer, started, dataset, processor):
    cache = FeatureCache(dataset, started.freeze_backbone(), processor, views=3)
    run = trainer(
        train_dataset=cache,
        eval_dataset=cache,
        per_device_train_batch_size=32,
        num_train_epochs=200,
        learning_rate=1e-2,
        temperature=0.3,
        feature_dropout=0.1,
        logging_strategy="no",
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    assert after["eval_view_recall@1"] > before["eval_view_recall@1"]


def test_bf16_autocast_trains_in_a_float32_loss(trainer, started):
    before = weights(started)
    run = trainer(max_steps=1, bf16=True)
    run.train()
    assert math.isfinite(run.state.log_history[0]["loss"])
    assert changed(before, weights(started)) == set(dict(started.named_parameters()))
    assert {parameter.dtype for parameter in started.parameters()} == {torch.float32}


# --- Defects of published code (method.md, section 4) ----------------------------------------------------------------


def test_defect_1_the_codebooks_get_a_gradient_and_change(trainer, started):
    before = started.quantizer.codebooks.detach().clone()
    seen = []
    started.quantizer.codebooks.register_hook(lambda gradient: seen.append(gradient.norm().item()))
    trainer(max_steps=1, usage_weight=0.1, diversity_weight=0.1).train()
    assert seen
    assert min(seen) > 0
    moved = (started.quantizer.codebooks.detach() - before).norm(dim=-1)
    assert (moved > 0).all()


def test_defect_5_the_ratio_of_the_learning_rates_is_constant(trainer):
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    run = trainer(num_train_epochs=3, learning_rate=1e-3, backbone_learning_rate=2e-5, callbacks=[Watch()])
    run.train()
    inside = {id(p) for p in run.model.backbone.parameters()}
    backbone = [
        any(id(p) in inside for p in group["params"]) for group in run.optimizer.param_groups if group["params"]
    ]
    assert {True, False} == set(backbone)
    for step in rates[:-1]:  # the schedule ends at zero
        head, body = (
            {rate for rate, is_body in zip(step, backbone, strict=True) if is_body == which} for which in (False, True)
        )
        assert len(head) == len(body) == 1
        assert body.pop() / head.pop() == pytest.approx(0.02)


@pytest.mark.parametrize(("given", "expected"), [(None, 1e-5), (0.0, 0.0), (3e-4, 3e-4)])
def test_the_backbone_has_its_own_learning_rate(trainer, started, given, expected):
    run = trainer(learning_rate=1e-3, backbone_learning_rate=given)
    inside = {id(p) for p in started.backbone.parameters()}
    groups = run.create_optimizer().param_groups
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (expected if id(parameter) in inside else 1e-3)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, started.parameters()))


def test_codebooks_are_not_decayed(trainer, started):
    groups = trainer(weight_decay=0.1).create_optimizer().param_groups
    (group,) = [g for g in groups if any(p is started.quantizer.codebooks for p in g["params"])]
    assert group["weight_decay"] == 0.0


def test_defect_6_training_never_reads_what_it_is_not_given_to_evaluate_on(trainer, dataset):
    class Counting(datasets.Dataset):
        reads = 0

        def __getitem__(self, key):
            Counting.reads += 1
            return super().__getitem__(key)

    counted = Counting(dataset.data, dataset.info, dataset.split)
    trainer(eval_dataset=counted, num_train_epochs=2).train()
    assert Counting.reads == 0


def test_defect_8_a_frozen_backbone_gives_the_same_features_twice(tiny_config, processor, pictures):
    dropout = {**tiny_config.backbone_kwargs, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}
    config = copy.deepcopy(tiny_config)
    config.backbone_kwargs = dropout
    model = TCQModel(config)
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]

    def features():
        return model.train().get_image_features(pixel_values)

    assert not torch.equal(features(), features())
    model.freeze_backbone()
    assert torch.equal(features(), features())
    assert model.training
    assert model.quantizer.training
    assert not model.backbone.training


@pytest.mark.parametrize("batch", [2, 3, 7, 31, 32])
def test_defect_10_any_batch_size_works(trainer, batch):
    run = trainer(per_device_train_batch_size=batch, num_train_epochs=1, negative_share=0.0)
    assert run.train().global_step == 32 // batch


def test_defect_11_one_tensor_is_trained_exported_and_searched_with(trainer, started, processor, dataset):
    trainer(max_steps=2).train()
    pixel_values = processor(dataset[:8]["image"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = started.eval()(pixel_values=pixel_values)
    exported = started.codebooks()
    np.testing.assert_allclose(np.linalg.norm(exported, axis=-1), 1, atol=1e-6)
    tables = np.einsum("nmd,mkd->nmk", output.embeddings.numpy().reshape(8, 4, 8), exported)
    np.testing.assert_array_equal(tables.argmax(axis=2), output.codes)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_with_labels(trainer, dataset, started, processor):
    run = trainer(eval_dataset=dataset)
    metrics = run.evaluate()
    encoded = encode_dataset(dataset, started, processor, embeddings=True).with_format("numpy")
    embeddings, codes = np.float32(encoded["embedding"][:]), np.asarray(encoded["codes"][:])
    restored = started.codebooks()[np.arange(4), codes].reshape(32, -1)
    labels = np.asarray(dataset["label"][:])
    expected = evaluate(embeddings, restored, labels, labels, k=31, seed=42, exclude_self=True)
    assert metrics["eval_map"] == pytest.approx(expected.map_published, abs=1e-6)
    assert metrics["eval_map_strict"] == pytest.approx(expected.map_strict, abs=1e-6)
    assert metrics["eval_precision@10"] == pytest.approx(expected.precision[10], abs=1e-6)
    # The mean of 1 - <z, c> over sub-vectors.
    assert metrics["eval_quantization_error"] == pytest.approx(1 - (embeddings * restored).sum() / 32 / 4, abs=1e-5)
    assert {"eval_loss", "eval_view_recall@1"} <= set(metrics)
    # Fixed views: a second evaluation gives the same figures.
    again = run.evaluate()
    assert {k: v for k, v in again.items() if "second" not in k and "time" not in k} == {
        k: v for k, v in metrics.items() if "second" not in k and "time" not in k
    }


def test_evaluate_without_labels_gives_label_free_figures(trainer, dataset):
    metrics = trainer(eval_dataset=dataset.remove_columns("label")).evaluate()
    assert {"eval_loss", "eval_view_recall@1", "eval_quantization_error"} <= set(metrics)
    assert not [name for name in metrics if "map" in name or "precision" in name]


def test_rows_without_a_label_are_never_relevant(trainer, dataset):
    labels = [None if row % 4 == 0 else row % 2 for row in range(32)]
    marked = dataset.remove_columns("label").add_column("label", labels)
    assert 0 < trainer(eval_dataset=marked).evaluate()["eval_map"] <= 1


def test_evaluation_leaves_the_weights_and_the_training_mode(trainer, started, dataset):
    before = weights(started)
    trainer(
        eval_dataset=dataset, num_train_epochs=1, eval_strategy="epoch", learning_rate=0.0, backbone_learning_rate=0.0
    ).train()
    assert not changed(before, weights(started))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_last_batch_of_an_evaluation_may_be_short(trainer, dataset, count):
    run = trainer(
        eval_dataset=dataset.select(range(8 + count)),
        negative_filter="topk",
        negative_count=5,
        per_device_eval_batch_size=8,
    )
    metrics = run.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert len(run.predict(dataset.select(range(8 + count))).predictions[1]) == 8 + count


def test_several_evaluation_sets_by_name(trainer, dataset):
    metrics = trainer(eval_dataset={"all": dataset, "half": dataset.select(range(16))}).evaluate()
    assert {"eval_all_map", "eval_half_map"} <= set(metrics)


def test_predict_gives_embeddings_codes_labels_and_figures(trainer, started, dataset, processor):
    found = trainer().predict(dataset)
    embeddings, codes = found.predictions
    encoded = encode_dataset(dataset, started, processor, embeddings=True).with_format("numpy")
    np.testing.assert_array_equal(codes, encoded["codes"][:])
    np.testing.assert_allclose(embeddings, np.float32(encoded["embedding"][:]), atol=1e-5)
    np.testing.assert_array_equal(found.label_ids, dataset["label"][:])
    assert "test_map" in found.metrics
    assert "test_loss" not in found.metrics


def test_predict_without_labels(trainer, dataset):
    found = trainer().predict(dataset.remove_columns("label"))
    assert found.label_ids is None
    assert len(found.predictions) == 2


def test_the_users_own_metrics_are_taken(started, arguments, dataset, processor):
    run = TCQTrainer(
        started, arguments(), eval_dataset=dataset, processing_class=processor, compute_metrics=lambda _: {"mine": 7.0}
    )
    metrics = run.evaluate()
    assert metrics["eval_mine"] == 7.0
    assert "eval_map" not in metrics


# --- Saving, resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize("cached", [False, True])
def test_resumed_training_ends_at_the_weights_of_an_uninterrupted_run(
    trainer, started, dataset, processor, tmp_path, cached, stop, stop_at
):
    data = dataset
    if cached:
        data = FeatureCache(dataset, started.freeze_backbone(), processor, views=3)
    first, second = copy.deepcopy(started), copy.deepcopy(started)
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1000, "train_dataset": data}
    trainer(model=started, **options).train()
    # Four steps an epoch: the run stops inside an epoch, at its end, inside the next.
    trainer(model=first, callbacks=[stop_at(stop)], output_dir=str(tmp_path / "cut"), **options).train()
    resumed = trainer(model=second, output_dir=str(tmp_path / "cut"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert changed(weights(started), weights(second)) == set()


def test_defect_12_a_checkpoint_is_what_hub_save_writes(trainer, started, dataset, processor, tmp_path):
    from tcq_hf import hub

    run = trainer(num_train_epochs=1, save_strategy="epoch", eval_strategy="epoch", eval_dataset=dataset)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    own = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    saved = hub.save(started, processor, tmp_path / "saved")
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in saved.iterdir()} | own
    reloaded = TCQModel.from_pretrained(checkpoint)
    assert not changed(weights(started), weights(reloaded))
    for field in type(started.config).__annotations__:
        assert getattr(reloaded.config, field) == getattr(started.config, field)
    assert torch.load(checkpoint / "training_args.bin", weights_only=False).negative_filter == "fraction"
    assert load_index(checkpoint / "index.faiss", reloaded).ntotal == 0
    card = (checkpoint / "README.md").read_text()
    assert f"{run.state.log_history[-2]['eval_map']:.4f}" in card
    assert "fraction 0.1, own views, temperature" in card


def test_no_half_written_folder_is_left(trainer, tmp_path):
    trainer(num_train_epochs=2, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-6", "checkpoint-8"}


def test_the_best_checkpoint_is_kept_and_loaded(trainer, dataset, tmp_path, started):
    run = trainer(
        num_train_epochs=4,
        eval_dataset=dataset,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="map",
        greater_is_better=True,
        learning_rate=1e-2,
    )
    run.train()
    scores = {entry["step"]: entry["eval_map"] for entry in run.state.log_history if "eval_map" in entry}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert not changed(weights(TCQModel.from_pretrained(run.state.best_model_checkpoint)), weights(started))


def test_an_unwritable_checkpoint_keeps_the_previous_one(trainer, tmp_path, monkeypatch):
    run = trainer(num_train_epochs=2, save_strategy="epoch")
    write, calls = run._save_optimizer_and_scheduler, []

    def full_disk(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(folder)

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert not (tmp_path / "run" / "checkpoint-8").exists()
    TCQModel.from_pretrained(tmp_path / "run" / "checkpoint-4")


def test_push_to_hub_fails_offline_with_the_clients_own_error(trainer):
    run = trainer(hub_model_id="someone/model")
    with pytest.raises(OfflineModeIsEnabled):
        run.push_to_hub()


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_a_label_column_of_strings_is_refused_with_the_cure(trainer, dataset):
    named = dataset.remove_columns("label").add_column("label", ["a", "b"] * 16)
    with pytest.raises(TypeError, match=r"label column 'label' must hold integers.*class_encode_column\('label'\)"):
        trainer(eval_dataset=named).evaluate()
    cured = named.class_encode_column("label")
    assert "eval_map" in trainer(eval_dataset=cured).evaluate()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_pictures_than_a_batch_are_refused(trainer, dataset, count):
    with pytest.raises(ValueError, match=rf"train_dataset has {count} pictures, fewer than one batch of 8"):
        trainer(train_dataset=dataset.select(range(count)))


def test_a_batch_of_one_is_refused(trainer):
    with pytest.raises(ValueError, match=r"at least 2 images, got 1.*per_device_train_batch_size"):
        trainer(per_device_train_batch_size=1)


def test_a_filter_that_leaves_no_negative_is_refused_before_training(trainer):
    with pytest.raises(ValueError, match="drops 7 of 7 negatives of a batch of 8 images"):
        trainer(negative_filter="topk", negative_count=7)


def test_a_nan_loss_stops_training_and_keeps_the_last_checkpoint(trainer, started, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    model.projection.weight[0, 0] = math.nan

    run = trainer(num_train_epochs=3, save_strategy="steps", save_steps=4, callbacks=[Break()])
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 6: lower learning_rate"):
        run.train()
    reloaded = TCQModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(tensor.isfinite().all() for tensor in reloaded.state_dict().values())


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("train_dataset", [1, 2], TypeError, "train_dataset must be a datasets.Dataset or a FeatureCache, got list"),
        ("eval_dataset", "nothing", KeyError, "nothing"),
    ],
)
def test_other_kinds_of_datasets_are_refused(trainer, dataset, name, value, error, match):
    if name == "train_dataset":
        with pytest.raises(error, match=match):
            trainer(train_dataset=value)
    else:
        with pytest.raises(error, match=match):
            trainer(eval_dataset={"all": dataset}).evaluate(value)


def test_a_stream_is_refused(trainer, dataset):
    with pytest.raises(TypeError, match="got IterableDataset"):
        trainer(train_dataset=dataset.to_iterable_dataset())


def test_a_missing_column_is_named(trainer, dataset):
    with pytest.raises(ValueError, match=r"train_dataset has no column 'picture' \(image_column\)"):
        trainer(image_column="picture")


def test_a_feature_cache_needs_a_frozen_backbone(trainer, started, dataset, processor):
    cache = FeatureCache(dataset, started, processor)
    with pytest.raises(ValueError, match=r"model.freeze_backbone\(\) first"):
        trainer(train_dataset=cache)


def test_a_processor_is_needed(started, arguments, dataset):
    with pytest.raises(ValueError, match="processing_class must be the TCQImageProcessor"):
        TCQTrainer(started, arguments(), dataset)


def test_training_without_pictures_is_refused(trainer):
    run = trainer(train_dataset=None)
    with pytest.raises(ValueError, match="training needs a train_dataset"):
        run.train()
    with pytest.raises(ValueError, match="evaluation needs an eval_dataset"):
        run.evaluate()


def test_a_bad_picture_names_its_row_and_path(trainer, pictures, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(8)]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    (tmp_path / "3.png").write_text("no picture")
    broken = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"cannot read the picture in row 3 \(.*3\.png\)"):
        trainer(train_dataset=broken).train()
