"""`tcq-hf train`: what it trains and saves, against the Python interface; config files; resuming; bad input."""

import importlib.util
import json
import re
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import save_file

from tcq_hf import (
    FeatureCache,
    TCQImageProcessor,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    codes_array,
    encode_dataset,
    evaluate,
    extract_features,
    hub,
)
from tcq_hf.cli import main
from tcq_hf.cli.inputs import load_pictures, new_processor
from tcq_hf.index.code_cache import weights_digest

SHORT = ["--num-train-epochs", "2", "--per-device-train-batch-size", "8", "--use-cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, picture_folder, tiny_config, processor):
    """A folder with pictures, a saved tiny model and the weights of another backbone."""
    place = tmp_path_factory.mktemp("train")
    shutil.copytree(picture_folder, place / "pictures")
    torch.manual_seed(0)
    model = TCQModel(tiny_config)
    model.initialize(extract_features(load_pictures(str(place / "pictures")), model, processor))
    hub.save(model, processor, place / "model")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), place / "vit.safetensors")
    return place


@pytest.fixture
def going_on(place, tmp_path):
    """Words that train the saved model a little."""
    return [
        *("train", "--dataset", str(place / "pictures"), "--model", str(place / "model")),
        *("--output-dir", str(tmp_path / "out"), *SHORT),
    ]


@pytest.fixture
def fresh(place, tmp_path):
    """Words that train a new model a little."""
    return [
        *("train", "--dataset", str(place / "pictures"), "--backbone", "test_vit"),
        *("--weights", str(place / "vit.safetensors"), "--bits", "16", "--codebook-size", "16"),
        *("--embedding-dim", "32", "--output-dir", str(tmp_path / "out"), *SHORT),
    ]


def table(printed):
    """Rows of the printed figures by their first cell, as numbers by column."""
    lines = printed[printed.index("\ntraining") :].strip().splitlines()
    names = lines[0].replace(" strict", "-strict").replace("quantization error", "error").replace("view ", "view-")
    rows = [line.split() for line in lines[2:] if line.startswith(("before", "after "))]
    return {when: dict(zip(names.split()[1:], map(float, cells), strict=True)) for when, *cells in rows}


def weights(folder, part=""):
    return {name: values for name, values in TCQModel.from_pretrained(folder).state_dict().items() if part in name}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def figures(dataset, model, processor):
    """Each picture queries the others, from codes that the Python interface makes."""
    encoded = encode_dataset(dataset, model, processor, embeddings=True)
    codes, embeddings = codes_array(encoded), np.asarray(encoded["embedding"][:], dtype=np.float32)
    restored = model.codebooks()[np.arange(codes.shape[1]), codes].reshape(len(codes), -1)
    labels = np.asarray(dataset["label"][:])
    return evaluate(embeddings, restored, labels, labels, exclude_self=True, k=1000)


# --- What is trained -------------------------------------------------------------------------------------------------


def test_a_new_model_is_what_the_python_interface_trains(place, fresh, tmp_path, capsys):
    assert main(fresh) == 0
    printed = capsys.readouterr().out
    dataset = load_pictures(str(place / "pictures"))
    fields = {"embedding_dim": 32, "num_codebooks": 4, "codebook_size": 16}
    model = TCQModel.from_timm("test_vit", place / "vit.safetensors", **fields).freeze_backbone()
    processor = new_processor(model.config)
    cache = FeatureCache(dataset, model, processor)
    model.initialize(cache.features(), seed=0)
    before = figures(dataset, model, processor)
    arguments = TCQTrainingArguments(
        *(str(tmp_path / "by_hand"),), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, seed=0
    )
    TCQTrainer(model, arguments, cache).train()
    after = figures(dataset, model, processor)
    assert changed(model.state_dict(), weights(tmp_path / "out")) == set()
    assert "projection and codebooks start at PCA and k-means of 32 pictures" in printed
    assert re.search(r"found without labels: \d+, \d+, \d+ groups of 32 pictures, the largest with", printed)
    found = table(printed)
    for when, expected in (("before", before), ("after", after)):
        assert found[when]["mAP@31"] == pytest.approx(expected.map_published, abs=2e-3)
        assert found[when]["mAP@31-strict"] == pytest.approx(expected.map_strict, abs=2e-3)
        assert found[when]["P@10"] == pytest.approx(expected.precision[10], abs=2e-3)
    assert found["before"] != found["after"]
    for said in ("all 32 pictures trained on", "last step", "seed 0", "over the hits within k", "SHA-256"):
        assert said in printed


