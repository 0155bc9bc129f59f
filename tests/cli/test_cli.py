"""The command line, run in-process on real files."""

import json
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from tcq_hf import (
    TCQImageProcessor,
    TCQModel,
    add_code_index,
    encode_dataset,
    extract_features,
    hub,
    load_index,
    search,
)
from tcq_hf.cli import main
from tcq_hf.cli.inputs import label_name, load_pictures
from tcq_hf.index.segments import SegmentedIndex

COMMANDS = ("demo", "train", "encode", "index", "search", "evaluate")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, picture_folder, tiny_config, processor):
    """A folder with pictures, a saved model, codes and an index made by the command line itself."""
    place = tmp_path_factory.mktemp("cli")
    shutil.copytree(picture_folder, place / "pictures")
    torch.manual_seed(0)
    model = TCQModel(tiny_config)
    model.initialize(extract_features(load_pictures(str(place / "pictures")), model, processor))
    hub.save(model, processor, place / "model")
    assert main([*encode_command(place), "--output", str(place / "codes.parquet"), "--embeddings"]) == 0
    index = ["index", "--codes", str(place / "codes.parquet"), "--model", str(place / "model")]
    assert main([*index, "--output", str(place / "index.faiss")]) == 0
    return place


def encode_command(place):
    return ["encode", "--dataset", str(place / "pictures"), "--model", str(place / "model")]


def search_command(place):
    return ["search", "--dataset", str(place / "pictures"), "--model", str(place / "model"), "--k", "4"]


def found_in_python(place, query, left_out=()):
    """What the Python interface finds, with the same model."""
    model, processor = TCQModel.from_pretrained(place / "model"), TCQImageProcessor.from_pretrained(place / "model")
    dataset = load_pictures(str(place / "pictures"))
    dataset = dataset.add_column("number", range(len(dataset)))
    dataset = dataset.select([row for row in range(len(dataset)) if row not in left_out])
    dataset = add_code_index(encode_dataset(dataset, model, processor), "codes", model)
    return search(dataset, query, model, processor, k=4)


def table(printed):
    """Rows of a printed table as lists of cells."""
    return [line.split() for line in printed.splitlines() if line[:4].strip().isdigit()]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "examples:\n  tcq-hf" in capsys.readouterr().out


