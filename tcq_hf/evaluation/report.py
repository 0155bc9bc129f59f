"""Figures and pictures in, tables, curves, a picture grid and one HTML page out."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import PIL.ImageOps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Of lines, as many as a comparison has.
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"),
    *("#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#111111", "#aa3377"),
)
_QUERY, _SAME, _OTHER = "#1f4e8c", "#2e8b57", "#c8c8c8"


@dataclass(frozen=True)
class Cell:
    """A picture of the grid.

    Args:
        picture: A PIL image of any size.
        caption: One short line under it.
        match: Whether it shows what the query shows; None where nobody knows.
    """

    picture: PIL.Image.Image
    caption: str = ""
    match: bool | None = None


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as aligned text; floats with four digits, numbers to the right."""
    if not rows:
        return ""
    header = list(rows[0])
    cells = [[_format(row[name]) for name in header] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(header)]
    numeric = [all(isinstance(row[name], (int, float)) for row in rows) for name in header]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_format(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture_grid(rows: Sequence[Sequence[Cell]], path: str | os.PathLike, title: str = "") -> Path:
    """Draw rows of pictures, the query first in each, into a PNG file.

    Queries have a blue frame, neighbours that match a green one; neighbours stand in order, best first.

    Args:
        rows: Cells of each row; rows may differ in length.
        path: PNG file to write.
        title: Line above the grid.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not rows or not all(rows):
        raise ValueError("a picture grid needs at least one row with at least one picture")
    path = Path(path)
    columns, side, gap, under = max(map(len, rows)), 1.25, 0.12, 0.26
    width = columns * (side + gap) + 3 * gap
    head = 0.45 if title else gap
    height = len(rows) * (side + under + gap) + head
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            left = gap + c * (side + gap) + (2 * gap if c else 0)
            bottom = height - head - r * (side + under + gap) - side
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _draw(axes, cell, is_query=c == 0)
    if title:
        figure.text(gap / width, 1 - 0.5 * head / height, title, fontsize=11, va="center", color="#222222")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def curve_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, title: str = "") -> Path:
    """Draw precision over recall of several searches into a PNG file.

    Args:
        curves: Recall and precision, float `[P]` each, by the name of the search; drawn in this order.
        path: PNG file to write.
        title: Line above the plot.

    Raises:
        ValueError: If there is nothing to draw, or recall and precision differ in length.
    """
    if not curves:
        raise ValueError("a curve plot needs at least one curve")
    axes = _axes(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    for name, (recall, precision) in curves.items():
        if np.shape(recall) != np.shape(precision) or np.ndim(recall) != 1:
            raise ValueError(
                f"recall and precision of {name!r} must be [P] each, got {np.shape(recall)} and {np.shape(precision)}"
            )
        axes.plot(recall, precision, label=name.replace("$", r"\$"), linewidth=1.6)
    return _save(axes, path)


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | os.PathLike,
    labels: tuple[str, str],
    title: str = "",
    levels: Mapping[str, float] | None = None,
    doublings: bool = False,
) -> Path:
    """Draw a figure over an option, one line a method, into a PNG file.

    Args:
        lines: (x, mean, standard deviation) of the points of each method, by its name; drawn in this order.
        path: PNG file to write.
        labels: Of the x and the y axis.
        title: Line above the plot.
        levels: Figures that do not depend on the option, by name, as dashed lines.
        doublings: Give each doubling of x the same width.

    Raises:
        ValueError: If there is nothing to draw, or an x has no doublings.
    """
    if not lines or not all(lines.values()):
        raise ValueError("a line plot needs at least one line with at least one point")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if doublings and ticks[0] <= 0:
        raise ValueError(f"an axis of doublings needs x above 0, got {ticks[0]:g}: leave doublings out")
    axes = _axes(xlabel=labels[0], ylabel=labels[1], title=title)
    for name, points in lines.items():
        x, mean, deviation = zip(*sorted(points), strict=True)
        axes.errorbar(x, mean, deviation, label=name.replace("$", r"\$"), linewidth=1.6, marker="o", capsize=3)
    for number, (name, level) in enumerate((levels or {}).items(), start=len(lines)):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.axhline(level, label=name.replace("$", r"\$"), linewidth=1.2, linestyle="--", color=colour)
    if doublings:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    return _save(axes, path)


def html_page(template: str | os.PathLike, path: str | os.PathLike, **values: Any) -> Path:
    """Fill a Jinja template into one HTML file.

    In the template `picture(file)` gives the address of a PNG file with its content inside, so that the page needs no
    other file; everything else is escaped.
    """
    template, path = Path(template), Path(path)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["picture"] = _data_uri
    path.write_text(environment.get_template(template.name).render(**values), encoding="utf-8")
    return path


def _axes(**labels: Any) -> Axes:
    figure = Figure(figsize=(8.4, 4.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(**labels)
    axes.set_prop_cycle(color=_COLOURS)
    axes.grid(color="#e4e4e4")
    return axes


def _save(axes: Axes, path: str | os.PathLike) -> Path:
    # Beside the axes: lines may run anywhere inside.
    axes.figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, format="png")
    return path


def _draw(axes: Axes, cell: Cell, is_query: bool) -> None:
    thumbnail = PIL.ImageOps.pad(
        _on_white(cell.picture), (220, 220), method=PIL.Image.Resampling.LANCZOS, color="white"
    )
    axes.imshow(thumbnail, interpolation="none")
    axes.set_axis_off()
    colour, line = (_QUERY, 3.0) if is_query else (_SAME, 2.0) if cell.match else (_OTHER, 1.0)
    axes.add_patch(
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=line, clip_on=False)
    )
    axes.text(
        *(0.5, -0.05, cell.caption),
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=7,
        color=_QUERY if is_query else "#333333",
        weight="bold" if is_query else "normal",
        parse_math=False,
    )


def _on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    picture = PIL.ImageOps.exif_transpose(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = PIL.Image.new("RGBA", layer.size, "white")
    ground.alpha_composite(layer)
    return ground.convert("RGB")


def _data_uri(file: str | os.PathLike) -> str:
    picture = io.BytesIO(Path(file).read_bytes())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
