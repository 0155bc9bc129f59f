"""Suite-wide fixtures: a ViT of about 35k parameters, drawn pictures, the folder of real pictures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The processes of pytest-xdist share the cores.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)
# A cluster of one test on one machine; Ray would keep a token in the user's home, and `ray.init()` would join a cluster
# that another process of the suite has started.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ["RAY_ADDRESS"] = "local"
# Seconds without progress after which a test that hangs fails; Ray waits half an hour.
os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "120")

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from tcq_hf import TCQConfig, TCQImageProcessor, TCQModel

from .systems import status

TINY = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 32,
    "embedding_dim": 32,
    "num_codebooks": 4,
    "codebook_size": 16,
}


# Outcomes of the tests of each published system, by file.
_outcomes: dict[str, list[str]] = {}


def pytest_addoption(parser):
    parser.addoption(
        "--write-systems", action="store_true", help="write the table of docs/systems.md from the outcomes"
    )


def pytest_runtest_logreport(report):
    file = Path(report.location[0])
    if file.parent.name == status.TESTS.name and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(file.name, []).append(status.outcome(report))


def pytest_sessionfinish(session):
    """The table of docs/systems.md says what the tests say, or the run fails."""
    if hasattr(session.config, "workerinput") or not _ran_all_systems(session):
        return
    page = status.page_with(status.table(_outcomes))
    if session.config.option.write_systems:
        status.PAGE.write_text(page, encoding="utf-8")
    elif page != status.PAGE.read_text(encoding="utf-8"):
        print("\ndocs/systems.md does not say what the tests say: pytest tests/systems --write-systems")  # noqa: T201
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _ran_all_systems(session) -> bool:
    """Whether a run was of all tests of the systems, and went to its end: no other can tell."""
    options = session.config.option
    chosen = {Path(each).resolve() for each in session.config.args} & {status.TESTS, status.TESTS.parent}
    part = ("keyword", "markexpr", "deselect", "collectonly", "lf", "stepwise")
    ended = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    stopped = session.shouldstop or session.shouldfail or any(getattr(options, name, None) for name in part)
    return bool(chosen) and ended and not stopped


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the suite out of the user's datasets cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    """Where the package caches, of its own for a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "tcq_hf"


def data_folder() -> Path:
    """The folder of real pictures, or a skip that says why."""
    folder = Path(os.environ.get("TCQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real pictures: {folder} is absent, set TCQ_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def data() -> Path:
    return data_folder()


@pytest.fixture(scope="session")
def tiny_config() -> TCQConfig:
    return TCQConfig(**TINY)


@pytest.fixture
def model(tiny_config) -> TCQModel:
    """A tiny model whose projection and codebooks were fitted to random features; fresh for each test."""
    torch.manual_seed(0)
    made = TCQModel(tiny_config).eval()
    return made.initialize(torch.randn(400, 32, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def processor() -> TCQImageProcessor:
    return TCQImageProcessor.from_backbone("vit_tiny_patch16_224", image_size=32)


@pytest.fixture(scope="session")
def pictures() -> list[PIL.Image.Image]:
    """32 drawn pictures: coloured discs on gradients, all different."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :40]
    drawn = []
    for _ in range(32):
        centre, radius, colours = rng.uniform(8, 32, 2), rng.uniform(4, 14), rng.integers(0, 256, (2, 3))
        disc = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2)[..., None]
        ground = (y / 48)[..., None] * colours[0]
        drawn.append(PIL.Image.fromarray(np.where(disc, colours[1], ground).astype(np.uint8)))
    return drawn


@pytest.fixture(scope="session")
def picture_folder(pictures, tmp_path_factory) -> Path:
    """The drawn pictures as PNG files in two class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(pictures):
        (folder / ("even", "odd")[i % 2]).mkdir(exist_ok=True)
        picture.save(folder / ("even", "odd")[i % 2] / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory, pictures) -> dict[str, str]:
    """Files that are no pictures, by name; the last one is not there."""
    folder = tmp_path_factory.mktemp("bad")
    pictures[0].resize((400, 400)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").touch()
    # 400 million pixels in 50 kB: past twice Pillow's limit.
    PIL.Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 100_000
    names = ("truncated.jpg", "text.png", "empty.png", "bomb.png", "missing.png")
    return {name: str(folder / name) for name in names}


@pytest.fixture
def dataset(picture_folder) -> datasets.Dataset:
    """The drawn pictures as an imagefolder dataset with labels."""
    return datasets.load_dataset("imagefolder", data_dir=str(picture_folder), split="train")