def test_commands_stand_in_the_order_of_use(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line.split()[0] in COMMANDS]
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["nonsense"],
        ["encode"],
        ["search", "--dataset", "x", "--model", "y"],
        ["demo", "--bits", "many"],
        ["train"],
        ["evaluate"],
    ],
)
def test_wrong_arguments_exit_with_2(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    assert "usage: tcq-hf" in capsys.readouterr().err


def test_encode_writes_codes_with_rows_and_the_other_columns(workplace):
    table = datasets.load_dataset("parquet", data_files=str(workplace / "codes.parquet"), split="train")
    assert set(table.column_names) == {"label", "row", "codes", "embedding"}
    assert table["row"][:] == list(range(32))
    assert table.features["codes"].length == 4


def test_encode_to_numpy_is_the_same(workplace, tmp_path):
    assert main([*encode_command(workplace), "--output", str(tmp_path / "codes.npy")]) == 0
    codes = np.load(tmp_path / "codes.npy")
    table = datasets.load_dataset("parquet", data_files=str(workplace / "codes.parquet"), split="train")
    np.testing.assert_array_equal(codes, np.asarray(table["codes"][:]))
    assert codes.dtype == np.uint8


def test_index_keeps_the_recipe(workplace):
    recipe = json.loads((workplace / "index.faiss.json").read_text())
    assert (recipe["count"], recipe["num_codebooks"], recipe["model"]) == (32, 4, str(workplace / "model"))


def test_a_fast_index_is_built_and_searched(workplace, tmp_path, capsys):
    made = ["--codes", str(workplace / "codes.parquet"), "--model", str(workplace / "model")]
    assert main(["index", *made, "--output", str(tmp_path / "fast.faiss"), "--mode", "fast"]) == 0
    assert re.search(r"^32 rows of 2 bytes in ", capsys.readouterr().out)
    asked = ["search", "--dataset", str(workplace / "pictures"), "--model", str(workplace / "model"), "--row", "9"]
    printed = []
    for index in (tmp_path / "fast.faiss", workplace / "index.faiss"):
        assert main([*asked, "--index", str(index)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_an_ivf_index_says_what_it_finds(workplace, tmp_path, capsys):
    made = ["--codes", str(workplace / "codes.parquet"), "--model", str(workplace / "model")]
    assert main(["index", *made, "--output", str(tmp_path / "ivf.faiss"), "--mode", "ivf"]) == 0
    said = re.search(r"^4 lists; the nearest \d of a query hold (\d\.\d+) of", capsys.readouterr().out, re.MULTILINE)
    assert float(said[1]) >= 0.95
    asked = ["search", "--dataset", str(workplace / "pictures"), "--model", str(workplace / "model"), "--row", "9"]
    assert main([*asked, "--index", str(tmp_path / "ivf.faiss"), "--k", "32"]) == 0
    found = re.findall(r"^\s*\d+ +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(map(int, found)) == list(range(32))


def test_codes_go_to_lance_with_their_columns(workplace, tmp_path, capsys):
    pytest.importorskip("lance", reason="pylance is not installed (extra [lance])")
    from tcq_hf.index.lance_index import LanceIndex

    made = ["index", "--codes", str(workplace / "codes.parquet"), "--model", str(workplace / "model")]
    assert main([*made, "--to", f"lance://{tmp_path}/codes.lance"]) == 0
    assert "32 rows of 2 bytes -> " in capsys.readouterr().out
    rows = datasets.load_dataset("parquet", data_files=str(workplace / "codes.parquet"), split="train")
    queries = np.float32(rows.with_format("numpy")["embedding"][:])
    index = LanceIndex(tmp_path / "codes.lance", TCQModel.from_pretrained(workplace / "model"))
    assert index.dataset.to_table(columns=["label"])["label"].to_pylist() == rows["label"][:]
    expected = load_index(workplace / "index.faiss").search(queries, 5)[0]
    np.testing.assert_allclose(index.search(queries, 5)[0], expected, atol=1e-5)
    for wrong, message in (
        (["--to", f"lance://{tmp_path}/codes.lance"], "there is a Lance dataset at"),
        (["--to", "s3://bucket/codes"], "--to must be lance://"),
        (["--to", f"lance://{tmp_path}/more.lance", "--mode", "fast"], "--mode, --append and --shards are for"),
    ):
        assert main([*made, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_search_is_filtered_by_a_column(workplace, capsys):
    asked = ["search", "--dataset", str(workplace / "pictures"), "--model", str(workplace / "model"), "--row", "1"]
    asked += ["--index", str(workplace / "index.faiss"), "--k", "5"]
    assert main([*asked, "--filter", "label=odd"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    assert len(lines) == 5
    assert all(" odd " in line for line in lines)
    assert main([*asked, "--filter", "label=odd", "--filter", "label=even"]) == 0
    for given, match in (("label=green", "no class 'green'"), ("tone=1", "no column 'tone'"), ("odd", "COLUMN=VALUE")):
        assert main([*asked, "--filter", given]) == 1
        assert match in capsys.readouterr().err


def test_a_folder_grows_and_is_searched(workplace, tmp_path, capsys):
    codes, living = np.load(_npy(workplace, tmp_path)), tmp_path / "living"
    made = ["index", "--model", str(workplace / "model"), "--output", str(living), "--append"]
    for name, part in (("first", codes[:20]), ("more", codes[20:])):
        np.save(tmp_path / f"{name}.npy", part)
        assert main([*made, "--codes", str(tmp_path / f"{name}.npy")]) == 0
    assert "12 rows, ids from 20; 32 in 2 segments" in capsys.readouterr().out
    asked = ["search", "--dataset", str(workplace / "pictures"), "--model", str(workplace / "model"), "--row", "9"]
    printed = []
    for index in (living, workplace / "index.faiss"):
        assert main([*asked, "--index", str(index)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    SegmentedIndex.open(living).remove([0, 9])
    assert main([*asked, "--index", str(living)]) == 1
    assert "--row 9 is not among the 30 rows" in capsys.readouterr().err
    assert main([*made, "--codes", str(tmp_path / "first.npy")]) == 0
    assert main([*asked, "--index", str(living)]) == 1
    assert "--index has id 51, but --dataset has 32 rows" in capsys.readouterr().err


def test_shards_are_equal_segments(workplace, tmp_path, capsys):
    made = ["index", "--model", str(workplace / "model"), "--codes", str(workplace / "codes.parquet")]
    assert main([*made, "--output", str(tmp_path / "shards"), "--shards", "4"]) == 0
    assert "32 rows, ids from 0; 32 in 4 segments" in capsys.readouterr().out
    assert [segment.rows for segment in SegmentedIndex.open(tmp_path / "shards").segments] == [8] * 4
    for extra, match in (
        (["--output", str(tmp_path / "shards"), "--shards", "2"], "shards; --append adds the codes to it"),
        (["--output", str(tmp_path / "none"), "--shards", "33"], "--shards 33 is more than the 32 rows"),
        (["--output", str(workplace / "index.faiss"), "--append"], "is a file; --append and --shards write a folder"),
        (["--output", str(tmp_path / "shards"), "--append", "--mode", "fast"], "--mode fast is for one file"),
    ):
        assert main([*made, *extra]) == 1
        assert match in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (np.zeros((3, 4)), "codes must be integers"),
        (np.zeros((3, 2), np.uint8), "shape [N, 4], got [3, 2]"),
        (np.full((3, 4), 16), "below codebook_size=16, got 16 in row 0"),
    ],
)
def test_codes_that_do_not_fit_make_no_folder(workplace, tmp_path, capsys, codes, match):
    np.save(tmp_path / "codes.npy", codes)
    made = ["index", "--model", str(workplace / "model"), "--codes", str(tmp_path / "codes.npy")]
    assert main([*made, "--output", str(tmp_path / "new"), "--append"]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def _npy(workplace, folder):
    table = datasets.load_dataset("parquet", data_files=str(workplace / "codes.parquet"), split="train")
    np.save(folder / "all.npy", np.array(table["codes"][:], dtype=np.uint8))
    return folder / "all.npy"


def test_search_agrees_whatever_the_codes_come_from(workplace, capsys):
    query = ["--query", str(workplace / "pictures" / "odd" / "05.png")]
    printed = []
    for source in ([], ["--codes", str(workplace / "codes.parquet")], ["--index", str(workplace / "index.faiss")]):
        assert main([*search_command(workplace), *source, *query]) == 0
        printed.append(table(capsys.readouterr().out))
    assert printed[0] == printed[1] == printed[2]
    assert len(printed[0]) == 4
    expected = found_in_python(workplace, str(workplace / "pictures" / "odd" / "05.png"))
    for (rank, row, score, similarity, label, file), (i, wanted) in zip(
        printed[0], enumerate(expected, 1), strict=True
    ):
        assert (int(rank), int(row)) == (i, wanted["row"])
        assert float(score) == pytest.approx(wanted["score"], abs=1e-4)
        assert float(similarity) == pytest.approx(wanted["similarity"], abs=1e-4)
        assert label == ("even", "odd")[wanted["label"]]
        assert file == wanted["image"].filename


def test_search_by_row_draws_a_grid(workplace, capsys, tmp_path):
    grid = tmp_path / "grid.png"
    assert main([*search_command(workplace), "--row", "3", "9", "--grid", str(grid)]) == 0
    printed = capsys.readouterr().out
    assert "row 3" in printed
    assert "row 9" in printed
    drawn = PIL.Image.open(grid)
    assert drawn.width > drawn.height > 200


def test_skipped_pictures_keep_the_row_numbers(workplace, tmp_path, capsys, caplog):
    folder = tmp_path / "pictures"
    shutil.copytree(workplace / "pictures", folder)
    (folder / "even" / "02.png").write_text("no picture at all")
    encode = ["encode", "--dataset", str(folder), "--model", str(workplace / "model")]
    codes = str(tmp_path / "codes.parquet")
    assert main([*encode, "--output", codes]) == 1
    assert "row 1" in capsys.readouterr().err
    assert main([*encode, "--output", codes, "--on-error", "skip"]) == 0
    assert "31 of 32 pictures" in capsys.readouterr().out
    assert "02.png" in caplog.text
    assert main([*encode, "--output", str(tmp_path / "codes.npy"), "--on-error", "skip"]) == 1
    assert "codes.npy cannot say which pictures were left out" in capsys.readouterr().err
    assert not (tmp_path / "codes.npy").exists()
    expected = found_in_python(workplace, 8, left_out=[1])
    made = ["index", "--codes", codes, "--model", str(workplace / "model"), "--output"]
    living, shards = str(tmp_path / "living"), str(tmp_path / "shards")
    assert main([*made, living, "--append"]) == main([*made, shards, "--shards", "3"]) == 0
    asked = ["search", "--dataset", str(folder), "--model", str(workplace / "model"), "--k", "4"]
    for source in (["--codes", codes], ["--on-error", "skip"], ["--index", living], ["--index", shards]):
        assert main([*asked, *source, "--row", "9"]) == 0
        assert [int(line[1]) for line in table(capsys.readouterr().out)] == [row["number"] for row in expected]
        assert main([*asked, *source, "--row", "1"]) == 1
        assert "--row 1" in capsys.readouterr().err
    assert main([*made, living, "--append"]) == 1
    assert "the row numbers of --codes are not 0 to 30" in capsys.readouterr().err
    index = str(tmp_path / "index.faiss")
    assert main([*made, index]) == 0
    assert main([*asked, "--index", index, "--row", "9"]) == 1
    assert "31 rows, the dataset 32" in capsys.readouterr().err


def test_datasets_of_every_kind(workplace, tmp_path, capsys, pictures):
    model = ["--model", str(workplace / "model")]
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, picture in enumerate(pictures[:5]):
        picture.save(flat / f"{i}.jpg")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(flat), split="train")
    loaded.save_to_disk(str(tmp_path / "saved"))
    loaded.to_parquet(str(tmp_path / "pictures.parquet"))
    (tmp_path / "repository" / "data").mkdir(parents=True)
    shutil.copy(tmp_path / "pictures.parquet", tmp_path / "repository" / "data" / "train-00000-of-00001.parquet")
    shutil.copy(tmp_path / "pictures.parquet", tmp_path / "repository" / "data" / "test-00000-of-00001.parquet")
    found = []
    for name in ("flat", "saved", "pictures.parquet"):
        assert main(["encode", "--dataset", str(tmp_path / name), *model, "--output", str(tmp_path / "c.npy")]) == 0
        found.append(np.load(tmp_path / "c.npy"))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    several = ["encode", "--dataset", str(tmp_path / "repository"), *model, "--output", str(tmp_path / "c.npy")]
    assert main(several) == 1
    assert "--split" in capsys.readouterr().err
    assert main([*several, "--split", "train+test"]) == 0
    assert len(np.load(tmp_path / "c.npy")) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "./nowhere"], "no folder or file ./nowhere"),
        (["--dataset", "EMPTY"], "is empty"),
        (["--dataset", "nobody/nothing"], "nobody/nothing"),
        (["--dataset", "PICTURES", "--image-column", "photo"], "no column 'photo'"),
        (["--dataset", "PICTURES", "--output", "codes.txt"], ".parquet or .npy"),
        (["--dataset", "PICTURES", "--model", "./no-model"], "no-model"),
        (["--dataset", "PICTURES", "--batch-size", "0"], "batch_size"),
        (["--dataset", "MODEL"], "MODEL"),
    ],
)
def test_failures_exit_with_1_and_say_why(workplace, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PICTURES": workplace / "pictures", "MODEL": workplace / "model"}
    arguments = [str(names.get(argument, argument)) for argument in arguments]
    defaults = ["--model", str(workplace / "model"), "--output", str(tmp_path / "codes.npy")]
    assert main(["encode", *defaults, *arguments]) == 1
    error = capsys.readouterr().err
    assert "tcq-hf encode: " in error.splitlines()[-1]
    assert str(names.get(message, message)) in error
    assert "Traceback" not in error


def test_new_model_needs_a_place_and_enough_pictures(workplace, tmp_path, capsys):
    encode = ["encode", "--dataset", str(workplace / "pictures"), "--backbone", "test_vit", "--output", "c.npy"]
    assert main(encode) == 1
    assert "--save-model" in capsys.readouterr().err
    assert main([*encode, "--save-model", str(tmp_path / "m"), "--bits", "12"]) == 1
    assert "--bits must be a positive multiple of 8, got 12" in capsys.readouterr().err


def test_index_of_another_model_is_refused(workplace, tmp_path, capsys, model, processor):
    hub.save(model, processor, tmp_path / "other")
    asked = ["search", "--dataset", str(workplace / "pictures"), "--model", str(tmp_path / "other"), "--row", "0"]
    assert main([*asked, "--index", str(workplace / "index.faiss")]) == 1
    assert "another model" in capsys.readouterr().err


def test_k_larger_than_the_index(workplace, capsys):
    assert main([*search_command(workplace), "--row", "0", "--k", "33"]) == 1
    assert "k must be from 1 to 32" in capsys.readouterr().err


def test_codes_of_another_model_are_refused(workplace, tmp_path, capsys, model, processor):
    hub.save(model, processor, tmp_path / "other")
    codes = ["--codes", str(workplace / "codes.parquet"), "--model", str(tmp_path / "other")]
    assert main(["index", *codes, "--output", str(tmp_path / "index.faiss")]) == 1
    assert "were made by another model" in capsys.readouterr().err
    assert main(["search", "--dataset", str(workplace / "pictures"), *codes, "--row", "0"]) == 1
    assert "were made by another model" in capsys.readouterr().err
    assert not (tmp_path / "index.faiss").exists()


def test_codes_of_a_folder_that_has_changed_are_refused(workplace, tmp_path, capsys, pictures):
    shutil.copytree(workplace / "pictures", tmp_path / "pictures")
    pictures[0].save(tmp_path / "pictures" / "even" / "000.png")
    asked = ["search", "--dataset", str(tmp_path / "pictures"), "--model", str(workplace / "model"), "--row", "0"]
    for refused in range(2):
        assert main([*asked, "--codes", str(workplace / "codes.parquet")]) == 1
        assert "those of other pictures (32 rows)" in capsys.readouterr().err
        assert main([*asked, "--index", str(workplace / "index.faiss")]) == 1
        assert "index.faiss is of other pictures" in capsys.readouterr().err
        if not refused:
            (tmp_path / "pictures" / "odd" / "31.png").unlink()  # as many rows as before, other files
    # An index of codes that no recipe goes with is taken on trust.
    shutil.copyfile(workplace / "codes.parquet", tmp_path / "codes.parquet")
    made = ["--codes", str(tmp_path / "codes.parquet"), "--model", str(workplace / "model")]
    assert main(["index", *made, "--output", str(tmp_path / "index.faiss")]) == 0
    assert main([*asked, "--index", str(tmp_path / "index.faiss")]) == 0


def test_parquet_of_paths_is_searched_and_drawn(workplace, tmp_path, capsys):
    files = sorted(str(path) for path in (workplace / "pictures").rglob("*.png"))
    datasets.Dataset.from_dict({"image": files}).to_parquet(str(tmp_path / "paths.parquet"))
    asked = ["search", "--dataset", str(tmp_path / "paths.parquet"), "--model", str(workplace / "model"), "--k", "3"]
    assert main([*asked, "--row", "4", "--grid", str(tmp_path / "grid.png")]) == 0
    assert len(table(capsys.readouterr().out)) == 3
    assert PIL.Image.open(tmp_path / "grid.png").width > 300


def test_query_that_cannot_be_read_is_named(workplace, tmp_path, capsys):
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("huge.png", "text.png"):
        assert main([*search_command(workplace), "--query", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert name in error
        assert "Traceback" not in error


def test_label_of_a_row_without_one_is_empty():
    assert [label_name(["a", "b"], label) for label in (0, 1, -1, None)] == ["a", "b", "", ""]


def test_without_faiss_the_pip_line_is_named():
    program = "import sys; sys.modules['faiss'] = None; from tcq_hf.cli import main; sys.exit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'tcq_hf[cpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": "m", "rows": 32, "files_sha256": "0"}'])
def test_a_damaged_recipe_of_codes_is_named(workplace, tmp_path, capsys, content):
    shutil.copy(workplace / "codes.parquet", tmp_path / "codes.parquet")
    (tmp_path / "codes.parquet.json").write_text(content)
    codes = ["--codes", str(tmp_path / "codes.parquet"), "--model", str(workplace / "model")]
    assert main(["index", *codes, "--output", str(tmp_path / "index.faiss")]) == 1
    assert "codes.parquet.json is damaged" in capsys.readouterr().err