def test_the_next_command_and_the_saved_model_work(going_on, tmp_path, capsys, monkeypatch):
    assert main(going_on) == 0
    printed = capsys.readouterr().out
    (following,) = [line for line in printed.splitlines() if line.startswith("next: tcq-hf ")]
    monkeypatch.chdir(tmp_path)
    assert main(following.removeprefix("next: tcq-hf ").split()) == 0
    assert len(datasets.load_dataset("parquet", data_files="codes.parquet", split="train")) == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{table(printed)['after']['mAP@31']:.4f}" in card
    assert {"checkpoint-4", "checkpoint-8"} <= {path.name for path in (tmp_path / "out").iterdir()}
    # The card of a checkpoint shows no figure of another step.
    assert f"{table(printed)['before']['mAP@31']:.4f}" not in (tmp_path / "out/checkpoint-4/README.md").read_text()


def test_a_saved_model_is_not_started_anew(place, going_on, tmp_path, capsys):
    assert main([*going_on, "--learning-rate", "0"]) == 0
    assert "start at PCA" not in capsys.readouterr().out
    assert changed(weights(place / "model"), weights(tmp_path / "out")) == set()


HEADS = {"projection.weight", "projection.bias", "quantizer.codebooks"}


@pytest.mark.parametrize(("blocks", "parts"), [("0", ()), ("1", ("backbone.blocks.1.",)), ("-1", ("backbone.",))])
def test_the_last_blocks_are_trained(place, going_on, tmp_path, blocks, parts):
    options = ["--train-blocks", blocks, "--max-steps", "1", "--backbone-learning-rate", "0.01"]
    assert main([*going_on, *options]) == 0
    before = weights(place / "model")
    expected = HEADS | {name for name in before if name.startswith(tuple(parts))}
    assert changed(before, weights(tmp_path / "out")) == expected


