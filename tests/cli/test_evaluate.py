"""`tcq-hf evaluate`: figures against the Python interface, the recipe beside them, what is refused."""

import json
import statistics

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import save_file

from tcq_hf import (
    FeatureCache,
    TCQModel,
    TCQTrainer,
    TCQTrainingArguments,
    codes_array,
    encode_dataset,
    evaluate,
    extract_features,
    hub,
)
from tcq_hf.cli import comparison, main, results
from tcq_hf.cli.inputs import load_splits, new_processor
from tcq_hf.evaluation import baselines
from tcq_hf.evaluation.protocols import by_labels
from tcq_hf.evaluation.significance import paired_bootstrap
from tcq_hf.index.code_cache import weights_digest

WORDS = ["--codebook-size", "16", "--embedding-dim", "32", "--num-train-epochs", "2", "--use-cpu"]
WORDS += ["--per-device-train-batch-size", "8", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config, processor):
    """A folder with pictures of three classes, a saved tiny model and the weights of a backbone."""
    place = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for i in range(90):
        pixels = rng.normal(100, 40, (24, 24, 3)) + 3 * np.eye(3)[i % 3]
        (place / "pictures" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(place / "pictures" / "abc"[i % 3] / f"{i:02d}.png")
    torch.manual_seed(0)
    model = TCQModel(tiny_config)
    model.initialize(extract_features(load_splits(str(place / "pictures"), "train"), model, processor))
    hub.save(model, processor, place / "model")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), place / "vit.safetensors")
    return place


@pytest.fixture(scope="module")
def training(place):
    """Words that train on the drawn pictures."""
    backbone = ["--backbone", "test_vit", "--weights", str(place / "vit.safetensors")]
    return ["evaluate", "--dataset", str(place / "pictures"), *backbone, *WORDS]


@pytest.fixture(scope="module")
def measuring(place):
    """Words that measure the saved model."""
    return ["evaluate", "--dataset", str(place / "pictures"), "--model", str(place / "model")]


@pytest.fixture(scope="module")
def trained(place, training):
    """Folder of a whole run."""
    options = ["--bits", "16", "8", "--seeds", "2", "--negative-share", "0.3", "--output", str(place / "trained")]
    options += ["--shares", "0", "0.2"]
    assert main([*training, *options]) == 0
    return place / "trained"


def read(folder):
    """The recipe, and rows by name and bits."""
    content = json.loads((folder / "results.json").read_text())
    return content["recipe"], {(row["search_with"], row["bits"]): row for row in content["rows"]}


def assert_figures(run, found):
    for name, value in found.to_dict().items():
        if name != "curve":
            assert run[name] == pytest.approx(value, abs=1e-6), name


# --- Training --------------------------------------------------------------------------------------------------------


def test_invariant_7_float_and_pq_stand_beside_every_learned_figure(trained):
    _, rows = read(trained)
    learned = ["tcq_hf, untrained start", "tcq_hf, vanilla contrastive", "tcq_hf, fraction 0.3, own views"]
    coded = ["PQ", "PQ, centred", "OPQ", "ITQ", "random projections", "random projections, selected", *learned]
    shares = {8: [], 16: ["tcq_hf, fraction 0", "tcq_hf, fraction 0.2"]}
    width = 32 * 64
    assert list(rows) == [
        *(("float cosine", width), ("float cosine, centred", width)),
        *((name, bits) for bits in (8, 16) for name in [*coded, *shares[bits], "tcq_hf, auto"]),
    ]
    for (name, _), row in rows.items():
        assert [run["seed"] for run in row["runs"]] == ([0] if "float" in name else [0, 1])
        assert all(run["seconds"] >= 0 for run in row["runs"])


