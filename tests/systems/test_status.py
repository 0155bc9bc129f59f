"""status: what the table of docs/systems.md says of tests that passed, failed, were skipped or are not there."""

from types import SimpleNamespace

import pytest
import status


@pytest.mark.parametrize(
    ("outcomes", "relation"),
    [
        (["passed"], "follows"),
        (["passed", "needs a GPU"], "follows"),
        (["passed", "failed"], "not yet"),
        (["passed", "skipped"], "not yet"),
        (["needs a GPU"], "not yet"),
        ([], "not yet"),
    ],
)
def test_a_status_is_what_the_tests_say(outcomes, relation):
    assert status.status(status.SYSTEMS[0], outcomes) == relation


@pytest.mark.parametrize(
    ("report", "outcome"),
    [
        ({"outcome": "passed"}, "passed"),
        ({"outcome": "failed"}, "failed"),
        ({"outcome": "skipped", "longrepr": ("file", 3, "Skipped: no GPU here")}, "needs a GPU"),
        ({"outcome": "skipped", "longrepr": ("file", 3, "Skipped: no pictures")}, "skipped"),
        ({"outcome": "passed", "wasxfail": "some day"}, "failed"),
    ],
)
def test_an_outcome_is_what_a_report_says(report, outcome):
    fields = {"longrepr": None, "skipped": report["outcome"] == "skipped"} | report
    assert status.outcome(SimpleNamespace(**fields)) == outcome


def test_a_table_has_all_sixteen_and_claims_nothing_without_tests():
    lines = status.table({}).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [f"S{number}" for number in range(16)]
    assert all(line.split("|")[3].strip() == "not yet" for line in lines)
    passed = status.table({status.SYSTEMS[15].file.name: ["passed"]}).splitlines()[-1]
    assert "reproduces" in passed
    assert "`tests/systems/test_s15_rank_fusion.py`" in passed


def test_the_page_keeps_what_is_around_its_table():
    page = status.page_with("a table")
    assert page.startswith("# Sixteen systems")
    assert page.count("a table") == page.count(status.START) == page.count(status.END) == 1
    assert "S15" not in page