def test_adapters_are_trained_and_saved_in_a_plain_model(place, going_on, tmp_path, capsys):
    words = [*going_on, "--lora", "2", "--backbone-learning-rate", "0.01"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    whole = weights(tmp_path / "out")
    linear = {
        f"backbone.blocks.{b}.{layer}.weight" for b in "01" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert changed(weights(place / "model"), whole) == HEADS | linear
    digest = weights_digest(TCQModel.from_pretrained(tmp_path / "out"))
    assert f"weights SHA-256 {digest[:12]}" in printed
    assert not (tmp_path / "out" / "adapters").exists()
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    assert main([*words, "--resume"]) == 0
    assert changed(whole, weights(tmp_path / "out")) == set()


def test_adapters_of_a_new_model(fresh, tmp_path, capsys):
    assert main([*fresh, "--lora", "2", "--loss-chunk-size", "3", "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "projection and codebooks start at PCA" in printed
    assert set(table(printed)) == {"before", "after"}


def test_adapters_without_peft_are_refused_before_anything_is_computed(going_on, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    monkeypatch.setattr("tcq_hf.cli.train._model", None)
    assert main([*going_on, "--lora", "2"]) == 1
    assert "pip install 'tcq_hf[peft]'" in capsys.readouterr().err


def test_several_cached_views(going_on, capsys):
    assert main([*going_on, "--cached-views", "3", "--max-steps", "2"]) == 0
    assert set(table(capsys.readouterr().out)["before"]) >= {"view-recall@1", "error", "mAP@31"}


def test_figures_come_from_the_pictures_asked_for(place, going_on, tmp_path, capsys):
    dataset = load_pictures(str(place / "pictures"))
    dataset.select(range(0, 32, 2)).to_parquet(str(tmp_path / "half.parquet"))
    (tmp_path / "two").mkdir()
    for name, rows in (("train", range(20)), ("test", range(20, 32))):
        dataset.select(rows).to_parquet(str(tmp_path / "two" / f"{name}-00000-of-00001.parquet"))
    going_on += ["--max-steps", "1"]
    assert main([*going_on, "--eval-dataset", str(tmp_path / "half.parquet")]) == 0
    assert "16 pictures of" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    asked = [*going_on, "--dataset", str(tmp_path / "two"), "--split", "train"]
    assert main([*asked, "--eval-split", "test", "--train-blocks", "1"]) == 0
    printed = capsys.readouterr().out
    assert "12 pictures of" in printed
    assert "--split train" in printed
    assert "mAP@11" in table(printed)["after"]


@pytest.mark.parametrize("drawn", [6, 1000])
def test_each_picture_runs_through_a_frozen_backbone_once(place, going_on, tmp_path, capsys, monkeypatch, drawn):
    shutil.copytree(place / "pictures", tmp_path / "pictures")  # no features of them are at hand
    seen, forward = [], TCQModel.get_image_features
    monkeypatch.setattr(
        TCQModel, "get_image_features", lambda model, pixels: seen.append(len(pixels)) or forward(model, pixels)
    )
    monkeypatch.setattr("tcq_hf.cli.train._EVALUATED_ROWS", drawn)
    assert main([*going_on, "--dataset", str(tmp_path / "pictures")]) == 0
    assert sum(seen) == 32
    said = "6 of the 32 pictures trained on, drawn with seed 0" if drawn == 6 else "all 32 pictures trained on"
    assert said in capsys.readouterr().out


def test_pictures_without_labels(place, going_on, tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in (place / "pictures").rglob("*.png"):
        shutil.copy(path, folder / path.name)
    assert main([*going_on, "--dataset", str(folder), "--max-steps", "1"]) == 0
    assert set(table(capsys.readouterr().out)["after"]) == {"quality", "error"}


# --- Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["0", "1"])
def test_a_resumed_run_ends_where_one_without_a_break_does(going_on, tmp_path, capsys, blocks):
    words = [*going_on, "--train-blocks", blocks]
    assert main(words) == 0
    whole = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert main(words) == 1
    assert "checkpoint-4: go on from it with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "going on from" in printed
    assert set(table(printed)) == {"after"}
    assert changed(whole, weights(tmp_path / "out")) == set()


def test_resuming_a_new_model_does_not_start_it_anew(fresh, tmp_path, capsys):
    assert main(fresh) == 0
    whole = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    capsys.readouterr()
    assert main([*fresh, "--resume"]) == 0
    assert "start at PCA" not in capsys.readouterr().out
    assert changed(whole, weights(tmp_path / "out")) == set()


# --- Config file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_config_file_gives_what_the_command_line_does_not(place, tmp_path, kind, capsys):
    options = {
        "dataset": str(place / "pictures"),
        "model": str(place / "model"),
        "output-dir": str(tmp_path / "from_file"),
        "save_strategy": "no",
        "learning_rate": 0.002,
        "max_steps": 1,
        "use_cpu": True,
        "resume": None,
        "per_device_train_batch_size": 8,
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "lr_scheduler_type": "cosine_with_restarts",
    }
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in options.items())
    # As people write it: YAML alone would make a text of 2e-3 and false of no.
    text = text.replace("0.002", "2e-3").replace('"no"', "no").replace("null", "")
    file = tmp_path / f"run.{kind}"
    file.write_text(text if kind == "yaml" else json.dumps(options))
    assert main(["train", str(file), "--output_dir", str(tmp_path / "out"), "--max-steps", "2"]) == 0
    assert not (tmp_path / "from_file").exists()
    trained = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (trained.learning_rate, trained.max_steps, trained.save_strategy) == (0.002, 2, "no")
    assert trained.lr_scheduler_kwargs == {"num_cycles": 1}
    assert (trained.seed, trained.temperature) == (0, 0.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "negative_shar: 0.2", "no option 'negative_shar'; did you mean 'negative_share'?"),
        ("run.json", '{"negativ-share": 0.2}', "did you mean 'negative_share'?"),
        ("run.yaml", "zzzz: 1", "no option 'zzzz'"),
        ("run.yaml", "a: [1", "is no YAML"),
        ("run.json", "{", "is no JSON"),
        ("run.yaml", "just words", "must hold options by name"),
        ("run.yaml", "", "must hold options by name"),
        ("run.txt", "bits: 8", "must end in .yaml, .yml or .json"),
    ],
)
def test_config_files_that_are_refused(going_on, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert main([going_on[0], str(tmp_path / name), *going_on[1:]]) == 1
    assert message in capsys.readouterr().err
    assert main([going_on[0], str(tmp_path / "absent.yaml"), *going_on[1:]]) == 1
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: many", "invalid int value: 'many'"),
        ("negative_filter: best", "invalid choice: 'best'"),
        ("bits: [8, 16]", "'16' is one"),
    ],
)
def test_values_of_a_config_file_have_types(going_on, tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([going_on[0], str(tmp_path / "run.yaml"), *going_on[1:]])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- Help and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_shows_our_options_and_help_all_the_rest(capsys, command):
    shown = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main([command, word])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    for text in shown:
        assert text.index("--dataset NAME") < text.index("--bits") < text.index("--learning-rate")
        for option in ("--backbone NAME", "--temperature X", "--negative-share X", "--help-all", "(default: 0.5)"):
            assert option in text
    assert "--adam-beta1" not in shown[0]
    assert "--adam-beta1" in shown[1]
    assert len(shown[0].splitlines()) < 200 < len(shown[1].splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--negative-filter", "best"], "invalid choice: 'best'"),
        (["--bits", "32"], "--model goes on with a saved model, --bits"),
        (["--train-blocks", "1", "--cached-views", "2"], "--cached-views is for a frozen backbone"),
        (["--lora", "4", "--cached-views", "2"], "--cached-views is for a frozen backbone"),
        (["--lora", "4", "--train-blocks", "1"], "--lora trains adapters instead of blocks"),
        (["--negative-shar", "0.2"], "unrecognized arguments: --negative-shar"),
    ],
)
def test_wrong_arguments_exit_with_2(going_on, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*going_on, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_dataset_and_output_are_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--bits", "8"])
    assert stop.value.code == 2
    assert "required: --dataset, --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "./nowhere"], "no folder or file ./nowhere"),
        (["--eval-dataset", "./nowhere"], "--eval-dataset: there is no folder or file ./nowhere"),
        (["--eval-dataset", "TWO"], "choose with --eval-split"),
        (["--model", "./no-model"], "no-model"),
        (["--image-column", "photo"], "no column 'photo'"),
        (["--negative-share", "2"], "negative_share must be at least 0 and below 1, got 2"),
        (["--output-dir", "FILE"], "--output-dir: cannot write into"),
        (["--train-blocks", "3"], "--train-blocks must be from -1 to 2"),
        (["--lora", "-1"], "rank must be at least 1, got -1"),
        (["--layer-decay", "1.5"], "layer_decay must be above 0 and at most 1, got 1.5"),
        (["--loss-chunk-size", "0"], "loss_chunk_size must be at least 1 picture"),
        (["--resume"], "there is no checkpoint in"),
        (["--per-device-train-batch-size", "64"], "fewer than one batch of 64"),
        (["--learning-rate", "1e38", "--max-grad-norm", "0"], "the loss is nan"),
    ],
)
def test_failures_exit_with_1_and_say_why(place, going_on, tmp_path, capsys, words, message):
    (tmp_path / "file").write_text("")
    for part in ("train", "test"):
        shutil.copytree(place / "pictures", tmp_path / "two" / part)
    names = {"FILE": str(tmp_path / "file"), "TWO": str(tmp_path / "two")}
    assert main([*going_on, *[names.get(word, word) for word in words]]) == 1
    error = capsys.readouterr().err
    assert "tcq-hf train: " in error
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "12"], "--bits must be a positive multiple of 8, got 12"),
        (["--bits", "16", "--codebook-size", "128"], "--bits must be a multiple of 7"),
        (["--codebook-size", "100"], "--codebook-size must be a power of two"),
        (["--codebook-size", "256"], "choose a smaller codebook_size"),
        (["--bits", "96"], "embedding_dim must be a positive multiple of num_codebooks=24"),
        (["--weights", "./absent.safetensors"], "no file absent.safetensors"),
        (["--backbone", "test_vitt"], "test_vit"),
    ],
)
def test_new_models_that_are_impossible(fresh, capsys, words, message):
    assert main([*fresh, *words]) == 1
    assert message in capsys.readouterr().err


