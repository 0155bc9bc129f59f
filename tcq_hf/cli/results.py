"""Figures of several ways of searching in, a folder with their table, their pictures and JSON out."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcq_hf.evaluation import report
from tcq_hf.evaluation.protocols import Split
from tcq_hf.evaluation.published import BACKBONE, PUBLISHED, SOURCES
from tcq_hf.evaluation.report import Cell
from tcq_hf.evaluation.significance import Difference
from tcq_hf.index.writing import written_aside

from .comparison import Measured

_REFERENCE, _DIFFERENCE, _PUBLISHED = "PQ", "to PQ, 95 %", f"published, {BACKBONE}"
# Queries in the picture of failures, and rows shown for each.
_FAILURES, _SHOWN = 6, 8


def write(
    output: Path,
    title: str,
    measured: Sequence[Measured],
    recipe: dict[str, Any],
    split: Split,
    cell: Callable[[int], Cell],
) -> None:
    """Print the table and write `results.md`, `results.json` and the pictures.

    Args:
        output: Folder.
        title: Of page and pictures.
        measured: All ways; last, with its vectors, the one that was asked for at the most bits.
        recipe: How the figures came about.
        split: Who queried whom.
        cell: Row of the dataset in, its picture with the name of its label out.
    """
    differences = [_to_reference(each, measured) for each in measured]
    rows = _rows(measured, differences, PUBLISHED.get(split.name, {}))
    recipe = recipe | _recipe(rows[0])
    print(f"\n{report.text_table(rows)}\n")
    print("\n".join(f"{name}: {value}" for name, value in recipe.items()))
    with written_aside(output / "results.json") as aside:
        beside = [{} if found is None else {"against_pq": vars(found)} for found in differences]
        figures = [each.to_dict() | found for each, found in zip(measured, beside, strict=True)]
        content = json.dumps({"recipe": recipe, "rows": figures}, indent=1, ensure_ascii=False)
        aside.write_text(content + "\n", encoding="utf-8")
    pictures = {}
    for name, (text, draw) in _pictures(title, measured, split, cell).items():
        with written_aside(output / name) as aside:
            draw(aside)
        pictures[name] = text
    with written_aside(output / "results.md") as aside:
        listed = "\n".join(f"- {name}: {value}" for name, value in recipe.items())
        shown = "\n\n".join(f"![{text}]({name})" for name, text in pictures.items())
        text = f"# {title}\n\n{report.markdown_table(rows)}\n\n{shown}\n\n{listed}\n"
        aside.write_text(text, encoding="utf-8")
    print(f"\ntable -> {output / 'results.md'}, figures -> {output / 'results.json'}")


def _to_reference(one: Measured, measured: Iterable[Measured]) -> Difference | None:
    """Difference to PQ at the same bits, where that is another way."""
    same = (each for each in measured if each.way.name == _REFERENCE and each.way.bits == one.way.bits)
    reference = None if one.way.name == _REFERENCE else next(same, None)
    return None if reference is None else one.against(reference)


def _rows(
    measured: Sequence[Measured], differences: Iterable[Difference | None], known: dict[int, dict[str, float]]
) -> list[dict[str, str]]:
    """The table; published figures by bits stand beside the way that was asked for."""
    rows = []
    for each, difference in zip(measured, differences, strict=True):
        row = each.row() | {_DIFFERENCE: "" if difference is None else str(difference)}
        if known:
            found = known.get(each.way.bits, {}) if each.way.name == measured[-1].way.name else {}
            row[_PUBLISHED] = ", ".join(f"{name} {figure:.4f}" for name, figure in found.items())
        rows.append(row)
    return rows


def _recipe(columns: Iterable[str]) -> dict[str, str]:
    about = {
        _DIFFERENCE: f"difference of mAP to {_REFERENCE}, plain, at equal bits, with the 95 % interval of a paired "
        "bootstrap over the queries (10,000 draws); over several seeds each query has its mean, and how "
        "seeds differ is in ± alone",
        _PUBLISHED: f"with another backbone, to be read beside, not against: {SOURCES}",
    }
    return {name: text for name, text in about.items() if name in columns}


Picture = tuple[str, Callable[[Path], Any]]


def _pictures(
    title: str, measured: Sequence[Measured], split: Split, cell: Callable[[int], Cell]
) -> dict[str, Picture]:
    """What each file shows, and a function that draws it."""
    last = measured[-1]
    compared = [each for each in measured if not each.way.for_shares]
    found = {"curves.png": _curves(title, compared, last)}
    if len({each.way.bits for each in compared if each.way.name == last.way.name}) > 1:
        found["bits.png"] = _over_bits(title, compared, last)
    if any(each.way.share is not None for each in measured):
        found["shares.png"] = _over_shares(title, measured, last)
    return found | {"failures.png": _failures(last, split, cell)}


def _curves(title: str, compared: Iterable[Measured], last: Measured) -> Picture:
    bits = last.way.bits
    curves = {each.way.name: (each.curve.recall, each.curve.precision) for each in compared if each.way.bits >= bits}
    text = f"Precision and recall, {bits} bits"
    return text, lambda path: report.curve_plot(curves, path, f"{title}, {bits} bits, seed 0")


def _over_bits(title: str, compared: Sequence[Measured], last: Measured) -> Picture:
    lines: dict[str, list[tuple[float, float, float]]] = {}
    levels, measure = {}, _measure(last)
    for each in compared:
        if each.way.bits > last.way.bits:
            levels[each.way.name] = _point(0, each)[1]
        else:
            lines.setdefault(each.way.name, []).append(_point(each.way.bits, each))
    # They lie so far below that the others would be one line.
    random = [name for name in lines if name.startswith("random")]
    for name in random:
        del lines[name]
    text = f"{measure} over bits" + ("; random projections, far below, are in the table alone" if random else "")
    labels = "bits of a code", measure
    return text, lambda path: report.line_plot(lines, path, labels, title, levels, doublings=True)


def _over_shares(title: str, measured: Sequence[Measured], last: Measured) -> Picture:
    points = [each for each in measured if each.way.share is not None]
    bits, measure = points[0].way.bits, _measure(last)
    names = (_REFERENCE, "tcq_hf, untrained start", last.way.name)
    beside = [each for each in measured if each.way.bits == bits and each.way.name in names]
    levels = {each.way.name: _point(0, each)[1] for each in beside}
    line = {"tcq_hf, fixed share": [_point(each.way.share, each) for each in points]}
    text = f"{measure} over the share of negatives that is dropped, {bits} bits"
    labels = "share of negatives dropped", measure
    return text, lambda path: report.line_plot(line, path, labels, f"{title}, {bits} bits", levels)


def _measure(each: Measured) -> str:
    return f"mAP@{each.evaluations[0].k}"


def _point(x: float, each: Measured) -> tuple[float, float, float]:
    """x, mean and sample standard deviation over the seeds of mAP."""
    values = [found.map_published for found in each.evaluations]
    return x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _failures(each: Measured, split: Split, cell: Callable[[int], Cell]) -> Picture:
    """The queries of lowest average precision among those that have something to find, and what they find."""
    labels, base_labels = split.labels[split.queries], split.labels[split.database]
    order = np.argsort(each.evaluations[0].average_precision, kind="stable")
    able = (labels >= 0) & np.isin(labels, base_labels)
    worst = [query for query in order.tolist() if able[query]][:_FAILURES]

    def row(query: int) -> list[Cell]:
        nearest = split.database[_nearest(each, query)].tolist()
        same = split.labels[nearest] == labels[query]
        found = (dataclasses.replace(cell(near), match=bool(match)) for near, match in zip(nearest, same, strict=True))
        return [cell(int(split.queries[query])), *found]

    found = each.evaluations[0]
    about = f"{each.way.name}, {each.way.bits} bits, seed {found.seed}: the queries of lowest AP@{found.k}"
    return about, lambda path: report.picture_grid([row(query) for query in worst], path, about)


def _nearest(each: Measured, query: int) -> np.ndarray:
    """Numbers of the first rows in the ranking of a query, those of equal score in random order."""
    queries, database = each.vectors
    scores = database @ queries[query]
    by_lot = np.random.default_rng((each.evaluations[0].seed, query)).random(len(scores))
    return np.lexsort((by_lot, -scores))[:_SHOWN]
