"""The page of learned codes beside what one would use instead, from what `tcq-hf evaluate` measures on three sets."""

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from page import BACKBONE, ROOT, data_folder

from tcq_hf.cli import main as tcq_hf
from tcq_hf.evaluation.report import markdown_table

PAGES = ROOT / "docs" / "benchmarks"
PICTURES = ("curves", "bits", "shares")

TEXT = """# Learned codes beside what one would use instead

`python tests/benchmarks/retrieval.py` wrote this page from what `tcq-hf evaluate` measured, all options at their
defaults; only the data, the bits and at last the codewords change, and no test query has chosen anything. Frozen
ViT-Ti/16 (ImageNet-21k then 1k, supervised), 224 px, three seeds. *tcq_hf, auto* is the default training. The rows
before it change one thing: *vanilla contrastive* has no filter and attracts own views, *fraction 0.1, own views* drops
a fixed share, *fraction X* drops other shares and attracts neighbours as the default does.

mAP@1000, hits within k, of the default training, with its difference to FAISS PQ at equal bits and the 95 % interval:

{summary}

{verdict}
The hits-in-k figures of PQ stand above those of the float features on every set: codes smooth.

The seconds hold for whatever else ran on the machine. When the default training changed last, of CIFAR-10 (I) it
alone was measured again; the other rows, which the change did not touch, are of an earlier run. The pictures of the
queries that fail most are written by the command; they are not shown here."""

SECTION = """## {title}

```text
{command}
```

{table}

{pictures}

{recipe}

All figures of each seed: [{stem}.json](retrieval/{stem}.json)."""


@dataclass(frozen=True)
class Benchmark:
    """One set: its title, folder in the data, protocol and further options; what its files are called beside that."""

    title: str
    folder: str
    protocol: str
    options: str
    bits: str = "16 32 64"
    suffix: str = ""

    @property
    def stem(self) -> str:
        return (self.folder if self.protocol == "labels" else self.protocol) + self.suffix

    def arguments(self, data: str) -> list[str]:
        """Arguments of the command for data of this name."""
        fixed = f"--protocol {self.protocol} --backbone {BACKBONE} --bits {self.bits} --seeds 3 {self.options}"
        return ["evaluate", "--dataset", data, *fixed.split()]


SHARES = "--shares 0 0.05 0.1 0.15 0.2"
SETS = (
    Benchmark("CIFAR-10 (II)", "cifar10", "cifar10-ii", SHARES),
    Benchmark("CIFAR-10 (I)", "cifar10", "cifar10-i", ""),
    Benchmark("Clothing photographs", "clothing", "labels", SHARES),
    Benchmark("CIFAR-10 (II), 16 codewords", "cifar10", "cifar10-ii", "--codebook-size 16", "32", "-16-codewords"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("retrieval-results"), metavar="DIR", help="of what was measured"
    )
    arguments = parser.parse_args()
    for one in SETS:
        folder = arguments.results / one.stem
        if not (folder / "results.md").is_file():
            weights = data_folder() / BACKBONE / "model.safetensors"
            given = one.arguments(str(data_folder() / one.folder))
            if tcq_hf([*given, "--weights", str(weights), "--output", str(folder)]):
                raise SystemExit(f"no figures of {one.title}")
        published(one, folder)
    found = {one: json.loads((PAGES / "retrieval" / f"{one.stem}.json").read_text("utf-8")) for one in SETS}
    bits = dict.fromkeys(f"{row['bits']} bits" for one in SETS for row in default(found[one]))
    columns = {"set": ""} | dict.fromkeys(bits, "")
    summary = [
        columns | {"set": one.title} | {f"{row['bits']} bits": figure(row) for row in default(found[one])}
        for one in SETS
    ]
    parts = [TEXT.format(summary=markdown_table(summary), verdict=verdict(found))]
    parts += [section(one, arguments.results / one.stem) for one in SETS]
    (PAGES / "retrieval.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def published(one: Benchmark, folder: Path) -> None:
    """Copy figures and pictures to the pages, without the folder that the data lay in."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["recipe"]["data"] = one.folder
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (PAGES / "retrieval" / f"{one.stem}.json").write_text(text, encoding="utf-8")
    for name in PICTURES:
        if (folder / f"{name}.png").is_file():
            shutil.copyfile(folder / f"{name}.png", PAGES / "retrieval" / f"{one.stem}-{name}.png")


def section(one: Benchmark, folder: Path) -> str:
    """Part of the page about one set."""
    _, table, *pictures, recipe = (folder / "results.md").read_text(encoding="utf-8").strip().split("\n\n")
    shown = [picture for picture in pictures if "](failures.png)" not in picture]
    words = ["tcq-hf", *one.arguments(one.folder)]
    cut = words.index("--bits")
    return SECTION.format(
        title=one.title,
        stem=one.stem,
        command=f"{' '.join(words[:cut])} \\\n    {' '.join(words[cut:])}",
        table=table,
        pictures=re.sub(r"\]\((\w+)\.png\)", rf"](retrieval/{one.stem}-\1.png)", "\n\n".join(shown)),
        recipe=re.sub(r"(?m)^- data: .*$", f"- data: {one.folder}", recipe),
    )


def default(results: dict) -> list[dict]:
    """Rows of the default training, by bits."""
    name = results["rows"][-1]["search_with"]
    return [row for row in results["rows"] if row["search_with"] == name]


def figure(row: dict) -> str:
    """mAP of a row and its difference to PQ, in words."""
    values, against = [run["map_published"] for run in row["runs"]], row["against_pq"]
    interval = f"{against['mean']:+.3f} [{against['low']:+.3f}, {against['high']:+.3f}]"
    return f"{fmean(values):.4f} ± {stdev(values):.4f}, {interval}"


def verdict(found: dict[Benchmark, dict]) -> str:
    """The best fixed share of each set that has a curve over shares, beside the default at its bits."""
    said = []
    for one, results in found.items():
        points = [row for row in results["rows"] if re.fullmatch(r"tcq_hf, fraction [\d.]+", row["search_with"])]
        if points:
            best = max(points, key=mean)
            (own,) = (row for row in default(results) if row["bits"] == best["bits"])
            share = best["search_with"].split()[-1]
            said.append(f"of {one.title} {share} with {mean(best):.4f} (default {mean(own):.4f})")
    return "The best fixed share at 32 bits, with neighbours, is that\n" + "\nand that ".join(said) + "."


def mean(row: dict) -> float:
    return fmean(run["map_published"] for run in row["runs"])


if __name__ == "__main__":
    main()