def test_every_figure_is_that_of_the_python_interface(place, trained, tmp_path):
    _, rows = read(trained)
    split = by_labels(load_splits(str(place / "pictures")))
    fields = {"embedding_dim": 32, "codebook_size": 16}
    first = TCQModel.from_timm("test_vit", place / "vit.safetensors", **fields, num_codebooks=2)
    processor = new_processor(first.config)
    cache = FeatureCache(split.dataset, first, processor)
    features = cache.features()
    data = [features[each] for each in (split.queries, split.database, split.train)]
    labels = split.labels[split.queries], split.labels[split.database]

    def check(name, bits, seed, vectors):
        assert_figures(rows[name, bits]["runs"][seed], evaluate(*vectors, *labels, k=split.k, seed=seed))

    check("float cosine", 2048, 0, baselines.float_cosine(*data))
    check("float cosine, centred", 2048, 0, baselines.float_cosine(*data, centre=True))
    for bits in (8, 16):
        for seed in (0, 1):
            check("PQ", bits, seed, baselines.pq(*data, bits, 4, seed=seed))
            check("PQ, centred", bits, seed, baselines.pq(*data, bits, 4, centre=True, seed=seed))
            check("OPQ", bits, seed, baselines.opq(*data, bits, 4, seed=seed))
            check("ITQ", bits, seed, baselines.itq(*data, bits, seed=seed))
            check("random projections", bits, seed, baselines.random_projections(*data, bits, seed=seed))
            selected = baselines.selected_projections(*data, bits, seed=seed)
            check("random projections, selected", bits, seed, selected)
            model = TCQModel.from_timm("test_vit", place / "vit.safetensors", **fields, num_codebooks=bits // 4)
            model.freeze_backbone().initialize(data[2], seed=seed)
            check("tcq_hf, untrained start", bits, seed, searched(model, data))
            for name, chosen in LEARNED.items():
                if bits == 16 or name not in ("fraction 0", "fraction 0.2"):
                    model.initialize(data[2], seed=seed)
                    train(model, cache.select(split.train), tmp_path, seed, chosen)
                    check(f"tcq_hf, {name}", bits, seed, searched(model, data))


def searched(model, data):
    with torch.no_grad():
        outputs = [model.eval()(features=torch.from_numpy(rows)) for rows in data[:2]]
    return outputs[0].embeddings.numpy(), outputs[1].reconstruction.numpy()


LEARNED = {
    "vanilla contrastive": {"negative_filter": "none", "positives": "views"},
    "fraction 0.3, own views": {"negative_filter": "fraction", "negative_share": 0.3, "positives": "views"},
    "fraction 0": {"negative_filter": "none"},
    "fraction 0.2": {"negative_filter": "fraction", "negative_share": 0.2},
    "auto": {},
}


def train(model, cache, folder, seed, chosen):
    arguments = TCQTrainingArguments(
        *(str(folder),),
        **{"seed": seed, "learning_rate": 0.02, **chosen},
        **{"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "no"},
    )
    TCQTrainer(model, arguments, cache).train()


def test_invariant_6_the_recipe_stands_beside_the_figures(place, trained):
    recipe, _ = read(trained)
    split = by_labels(load_splits(str(place / "pictures")))
    assert {name: recipe[name] for name in split.recipe} == split.recipe
    backbone = TCQModel.from_timm("test_vit", place / "vit.safetensors").backbone
    assert recipe["backbone SHA-256"] == weights_digest(backbone)
    assert recipe["seeds"] == "0, 1"
    assert "last epoch" in recipe["model selection"]
    assert "may have seen labels" in recipe["pretraining"]
    for said in (
        "negative_share 0.3",
        "temperature 0.5",
        "negative_filter auto",
        "learning_rate 0.02",
        "num_train_epochs 2.0",
    ):
        assert said in recipe["training"]
    assert "hits within k" in recipe["mAP@81"]
    assert "min(k, relevant rows)" in recipe["mAP@81 strict"]
    assert float(recipe["chance"].split(",")[0]) == pytest.approx(1 / 3, abs=0.02)
    assert "faiss" in recipe["machine"].lower()
    page = (trained / "results.md").read_text()
    for name, value in recipe.items():
        assert f"- {name}: {value}\n" in page


def test_the_table_gives_mean_and_deviation_of_the_seeds(trained):
    _, rows = read(trained)
    page = (trained / "results.md").read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert lines[0][:6] == ["| search with", "bits", "mAP@81", "mAP@81 strict", "P@10", "R@10"]
    for (name, bits), row in rows.items():
        (line,) = [cells for cells in lines if cells[0] == f"| {name}" and cells[1] == str(bits)]
        for cell, figure in zip(line[2:6], ("map_published", "map_strict", "precision@10", "recall@10"), strict=True):
            values = [run[figure] for run in row["runs"]]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            assert cell == f"{statistics.mean(values):.4f}{spread}"
    for name in PICTURES:
        assert f"]({name})" in page
        assert PIL.Image.open(trained / name).width > 500


PICTURES = {"curves.png", "bits.png", "shares.png", "failures.png"}


def test_nothing_else_is_left_in_the_folder(trained):
    assert {path.name for path in trained.iterdir()} == {"results.json", "results.md", *PICTURES}


def test_the_difference_to_pq_has_the_interval_of_a_paired_bootstrap(place, trained):
    _, rows = read(trained)
    split = by_labels(load_splits(str(place / "pictures")))
    model = TCQModel.from_timm(
        "test_vit", place / "vit.safetensors", embedding_dim=32, codebook_size=16, num_codebooks=4
    )
    features = FeatureCache(split.dataset, model, new_processor(model.config)).features()
    data = [features[each] for each in (split.queries, split.database, split.train)]
    labels = split.labels[split.queries], split.labels[split.database]

    def precisions(method, *bits):
        runs = [evaluate(*method(*data, *bits, seed=seed), *labels, k=split.k, seed=seed) for seed in (0, 1)]
        return np.mean([run.average_precision for run in runs], axis=0)

    itq, pq = precisions(baselines.itq, 16), precisions(baselines.pq, 16, 4)
    expected = paired_bootstrap(itq, pq)
    assert rows["ITQ", 16]["against_pq"] == pytest.approx(vars(expected), abs=1e-9)
    assert "against_pq" not in rows["PQ", 16]
    assert "against_pq" not in rows["float cosine", 2048]
    (line,) = [line for line in (trained / "results.md").read_text().splitlines() if line.startswith("| ITQ | 16 ")]
    assert line.endswith(f"| {expected} |")


def test_features_are_computed_once(training, trained, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a second forward pass")

    monkeypatch.setattr(TCQModel, "get_image_features", refuse)
    options = ["--bits", "8", "--seeds", "1", "--without", "opq", "random", "--output", str(tmp_path)]
    assert main([*training, *options, "--negative-filter", "none"]) == 0
    recipe, rows = read(tmp_path)
    assert "left out: opq; random" in recipe["baselines"]
    names = [name for name, bits in rows if bits == 8]
    fixed = "tcq_hf, fraction 0.1, own views"
    before = ["PQ", "PQ, centred", "ITQ", "tcq_hf, untrained start", "tcq_hf, vanilla contrastive"]
    assert names == [*before, fixed, "tcq_hf, no filter"]
    # What was measured before comes out again.
    for name in before:
        assert rows[name, 8]["runs"] == [read(trained)[1][name, 8]["runs"][0] | {"seconds": pytest.approx(0, abs=60)}]
    printed = capsys.readouterr().out
    assert printed.index("PQ, centred ") < printed.index("search with")


def test_a_share_that_is_asked_for_is_a_point_of_the_curve_and_trained_once(training, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(results.report, "line_plot", lambda lines, path, *_, **__: drawn.update(lines))
    options = ["--bits", "8", "--seeds", "1", "--max-steps", "1", "--without", "opq", "itq", "random"]
    options += ["--negative-filter", "fraction", "--negative-share", "0.3", "--shares", "0.2", "0.3", "0.2"]
    assert main([*training, *options, "--output", str(tmp_path)]) == 0
    recipe, rows = read(tmp_path)
    assert [name for name, bits in rows if bits == 8][-3:] == [
        "tcq_hf, fraction 0.3, own views",
        "tcq_hf, fraction 0.2",
        "tcq_hf, fraction 0.3",
    ]
    points = [(share, rows[f"tcq_hf, fraction {share}", 8]["runs"][0]["map_published"]) for share in (0.2, 0.3)]
    assert drawn["tcq_hf, fixed share"] == [(*point, 0.0) for point in points]
    assert "vanilla contrastive: negative_filter none, positives views" in recipe["other training"]


def test_what_is_impossible_is_left_out_and_named(training, picture_folder, tmp_path):
    options = ["--dataset", str(picture_folder), "--bits", "32", "--seeds", "1", "--max-steps", "1"]
    assert main([*training, *options, "--output", str(tmp_path)]) == 0
    recipe, rows = read(tmp_path)
    assert "OPQ at 32 bits, which needs 64 rows to learn from and has 29" in recipe["baselines"]
    assert "ITQ at 32 bits, more than the 29 principal components" in recipe["baselines"]
    assert {name for name, bits in rows if bits == 32}.isdisjoint({"OPQ", "ITQ"})
    # Here FAISS works.
    features = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    assert comparison.impossible(*features.shape, 32, 4) == {}
    baselines.opq(features, features, features, 32, 4)
    baselines.itq(features, features, features, 32)


def test_several_cached_views_and_a_test_split(place, training, tmp_path):
    whole = load_splits(str(place / "pictures"), "train")
    (tmp_path / "two").mkdir()
    for name, rows in (("train", range(0, 90, 3)), ("test", range(1, 90, 6))):
        whole.select(rows).to_parquet(str(tmp_path / "two" / f"{name}-00000-of-00001.parquet"))
    options = ["--bits", "8", "--seeds", "1", "--without", "opq", "itq", "--output", str(tmp_path / "out")]
    options += ["--dataset", str(tmp_path / "two"), "--cached-views", "3", "--views", "small"]
    assert main([*training, *options]) == 0
    recipe, rows = read(tmp_path / "out")
    assert (recipe["queries"], recipe["database"], recipe["train"]) == (15, 30, 30)
    assert "cached_views 3" in recipe["model"]
    assert rows["tcq_hf, auto", 8]["runs"][0]["map_published"] > 0
    # One split alone has other queries.
    assert main([*training, *options, "--split", "train"]) == 0
    assert read(tmp_path / "out")[0]["queries"] == 3


# --- A saved model ---------------------------------------------------------------------------------------------------


def test_a_saved_model_gives_the_figures_of_its_codes(place, measuring, tmp_path, processor):
    assert main([*measuring, "--seeds", "1", "--without", "opq", "--output", str(tmp_path)]) == 0
    recipe, rows = read(tmp_path)
    model = TCQModel.from_pretrained(place / "model")
    split = by_labels(load_splits(str(place / "pictures")))
    encoded = encode_dataset(split.dataset, model, processor, embeddings=True)
    codes, embeddings = codes_array(encoded), np.asarray(encoded["embedding"][:], dtype=np.float32)
    restored = model.codebooks()[np.arange(4), codes].reshape(90, -1)
    labels = split.labels[split.queries], split.labels[split.database]
    for name, bits, database in (("tcq_hf, model", 16, restored), ("tcq_hf, model, float embedding", 1024, embeddings)):
        expected = evaluate(embeddings[split.queries], database[split.database], *labels, k=split.k)
        assert_figures(rows[name, bits]["runs"][0], expected)
    assert {("float cosine", 1024), ("PQ", 16), ("PQ, centred", 16)} <= set(rows)
    assert recipe["model SHA-256"] == weights_digest(model)
    assert "not known here" in recipe["model selection"]
    assert "training" not in recipe


def test_a_config_file(measuring, place, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {place / 'model'}\nseeds: 1\nwithout: [opq, itq]\noutput: nowhere\n")
    words = ["evaluate", str(tmp_path / "run.yaml"), "--dataset", str(place / "pictures"), "--output", str(tmp_path)]
    assert main(words) == 0
    assert {name for name, _ in read(tmp_path)[1]}.isdisjoint({"OPQ", "ITQ"})


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "give one of --model"),
        (["--seed", "3"], "--seed: set by evaluate itself; use --seeds"),
        (["--output-dir", "x", "--save-strategy", "no"], "--output-dir, --save-strategy: set by evaluate"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--shares", "0.1", "1"], "--shares must be at least 0 and below 1, got 1.0"),
        (["--protocol", "nonsense"], "invalid choice: 'nonsense'"),
        (["--without", "pq"], "invalid choice: 'pq'"),
        (["--negative-filter", "best"], "invalid choice: 'best'"),
    ],
)
def test_wrong_arguments_exit_with_2(training, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*training, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--bits", "16"], ["--temperature", "0.2"], ["--cached-views", "2"], ["--shares", "0"]]
)
def test_a_saved_model_takes_no_options_of_training(measuring, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main([*measuring, *words])
    assert stop.value.code == 2
    assert f"{words[0]} would be for one to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "./nowhere"], "no folder or file ./nowhere"),
        (["--dataset", "TEXTS"], "class_encode_column('label')"),
        (["--dataset", "TEXTS", "--label-column", "kind"], "label_column must be one of"),
        (["--protocol", "cifar10-ii"], "cifar10-ii needs a DatasetDict with the splits"),
        (["--bits", "8", "12"], "--bits must be a positive multiple of 8, got 12"),
        (["--bits", "8", "--codebook-size", "256"], "lower --codebook-size"),
        (["--bits", "48"], "embedding_dim must be a positive multiple of num_codebooks=12"),
        (["--per-device-train-batch-size", "96"], "fewer than one batch of 96"),
        (["--output", "FILE"], "--output: cannot write into"),
        (["--learning-rate", "1e38", "--max-grad-norm", "0", "--bits", "8", "--seeds", "1"], "the loss is nan"),
    ],
)
def test_failures_exit_with_1_and_say_why(place, training, tmp_path, capsys, words, message):
    (tmp_path / "file").write_text("")
    texts = load_splits(str(place / "pictures"), "train").cast_column("label", datasets.Value("string"))
    texts.to_parquet(str(tmp_path / "texts.parquet"))
    names = {"FILE": str(tmp_path / "file"), "TEXTS": str(tmp_path / "texts.parquet")}
    default = ["--output", str(tmp_path / "out"), "--without", "opq"]
    assert main([*training, *default, *[names.get(word, word) for word in words]]) == 1
    error = capsys.readouterr().err
    assert "tcq-hf evaluate: " in error
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_spread_of_one_value_and_of_several():
    assert comparison.spread([0.5]) == "0.5000"
    # Mean 2, sample variance ((1)^2 + 0 + (1)^2) / 2 = 1.
    assert comparison.spread([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000"


def test_saved_datasets_keep_their_splits(place, tmp_path):
    whole = load_splits(str(place / "pictures"), "train")
    saved = datasets.DatasetDict({"train": whole.select(range(20)), "test": whole.select(range(20, 32))})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert set(load_splits(str(tmp_path / "saved"))) == {"train", "test"}
    assert len(load_splits(str(tmp_path / "saved"), "test")) == 12
    with pytest.raises(ValueError, match="has no split 'other'"):
        load_splits(str(tmp_path / "saved"), "other")
