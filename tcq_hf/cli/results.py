"""Figures of several ways of searching in, a folder with their table, their pictures and JSON out."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel

from tcq_hf.evaluation import report
from tcq_hf.evaluation.protocols import Split
from tcq_hf.evaluation.published import BACKBONE, PUBLISHED, SOURCES
from tcq_hf.evaluation.report import Cell
from tcq_hf.index.writing import written_aside

from .comparison import Measured

_REFERENCE, _DIFFERENCE = "PQ", "to PQ, 95 %"
# Queries in the picture of failures, rows that their precision counts, rows shown.
_FAILURES, _FOUND, _SHOWN = 6, 10, 8


def write(
    output: Path,
    title: str,
    measured: list[Measured],
    recipe: dict[str, Any],
    split: Split,
    picture: Callable[[int], PIL.Image.Image],
) -> None:
    """Print the table and write `results.md`, `results.json` and the pictures.

    Args:
        output: Folder.
        title: Of page and pictures.
        measured: All ways, the learned one that was asked for last.
        recipe: How the figures came about.
        split: Who queried whom.
        picture: Row of the dataset in, its picture out.
    """
    rows = _rows(measured, split.name)
    recipe |= _recipe(rows)
    print(f"\n{report.text_table(rows)}\n")
    print("\n".join(f"{name}: {value}" for name, value in recipe.items()))
    with written_aside(output / "results.json") as aside:
        content = {"recipe": recipe, "rows": [_to_dict(each, measured) for each in measured]}
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = _pictures(output, title, measured, split, picture)
    with written_aside(output / "results.md") as aside:
        listed = "\n".join(f"- {name}: {value}" for name, value in recipe.items())
        shown = "\n\n".join(f"![{text}]({name})" for name, text in pictures.items())
        text = f"# {title}\n\n{report.markdown_table(rows)}\n\n{shown}\n\n{listed}\n"
        aside.write_text(text, encoding="utf-8")
    print(f"\ntable -> {output / 'results.md'}, figures -> {output / 'results.json'}")


def _reference(one: Measured, measured: Iterable[Measured]) -> Measured | None:
    """PQ at the same bits, where it is another way."""
    same = (each for each in measured if each.way.name == _REFERENCE and each.way.bits == one.way.bits)
    return None if one.way.name == _REFERENCE else next(same, None)


def _rows(measured: list[Measured], protocol: str) -> list[dict[str, str]]:
    known, last = PUBLISHED.get(protocol, {}), measured[-1].way.name
    rows = []
    for each in measured:
        reference = _reference(each, measured)
        difference = "" if reference is None else str(each.against(reference))
        row = each.row() | {_DIFFERENCE: difference}
        if known:
            found = known.get(each.way.bits, {}) if each.way.name == last else {}
            row[f"published, {BACKBONE}"] = ", ".join(f"{name} {figure:.4f}" for name, figure in found.items())
        rows.append(row)
    return rows


def _recipe(rows: list[dict[str, str]]) -> dict[str, str]:
    about = {
        _DIFFERENCE: f"difference of mAP to {_REFERENCE} at equal bits, with the 95 % interval of a "
        "paired bootstrap over the queries (10,000 draws); over several seeds each query has its mean"
    }
    if f"published, {BACKBONE}" in rows[0]:
        about[f"published, {BACKBONE}"] = f"with another backbone, to be read beside, not against: {SOURCES}"
    return about


def _to_dict(each: Measured, measured: list[Measured]) -> dict[str, Any]:
    reference = _reference(each, measured)
    return each.to_dict() | ({} if reference is None else {"against_pq": vars(each.against(reference))})


def _pictures(
    output: Path,
    title: str,
    measured: list[Measured],
    split: Split,
    picture: Callable[[int], PIL.Image.Image],
) -> dict[str, str]:
    """Draw, and name each file with what it shows."""
    last, k = measured[-1], measured[-1].evaluations[0].k
    whole = [each for each in measured if each.way.share is None]
    coded = [each for each in whole if each.way.bits <= last.way.bits]
    drawn = {"curves.png": f"Precision and recall, {last.way.bits} bits"}
    curves = {
        each.way.name: (each.curve.recall, each.curve.precision) for each in whole if each.way.bits >= last.way.bits
    }
    with written_aside(output / "curves.png") as aside:
        report.curve_plot(curves, aside, f"{title}, {last.way.bits} bits, seed 0")
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for each in coded:
        # Signs of random projections lie so far below that the others would be one line.
        if each.way.name.startswith("random"):
            continue
        lines.setdefault(each.way.name, []).append(_point(each.way.bits, each))
    if len(lines[last.way.name]) > 1:
        drawn["bits.png"] = f"mAP@{k} over bits"
        levels = {each.way.name: _point(0, each)[1] for each in whole if each not in coded}
        with written_aside(output / "bits.png") as aside:
            report.line_plot(lines, aside, ("bits of a code", f"mAP@{k}"), title, levels)
    shares = [each for each in measured if each.way.share is not None]
    if shares:
        bits = shares[0].way.bits
        drawn["shares.png"] = f"mAP@{k} over the share of negatives that is dropped, {bits} bits"
        beside = ("PQ", "tcq_hf, untrained start", last.way.name)
        levels = {
            each.way.name: _point(0, each)[1] for each in coded if each.way.bits == bits and each.way.name in beside
        }
        points = {"tcq_hf, fixed share": [_point(each.way.share, each) for each in shares]}
        with written_aside(output / "shares.png") as aside:
            report.line_plot(points, aside, ("share of negatives dropped", f"mAP@{k}"), f"{title}, {bits} bits", levels)
    drawn["failures.png"] = f"The queries that fail most, {last.way.name}, {last.way.bits} bits"
    with written_aside(output / "failures.png") as aside:
        about = f"{last.way.name}, {last.way.bits} bits, seed {last.way.seeds[0]}: queries of lowest P@10"
        report.picture_grid(_failures(last, split, picture), aside, about)
    return drawn


def _point(x: float, each: Measured) -> tuple[float, float, float]:
    """x, mean and sample standard deviation over the seeds of mAP."""
    values = [found.map_published for found in each.evaluations]
    return x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _failures(each: Measured, split: Split, picture: Callable[[int], PIL.Image.Image]) -> list[list[Cell]]:
    """The queries of lowest precision among ten, of equal ones those of lowest AP, and what they find."""
    queries, database = each.vectors
    labels, base_labels = split.labels[split.queries], split.labels[split.database]
    found = np.stack([np.argsort(-(database @ query), kind="stable")[:_FOUND] for query in queries])
    hits = (base_labels[found] == labels[:, None]).mean(axis=1)
    order = np.lexsort((each.evaluations[0].average_precision, hits))
    worst = [query for query in order if labels[query] >= 0 and labels[query] in base_labels][:_FAILURES]
    names = _label_names(split)

    def cell(row: int, label: int | None = None) -> Cell:
        own = int(split.labels[row])
        return Cell(picture(int(row)), names.get(own, str(own)), None if label is None else own == label)

    return [
        [cell(split.queries[query]), *(cell(row, labels[query]) for row in split.database[found[query]][:_SHOWN])]
        for query in worst
    ]


def _label_names(split: Split) -> dict[int, str]:
    feature = next((each for each in split.dataset.features.values() if isinstance(each, ClassLabel)), None)
    return {} if feature is None else dict(enumerate(feature.names))
