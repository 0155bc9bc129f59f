"""The label-free quality: its definition, digits, the choice of a checkpoint, sets too small for it."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tcq_hf import TCQConfig, TCQModel
from tcq_hf.rerank.graph import KNNGraph, quality
from tcq_hf.training.figures import retrieval_figures


def figures_of(embeddings, labels=None, codes=None, codebooks=None):
    """Figures of embeddings, with codes that play no part unless they are given."""
    count, width = embeddings.shape
    codes = np.zeros((count, 1), np.uint8) if codes is None else codes
    codebooks = np.ones((1, 2, width), np.float32) if codebooks is None else codebooks
    return retrieval_figures((embeddings, codes), np.full(count, -1) if labels is None else labels, codebooks, seed=0)


@pytest.mark.parametrize(("count", "size"), [(60, 20), (40, 20), (24, 12), (4, 2)])
def test_quality_is_the_authority_of_neighbourhoods_of_20_rows_or_half_of_them(count, size):
    embeddings = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    found = figures_of(embeddings)["quality"]
    cosines = embeddings @ embeddings.T / np.outer(*[np.linalg.norm(embeddings, axis=1)] * 2)
    lists = [set(row[:size].tolist()) for row in np.argsort(-cosines, axis=1)]
    expected = sum(len(near & lists[i]) for near in lists for i in near) / (count * size**2)
    assert found == pytest.approx(expected, rel=1e-12)


def test_three_rows_have_no_quality():
    assert "quality" not in figures_of(np.eye(3, dtype=np.float32))


def test_quality_does_not_depend_on_codes_or_labels():
    embeddings = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    codes = np.random.default_rng(1).integers(0, 4, (50, 2)).astype(np.uint8)
    codebooks = np.random.default_rng(2).standard_normal((2, 4, 3)).astype(np.float32)
    others = figures_of(embeddings, np.arange(50) % 5, codes, codebooks)
    assert others["quality"] == figures_of(embeddings)["quality"] == quality(KNNGraph.build(embeddings, 19))
    assert "map" in others


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_started_model_is_better_than_a_random_one_with_and_without_labels(seed):
    """Digits that the start has not seen; groups and labels play no part in it."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    backbone = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
    config = TCQConfig(backbone="vit_tiny_patch16_224", backbone_kwargs=backbone, image_size=32, embedding_dim=32)
    torch.manual_seed(seed)
    model, found = TCQModel(config).eval(), []
    for start in (False, True):
        if start:
            model.initialize(pixels[900:], seed=seed)
        with torch.no_grad():
            output = model(features=pixels[:900])
        predictions = (output.embeddings.numpy(), output.codes.numpy())
        found.append(retrieval_figures(predictions, digits.target[:900], model.codebooks(), seed))
    random, started = found
    assert started["map"] > random["map"] + 0.1
    # Measured: .04 higher.
    assert started["quality"] > random["quality"] + 0.01


def test_a_collapsed_model_has_no_quality():
    spread = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    collapsed = figures_of(np.ones((400, 8), np.float32))["quality"]
    assert collapsed < 0.2 < figures_of(spread)["quality"]


def test_the_best_checkpoint_can_be_chosen_without_labels(trainer, dataset, tmp_path):
    run = trainer(
        num_train_epochs=4,
        eval_dataset=dataset.remove_columns("label"),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_quality",
        learning_rate=1e-2,
    )
    run.train()
    assert run.args.greater_is_better
    found = {entry["step"]: entry["eval_quality"] for entry in run.state.log_history if "eval_quality" in entry}
    best = max(found, key=lambda step: (found[step], -step))
    assert len(set(found.values())) > 1
    assert run.state.best_metric == found[best]
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