def test_a_backbone_without_blocks_is_trained_whole_or_not_at_all(place, tmp_path, capsys):
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "resnet.safetensors")
    words = [
        *("train", "--dataset", str(place / "pictures"), "--backbone", "test_resnet", "--image-size", "64", *SHORT),
        *("--weights", str(tmp_path / "resnet.safetensors"), "--bits", "8", "--codebook-size", "16"),
        *("--output-dir", str(tmp_path / "out"), "--max-steps", "1"),
    ]
    assert main([*words, "--train-blocks", "1"]) == 1
    assert "the backbone 'test_resnet' has no 'blocks'; choose 0 (frozen) or -1" in capsys.readouterr().err
    assert main([*words, "--train-blocks", "-1"]) == 0


def test_labels_that_are_texts_are_refused_before_anything_is_computed(place, going_on, tmp_path, capsys, monkeypatch):
    dataset = load_pictures(str(place / "pictures"))
    texts = dataset.cast_column("label", datasets.Value("string"))
    texts.to_parquet(str(tmp_path / "texts.parquet"))
    monkeypatch.setattr("tcq_hf.cli.train.FeatureCache", None)
    assert main([*going_on, "--dataset", str(tmp_path / "texts.parquet")]) == 1
    assert "class_encode_column('label')" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named(place, going_on, tmp_path, capsys):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "even" / "02.png").write_text("no picture")
    for blocks in ("0", "1"):
        words = [*going_on, "--dataset", str(tmp_path / "pictures"), "--train-blocks", blocks]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "02.png" in error
        assert "Traceback" not in error


def test_saved_model_has_a_processor_of_its_own(place, going_on, tmp_path):
    assert main([*going_on, "--max-steps", "1"]) == 0
    one, other = (TCQImageProcessor.from_pretrained(folder) for folder in (place / "model", tmp_path / "out"))
    picture = PIL.Image.new("RGB", (50, 40), (10, 200, 90))
    assert torch.equal(*(each(picture, return_tensors="pt")["pixel_values"] for each in (one, other)))
