"""What `tcq-hf evaluate` writes of given vectors: differences, published figures, curves, the queries that fail."""

import json
import types

import numpy as np
import PIL.Image
import pytest

from tcq_hf.cli import results
from tcq_hf.cli.comparison import Measured, Way, measure
from tcq_hf.evaluation.report import Cell
from tcq_hf.evaluation.significance import paired_bootstrap

LABELS = np.array([0, 0, 1, 1, -1, 7, *([0, 1, 2] * 10)])


def split(name="labels"):
    """Six queries, the fifth without a label and the sixth without a relevant row, and 30 rows."""
    queries, database = np.arange(6), np.arange(6, 36)
    return types.SimpleNamespace(name=name, labels=LABELS, queries=queries, database=database, train=database, k=20)


def measured(name, bits=16, noise=1.0, seeds=(0, 1), protocol="labels", **options):
    """A way that finds its labels behind some noise."""

    def search(seed):
        generator = np.random.default_rng((seed, bits))
        rows = np.eye(8)[LABELS % 8] + noise * generator.standard_normal((36, 8))
        return rows[:6].astype(np.float32), rows[6:].astype(np.float32)

    return measure(Way(name, bits, search, seeds, **options), split(protocol), keep_vectors=True)


def cell(row):
    return Cell(PIL.Image.new("RGB", (9, 9)), f"row {row}")


def write(folder, ways, protocol="labels"):
    results.write(folder, "title", ways, {"data": "drawn"}, split(protocol), cell)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    table = [line.split("|")[1:-1] for line in (folder / "results.md").read_text().splitlines() if line[:2] == "| "]
    names, _, *cells = [[text.strip() for text in line] for line in table]
    return rows, [dict(zip(names, line, strict=True)) for line in cells]


def test_vectors_are_kept_where_asked_alone():
    way = Way("a", 8, lambda _: (np.eye(6, dtype=np.float32), np.eye(30, 6, dtype=np.float32)), (0,))
    assert measure(way, split()).vectors is None
    assert measure(way, split(), keep_vectors=True).vectors[1].shape == (30, 6)


def test_differences_are_to_pq_at_equal_bits(tmp_path):
    ways = [measured("PQ", bits, 1.0) for bits in (16, 32)]
    ways += [measured("PQ, centred", 16, 0.5), measured("asked", 32, 0.2, (0,)), measured("asked", 48, 0.2)]
    rows, table = write(tmp_path, ways)
    assert ["against_pq" in row for row in rows] == [False, False, True, True, False]
    for number, reference in ((2, 0), (3, 1)):
        mean = [np.mean([each.average_precision for each in ways[i].evaluations], axis=0) for i in (number, reference)]
        expected = paired_bootstrap(*mean)
        assert rows[number]["against_pq"] == pytest.approx(vars(expected))
        assert table[number]["to PQ, 95 %"] == str(expected)
    assert [table[number]["to PQ, 95 %"] for number in (0, 1, 4)] == ["", "", ""]


def test_published_figures_stand_beside_what_was_asked_for(tmp_path):
    ways = [measured("PQ", 64), measured("asked", 24), measured("asked", 64)]
    _, table = write(tmp_path, ways, "cifar10-i")
    assert [row["published, VGG16"] for row in table] == ["", "", "MeCoQ 0.7106, HiHPQ 0.7371"]
    assert "with another backbone" in (tmp_path / "results.md").read_text()
    _, table = write(tmp_path, ways)
    assert not any("published" in name for name in table[0])
    assert "another backbone" not in (tmp_path / "results.md").read_text()


def test_curves_over_bits_and_shares(tmp_path, monkeypatch):
    drawn = {}

    def keep(lines, path, labels, title, levels, **_):
        drawn[labels[0]] = lines, levels

    monkeypatch.setattr(results.report, "line_plot", keep)
    floats = measured("float cosine", 512, 0.1, (0,))
    ways = [floats, *(measured(name, bits) for bits in (16, 32) for name in ("PQ", "random projections", "asked"))]
    ways.insert(4, measured("dropped", 16, 0.3, share=0.2, for_shares=True))
    write(tmp_path, ways)
    lines, levels = drawn["bits of a code"]
    assert list(lines) == ["PQ", "asked"]
    values = [found.map_published for found in ways[1].evaluations]
    assert lines["PQ"][0] == pytest.approx((16, np.mean(values), np.std(values, ddof=1)))
    assert levels == {"float cosine": floats.evaluations[0].map_published}
    lines, levels = drawn["share of negatives dropped"]
    assert [point[0] for point in lines["tcq_hf, fixed share"]] == [0.2]
    assert set(levels) == {"PQ", "asked"}
    assert "random projections, far below, are in the table alone" in (tmp_path / "results.md").read_text()


def failures(one):
    """The grid of a way."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.report, "picture_grid", lambda rows, *_: drawn.extend(rows))
        about, draw = results._failures(one, split(), cell)
        draw(None)
    return about, drawn


def test_failures_are_the_queries_of_lowest_average_precision():
    one = measured("asked", noise=0.4)
    about, rows = failures(one)
    assert about == "asked, 16 bits, seed 0: the queries of lowest AP@20"
    order = sorted(range(4), key=lambda query: one.evaluations[0].average_precision[query])
    # Neither the one without a label nor the one that has nothing to find.
    assert [row[0].caption for row in rows] == [f"row {query}" for query in order]
    queries, database = one.vectors
    for query, (first, *found) in zip(order, rows, strict=True):
        scores = [float(queries[query] @ row) for row in database]
        best = sorted(range(30), key=lambda row: -scores[row])[:8]
        assert first.match is None
        assert [each.caption for each in found] == [f"row {row + 6}" for row in best]
        assert [each.match for each in found] == [bool(LABELS[row + 6] == LABELS[query]) for row in best]


def test_failures_show_rows_of_equal_score_in_random_order():
    one = measured("asked", seeds=(0,))
    equal = Measured(one.way, one.evaluations, one.seconds, tuple(np.ones_like(each) for each in one.vectors))
    _, rows = failures(equal)
    first = [each.caption for each in rows[0][1:]]
    assert first == [each.caption for each in failures(equal)[1][0][1:]]
    assert first != [f"row {row}" for row in range(6, 14)]
    assert first != [each.caption for each in rows[1][1:]]
