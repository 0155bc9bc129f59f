"""tcq-hf search --rerank, --graph and --fuse: the rankings of the Python interface, and what cannot be."""

import re

import PIL.Image
import pytest
import torch

from tcq_hf import (
    TCQImageProcessor,
    TCQModel,
    add_code_index,
    codes_array,
    encode_dataset,
    extract_features,
    hub,
    search,
)
from tcq_hf.cli import main
from tcq_hf.cli.inputs import load_pictures
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.index.faiss_index import build_index
from tcq_hf.rerank import Diffusion, Fusion, KNNGraph, KReciprocal, QueryExpansion, RankFlow


@pytest.fixture(scope="module")
def models(tmp_path_factory, picture_folder, tiny_config, processor):
    """Folders of two saved models."""
    folders, pictures = [], load_pictures(str(picture_folder))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = TCQModel(tiny_config)
        model.initialize(extract_features(pictures, model, processor), seed=seed)
        folders.append(tmp_path_factory.mktemp("model"))
        hub.save(model, processor, folders[-1])
    return folders


@pytest.fixture
def loaded(models, picture_folder):
    """The first model with its processor and the dataset with its index."""
    model, processor = TCQModel.from_pretrained(models[0]), TCQImageProcessor.from_pretrained(models[0])
    encoded = encode_dataset(load_pictures(str(picture_folder)), model, processor)
    return model, processor, add_code_index(encoded, "codes", model)


@pytest.fixture
def asked(models, picture_folder):
    return ["search", "--dataset", str(picture_folder), "--model", str(models[0]), "--k", "5", "--row", "9"]


def ranked(printed):
    """Rank, rank before, row and score of a printed table."""
    lines = re.findall(r"^\s*(\d+)\s+(\d+|> \d+)\s+(\d+)\s+(-?[\d.]+)\s", printed, re.MULTILINE)
    return [(int(rank), before, int(row), float(score)) for rank, before, row, score in lines]


@pytest.mark.parametrize(
    ("name", "reranker", "k"),
    [
        ("query-expansion", QueryExpansion(), 31),
        ("database-augmentation", QueryExpansion(database=True), 31),
        ("k-reciprocal", KReciprocal(), 31),
        ("diffusion", Diffusion(), 31),
        ("rank-flow", RankFlow(), 31),
    ],
)
def test_a_ranking_is_that_of_the_class(asked, loaded, capsys, name, reranker, k):
    assert main([*asked, "--rerank", name]) == 0
    model, processor, dataset = loaded
    reranker.fit(KNNGraph.from_index(dataset.get_index("codes").faiss_index, k))
    plain = [row["row"] for row in search(dataset, 9, model, processor, k=5)]
    found = ranked(capsys.readouterr().out)
    expected = search(dataset, 9, model, processor, k=5, rerank=reranker)
    assert [row for _, _, row, _ in found] == [row["row"] for row in expected]
    # Four digits are printed.
    assert [score for *_, score in found] == pytest.approx([row["score"] for row in expected], abs=6e-5)
    places = {row: str(rank) for rank, row in enumerate(plain, 1)}
    assert [before for _, before, _, _ in found] == [places.get(row["row"], "> 5") for row in expected]


def test_a_graph_is_kept_and_held_against_the_codes(asked, models, loaded, tmp_path, capsys):
    path = tmp_path / "graph.safetensors"
    reranked = [*asked, "--rerank", "query-expansion", "--graph", str(path)]
    assert main(reranked) == 0
    first, written = capsys.readouterr().out, path.stat().st_mtime_ns
    assert main(reranked) == 0
    assert (capsys.readouterr().out, path.stat().st_mtime_ns) == (first, written)
    graph = KNNGraph.load(path)
    assert (graph.neighbours == KNNGraph.from_index(loaded[2].get_index("codes").faiss_index, 31).neighbours).all()
    other = [str(models[1]) if part == str(models[0]) else part for part in reranked]
    assert main(other) == 1
    assert "is that of other codes; delete it or name another file" in capsys.readouterr().err


def test_a_graph_of_too_few_neighbours_is_refused(asked, loaded, tmp_path, capsys):
    path = str(tmp_path / "graph.safetensors")
    KNNGraph.from_index(loaded[2].get_index("codes").faiss_index, 10).save(path)
    assert main([*asked, "--rerank", "diffusion", "--graph", path]) == 1
    assert "holds 10 neighbours a row, --rerank diffusion needs 31" in capsys.readouterr().err


def test_lists_of_two_models_are_fused_and_drawn(asked, models, loaded, tmp_path, capsys):
    grid, single = tmp_path / "grid.png", tmp_path / "single.png"
    assert main([*asked, "--fuse", str(models[1]), "--grid", str(grid)]) == 0
    found = ranked(capsys.readouterr().out)
    model, processor, dataset = loaded
    other = TCQModel.from_pretrained(models[1])
    codes = codes_array(encode_dataset(dataset.select_columns(["image"]), other, processor))
    attach_index(dataset, build_index(other, codes), "other")
    fusion = Fusion({"other": (other, processor)})
    expected = search(dataset, 9, model, processor, k=5, index_name="codes", fuse=fusion)
    assert [row for _, _, row, _ in found] == [row["row"] for row in expected]
    # One line of pictures before, one after.
    assert main([*asked, "--grid", str(single)]) == 0
    assert PIL.Image.open(grid).height > 1.8 * PIL.Image.open(single).height


def test_both_go_together(asked, models, capsys):
    assert main([*asked, "--fuse", str(models[1]), "--rerank", "k-reciprocal"]) == 0
    assert len(ranked(capsys.readouterr().out)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph", "graph.safetensors"], "--graph is the file of the neighbours that --rerank needs"),
        (["--rerank", "k-reciprocal", "--filter", "label=odd"], "--filter cannot go with --rerank"),
    ],
)
def test_what_cannot_be_is_refused(asked, capsys, options, message):
    assert main([*asked, *options]) == 1
    assert message in capsys.readouterr().err
