"""Every block of README and docs, run in order in a folder with pictures, offline, with weights in the Hub's cache."""

import contextlib
import re
import shlex
import sys
from pathlib import Path

import datasets
import faiss
import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
import timm
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file

from tcq_hf.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/fine-tuning.md",
    "docs/choosing-options.md",
    "docs/how-to.md",
    "docs/distributed.md",
    "docs/reranking.md",
]
# Run by .ci/run, once, as they stand there.
LEFT_TO_CI = ('pip install -e ".[demo]" && tcq-hf demo', 'pip install -e ".[test]" && pytest')
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """A Hub cache that holds ViT-Ti: the real weights where they are, else random ones under the same name."""
    from .conftest import data_folder

    repository = tmp_path_factory.mktemp("hub") / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    try:
        weights = data_folder() / "vit_tiny_patch16_224" / "model.safetensors"
        (snapshot / "model.safetensors").symlink_to(weights)
    except pytest.skip.Exception:
        save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), snapshot / "model.safetensors")
    return repository.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """260 small pictures in class folders and one more as query: real ones where they are, else drawn noise."""
    from .conftest import data_folder

    place = tmp_path_factory.mktemp("photos")
    try:
        test = datasets.load_dataset(str(data_folder() / "clothing"), split="test").shuffle(seed=0)
        pictures = [(test.features["label"].int2str(row["label"]), row["image"]) for row in test.select(range(261))]
    except pytest.skip.Exception:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (261, 48, 64, 3), dtype=np.uint8)
        pictures = [("ab"[i % 2], PIL.Image.fromarray(pixels)) for i, pixels in enumerate(noise)]
    for i, (label, picture) in enumerate(pictures[:260]):
        (place / "pictures" / label).mkdir(parents=True, exist_ok=True)
        picture.save(place / "pictures" / label / f"{i:03d}.jpg")
    pictures[260][1].save(place / "query.jpg")
    return place


@pytest.fixture
def _no_ray_left():
    """A block that fails does not leave Ray running for the tests that follow."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.usefixtures("_no_ray_left")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, hub_cache, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(photos / "pictures")
    (tmp_path / "query.jpg").symlink_to(photos / "query.jpg")
    names: dict = {}
    for language, title, text in BLOCK.findall((ROOT / page).read_text()):
        if language == "python":
            run_python(text, title, names)
        elif language == "bash":
            run_bash(text)
        else:
            assert language in ("bibtex", "text"), f"{page}: a block of {language} is not run by any test"


def run_python(text, title, names):
    expected = contextlib.nullcontext()
    if "needs a GPU" in title and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        expected = pytest.raises(RuntimeError, match="GPU")
    elif "needs the Hub" in title:
        expected = pytest.raises(OfflineModeIsEnabled)
    with expected:
        exec(compile(text, "<docs>", "exec"), names)


def run_bash(text):
    for line in text.replace("\\\n", " ").splitlines():
        if line not in LEFT_TO_CI:
            command, *arguments = shlex.split(line, comments=True)
            assert command == "tcq-hf", f"a test runs tcq-hf only, not {line}"
            assert main(arguments) == 0, line


def test_ci_runs_the_two_commands_of_the_readme():
    blocks = [
        text.strip() for language, _, text in BLOCK.findall((ROOT / "README.md").read_text()) if language == "bash"
    ]
    assert [text for text in blocks if text in LEFT_TO_CI] == list(LEFT_TO_CI)
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme '.[demo]'" in script
    assert "readme '.[test]'" in script


def test_readme_example_has_at_most_25_lines():
    first = next(text for language, _, text in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python")
    assert len(first.strip().splitlines()) <= 25


def test_commands_of_the_demo_page_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    page = (ROOT / "hub_assets" / "demo_page.html").read_text()
    blocks = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("tcq-hf")]
    assert len(commands) == 5
    for command in commands[1:]:
        assert command in readme


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
