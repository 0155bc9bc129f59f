"""What the benchmarks share: where the data are, how a page is written, on what machine."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import faiss
import PIL
import timm
import torch
import transformers

from tcq_hf.evaluation.report import markdown_table, text_table

ROOT = Path(__file__).parents[2]
BACKBONE = "vit_tiny_patch16_224"


def data_folder() -> Path:
    """Folder of real pictures and weights, from TCQ_DATA."""
    folder = Path(os.environ.get("TCQ_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"no real pictures: {folder} is absent, set TCQ_DATA to their folder")
    return folder


def write_page(name: str, title: str, sections: Sequence[str | Sequence[Mapping]]) -> None:
    """Print the sections and write them to docs/benchmarks/NAME.md; a section is a paragraph or the rows of a table."""
    parts = [f"# {title}", f"`python tests/benchmarks/{name}.py` wrote this page. {machine()}"]
    for section in sections:
        print("\n" + (section if isinstance(section, str) else text_table(section)))
        parts.append(section if isinstance(section, str) else markdown_table(section))
    (ROOT / "docs" / "benchmarks" / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, threads and versions in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {"torch": torch, "timm": timm, "transformers": transformers, "datasets": datasets, "Pillow": PIL}
    listed = ", ".join(f"{package} {module.__version__}" for package, module in versions.items())
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"no GPU; Python {platform.python_version()}, {listed}, FAISS {faiss.__version__}."
    )
