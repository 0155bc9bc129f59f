"""Tables, curves, picture grids and the HTML page."""

import numpy as np
import PIL.Image
import pytest

from tcq_hf.evaluation.report import Cell, curve_plot, html_page, line_plot, markdown_table, picture_grid, text_table

ROWS = [{"name": "a", "mAP": 0.5, "rows": 12}, {"name": "longer", "mAP": 0.12345, "rows": 3}]


def test_text_table_aligns_text_left_and_numbers_right():
    assert text_table(ROWS).splitlines() == [
        "name       mAP  rows",
        "------  ------  ----",
        "a       0.5000    12",
        "longer  0.1235     3",
    ]
    assert text_table([]) == ""


def test_markdown_table_has_the_same_cells():
    lines = markdown_table(ROWS).splitlines()
    assert lines == ["| name | mAP | rows |", "| --- | --- | --- |", "| a | 0.5000 | 12 |", "| longer | 0.1235 | 3 |"]


def test_grid_shows_each_picture_at_its_place(tmp_path):
    colours = [[(200, 30, 30), (30, 200, 30)], [(30, 30, 200), (200, 200, 30), (90, 10, 120)]]
    rows = [[Cell(PIL.Image.new("RGB", (50, 50), colour)) for colour in row] for row in colours]
    drawn = np.asarray(PIL.Image.open(picture_grid(rows, tmp_path / "deep" / "grid.png")).convert("RGB"))
    places = {}
    for row in colours:
        for colour in row:
            y, x = np.nonzero((drawn == colour).all(axis=2))
            assert len(x) > 10_000
            places[colour] = (y.mean(), x.mean())
    above, below = colours
    assert places[above[0]][0] < places[below[0]][0]
    assert places[above[0]][1] < places[above[1]][1]
    assert places[below[0]][1] < places[below[1]][1] < places[below[2]][1]


@pytest.mark.parametrize(
    ("match", "colour"), [(True, (46, 139, 87)), (False, (200, 200, 200)), (None, (200, 200, 200))]
)
def test_grid_frames_tell_a_match(tmp_path, match, colour):
    white = PIL.Image.new("RGB", (20, 20), "white")
    drawn = PIL.Image.open(picture_grid([[Cell(white), Cell(white, "$1 $2", match)]], tmp_path / "g.png")).convert(
        "RGB"
    )
    found = set(drawn.get_flattened_data())
    assert colour in found
    assert (31, 78, 140) in found


def test_grid_takes_any_mode_and_refuses_nothing(tmp_path):
    modes = [PIL.Image.new(mode, (30, 10)) for mode in ("L", "RGBA", "P", "CMYK", "1", "LA")]
    assert picture_grid([[Cell(picture, picture.mode) for picture in modes]], tmp_path / "g.png").stat().st_size > 1000
    for rows in ([], [[]], [[Cell(modes[0])], []]):
        with pytest.raises(ValueError, match="at least one"):
            picture_grid(rows, tmp_path / "h.png")
    assert not (tmp_path / "h.png").exists()


def test_curves_are_drawn_where_they_stand(tmp_path):
    recall, precision = np.linspace(0, 1, 50), np.linspace(1, 0.2, 50)
    drawn = {}
    for name, curve in {"low": (recall, 0 * precision + 0.25), "high": (recall, 0 * precision + 0.75)}.items():
        file = curve_plot({name: curve}, tmp_path / "deep" / f"{name}.png")
        picture = np.asarray(PIL.Image.open(file).convert("RGB")).astype(int)
        rows, columns = np.nonzero(np.abs(picture - (0x1F, 0x77, 0xB4)).sum(axis=2) < 30)
        line = rows[columns < columns.max() / 2]
        drawn[name] = line.mean() / len(picture)
    assert drawn["high"] < 0.4 < drawn["low"]
    both = curve_plot({"_a $1": (recall, precision), "b": (recall[::-1].tolist(), precision)}, tmp_path / "both.png")
    assert both.stat().st_size > 1000


def test_curves_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one curve"):
        curve_plot({}, tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"of 'a' must be \[P\] each, got \(3,\) and \(2,\)"):
        curve_plot({"a": (np.zeros(3), np.zeros(2))}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def marks(file, colour):
    """Rows and columns of the pixels of one colour, as shares of height and width, left of the legend."""
    picture = np.asarray(PIL.Image.open(file).convert("RGB")).astype(int)
    frame = np.flatnonzero((picture.max(axis=2) < 60).mean(axis=0) > 0.5)
    rows, columns = np.nonzero(np.abs(picture - colour).sum(axis=2)[:, : frame.max()] < 30)
    return rows / picture.shape[0], columns / picture.shape[1]


def test_every_search_of_a_comparison_has_a_colour_of_its_own(tmp_path):
    curves = {f"search {i}": (np.linspace(0, 1, 9), np.full(9, (i + 1) / 13)) for i in range(12)}
    picture = PIL.Image.open(curve_plot(curves, tmp_path / "c.png")).convert("RGB")
    # Half way along, each line is crossed once, between the frame above and below; the grid is light.
    column = np.asarray(picture)[:, int(picture.width * 0.37)].astype(int)
    frame = np.flatnonzero(column.sum(axis=1) == 0)
    inside = column[frame[0] + 2 : frame[-1] - 1]
    dark = np.flatnonzero(inside.sum(axis=1) < 600)
    crossed = np.split(dark, np.flatnonzero(np.diff(dark) > 1) + 1)
    colours = [tuple(min(inside[part].tolist(), key=sum)) for part in crossed]
    assert len(colours) == len(set(colours)) == 12


@pytest.mark.parametrize(("doublings", "middle"), [(False, 1 / 3), (True, 1 / 2)])
def test_lines_stand_at_their_option_and_levels_across(tmp_path, doublings, middle):
    """Of 16, 32 and 64, the one in the middle is a third of the way, or one doubling of two."""
    points = {"_a $1": [(64, 0.9, 0.0), (16, 0.1, 0.02), (32, 0.5, 0.0)]}
    file = line_plot(points, tmp_path / "deep" / "l.png", ("bits", "mAP"), "title", {"level": 0.5}, doublings)
    rows, columns = marks(file, (0x1F, 0x77, 0xB4))
    low, high = columns.min(), columns.max()
    at_half = np.abs(rows - (rows.min() + rows.max()) / 2) < 0.01
    assert (columns[at_half].mean() - low) / (high - low) == pytest.approx(middle, abs=0.02)
    dashes, along = marks(file, (0xFF, 0x7F, 0x0E))
    assert np.ptp(dashes) < 0.02
    assert along.min() < low
    assert along.max() > high


def test_lines_that_are_none_are_refused(tmp_path):
    for lines in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one line with at least one point"):
            line_plot(lines, tmp_path / "l.png", ("x", "y"))
    with pytest.raises(ValueError, match="needs x above 0, got 0: leave doublings out"):
        line_plot({"a": [(0, 1, 0)]}, tmp_path / "l.png", ("x", "y"), doublings=True)
    assert not (tmp_path / "l.png").exists()


def test_page_holds_its_pictures_and_escapes(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    (tmp_path / "t.html").write_text("<img src='{{ picture(file) }}'>{{ words }}")
    page = html_page(tmp_path / "t.html", tmp_path / "o.html", file=tmp_path / "p.png", words="<b>&").read_text()
    assert page.startswith("<img src='data:image/png;base64,iVBOR")
    assert page.endswith("&lt;b&gt;&amp;")
