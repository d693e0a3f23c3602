"""docs/reliability.md tells of every fault, and of what its row lacks."""

import json
from pathlib import Path

import pytest
from torture.family import empty_row
from torture.frame import FAMILIES, faults_of

from benchmarks import reliability_page

RESULTS = Path(reliability_page.__file__).parent / "results"
MACHINE = {"cpu": "a CPU", "cores": 2, "python": "3.11", "torch": "2.6", "numba": "0.6"}


def made_row(run, asked, **about):
    row = empty_row("it holds", asked)
    counted = {"run": run, "tried": 1000 * run, "survived": 1000 * run, "seconds": 120.0}
    origin = {"machine": MACHINE, "date": "2026-01-01", "commit": "abc"}
    return {**row, **counted, **origin, **about}


def test_every_fault_that_was_tried_was_survived_each_time():
    families = json.loads((RESULTS / "reliability.json").read_text())["families"]
    rows = [(name, row) for rows in families.values() for name, row in rows.items()]
    failed = [name for name, row in rows if row["failures"] or row["survived"] != row["tried"]]
    assert failed == []  # make torture RESULTS=that file


def test_a_fault_without_a_row_is_named_below_its_table():
    text = reliability_page.table({"a": made_row(2, 2)}, ["a", "b", "c"])
    assert "| a | it holds | 2,000 | 2,000 |" in text
    assert "Not measured yet: b; c.\n" in text
    assert reliability_page.table({}, ["b"]) == "Not measured yet: b."


def test_a_row_that_was_cut_short_says_so():
    assert reliability_page.tried(made_row(3, 5)) == "3,000 (3 of 5 asked for)"
    assert reliability_page.tried(made_row(5, 5)) == "5,000"


def test_rows_say_where_they_come_from_and_those_of_one_run_say_it_once():
    rows = {"a": made_row(1, 1), "b": made_row(1, 1), "c": made_row(1, 1, commit="def")}
    lines = reliability_page.table(rows, list(rows)).splitlines()[-2:]
    about = "2026-01-01, a CPU, 2 cores, python 3.11, torch 2.6, numba 0.6, commit"
    assert lines == [f"{about} abc: 4 minutes.", f"{about} def: 2 minutes."]


@pytest.mark.parametrize("run", [None, 0])
def test_faults_that_were_tried_too_little_are_told_in_every_family(tmp_path, run):
    rows = {
        family: {fault.name: made_row(fault.full, fault.full) for fault in faults_of(family)}
        for family in FAMILIES
    }
    fault = faults_of("scale")[0]
    path = tmp_path / "reliability.json"
    path.write_text(json.dumps({"families": rows}))
    assert reliability_page.too_few(tmp_path) == []
    rows["scale"][fault.name]["run"] = run
    if run is None:
        del rows["scale"][fault.name]
    path.write_text(json.dumps({"families": rows}))
    assert reliability_page.too_few(tmp_path) == [f"scale: {fault.name}: 0 of {fault.full} trials"]
    assert set(reliability_page.tables(tmp_path)) == set(FAMILIES)
