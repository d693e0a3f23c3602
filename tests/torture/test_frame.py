"""The frame of `make torture`: it counts right, and no fault gets past it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_files import REPOSITORY

from torture import __main__ as command
from torture import results
from torture.family import PROCESS_ROW, Family, empty_row
from torture.frame import FAMILIES, faults_of, run_trial


def run_family(name, quick=True, words="", minutes=math.inf):
    family = Family(name, quick, words, minutes)
    family.run()
    return family.rows


@pytest.fixture(scope="module")
def rows():
    return run_family("examples")


@pytest.mark.whole
def test_trials_are_counted_and_their_outcomes_kept(rows):
    assert (rows["survived"]["tried"], rows["survived"]["survived"]) == (2, 2)
    assert (rows["counted"]["tried"], rows["counted"]["run"], rows["counted"]["asked"]) == (
        14,
        2,
        2,
    )
    assert rows["counted"]["outcomes"] == {"refused": 6, "right": 8}
    assert rows["measured"]["figures"] == {"seconds": 7.0}
    assert 0 < rows["survived"]["seconds"] < 0.1 and rows["hangs"]["seconds"] >= 0.5


@pytest.mark.whole
def test_a_trial_that_dies_hangs_or_is_wrong_is_told_and_the_others_go_on(rows):
    assert rows["dies"]["tried"] == 2 and rows["dies"]["outcomes"] == {"lived": 1}
    assert rows["dies"]["failures"] == ["trial 0 ended its process with -6"]
    assert rows["hangs"]["failures"] == ["trial 0 hung"]
    assert rows["is wrong"]["failures"] == ["trial 0: AssertionError: two is not one"]
    assert [row["survived"] for row in rows.values()] == [2, 14, 2, 1, 0, 0, 1, 1, 0]


@pytest.mark.whole
def test_a_process_that_ends_badly_after_its_trials_has_a_row(rows):
    assert rows["ends the process badly"]["survived"] == 1
    assert rows[PROCESS_ROW]["failures"] == ["after 12 trials: ended its process with 3"]


@pytest.mark.whole
def test_a_family_that_cannot_begin_is_tried_once():
    (row,) = run_family("no_such_family").values()
    assert row["failures"] == ["after 0 trials: ended its process with 1"]


@pytest.mark.whole
def test_children_and_folders_that_a_trial_leaves_are_gone(rows):
    ((told, _),) = rows["leaves a child and a folder"]["outcomes"].items()
    pid, folder = told.split()
    assert not Path(folder).exists() and not Path(folder).parent.exists()
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    assert state[:1] in ("", "Z")  # ended, but perhaps nobody has asked yet


def test_a_trial_that_is_left_out_is_said_and_not_counted():
    family = Family("examples", quick=True, rows={"search": empty_row("It is found.", 1)})
    outcome = {"outcomes": {"left out: no tool": 1}, "figures": {}, "error": None, "seconds": 0.1}
    family.count("search", outcome, None)
    row = family.rows["search"]
    assert (row["run"], row["tried"], row["survived"]) == (0, 0, 0) and row["failures"] == []
    assert row["outcomes"] == {"left out: no tool": 1}


@pytest.mark.whole
def test_a_fault_whose_minutes_are_over_is_tried_no_further():
    rows = run_family("examples", quick=False, words="survived", minutes=0)
    assert (rows["survived"]["run"], rows["survived"]["asked"]) == (1, 12)


@pytest.mark.whole
def test_minutes_are_over_in_the_next_process_too():
    rows = run_family("examples", quick=False, words="dies", minutes=0)
    assert (rows["dies"]["run"], rows["dies"]["asked"]) == (1, 2)


def run_command(*words):
    script = "import torture.__main__ as m; m.FAMILIES = ('examples',); exit(m.main())"
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=REPOSITORY / "tests",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


@pytest.mark.whole
def test_the_command_fails_where_a_fault_was_not_survived(tmp_path):
    ended = run_command("--only", "wrong", "--results", str(tmp_path / "r.json"))
    assert ended.returncode == 1
    *_, failure, summary = ended.stdout.splitlines()
    assert failure == "FAIL examples: is wrong: trial 0: AssertionError: two is not one"
    assert json.loads(summary)["survived"] == 0
    kept = json.loads((tmp_path / "r.json").read_text())["families"]["examples"]
    row = kept.pop("is wrong")
    assert not kept and (row["tried"], row["run"], row["asked"]) == (1, 1, 1)
    assert set(row["machine"]) == {"cpu", "cores", "python", "torch", "numba"}
    assert all(row["machine"].values()) and row["date"] and row["commit"]


@pytest.mark.whole
def test_quick_trials_are_no_results(tmp_path):
    ended = run_command("--quick", "--results", str(tmp_path / "r.json"))
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert ended.stderr == "torture: got --quick with --results, expected a whole run there\n"


def finished(name, faults, *found):
    """A family with rows of some of its faults."""
    rows = {fault: {**empty_row("it holds", 2), "run": 2, "seconds": 0.26} for fault in found}
    return Family(name, quick=False, rows=rows, faults=faults)


def test_results_keep_the_order_of_the_table_and_drop_faults_that_are_no_more(tmp_path):
    path, day = tmp_path / "r.json", {"date": "2026-01-01"}
    results.keep(path, finished("kills", ["c", "old", "d"], "c", "old"), day)
    results.keep(path, finished("files", ["a"], "a"), day)
    results.keep(path, finished("kills", ["d", "c"], "d"), {"date": "2026-02-02"})
    families = json.loads(path.read_text())["families"]
    assert list(families) == ["files", "kills"] and list(families["kills"]) == ["d", "c"]
    assert [row["date"][5:] for row in families["kills"].values()] == ["02-02", "01-01"]
    assert families["files"]["a"]["seconds"] == 0.3
    results.keep(path, finished("files", [], PROCESS_ROW), day)  # its imports failed
    assert list(json.loads(path.read_text())["families"]["files"]) == ["a", PROCESS_ROW]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_long_families_begin_first_and_none_is_forgotten():
    assert set(command.LONG_FIRST) == set(FAMILIES)
    assert tuple(sorted(FAMILIES, key=command.place)) == command.LONG_FIRST


def test_a_trial_draws_the_same_numbers_each_time():
    fault = faults_of("examples")[0]
    drawn = [run_trial(fault, number, quick=True)["outcomes"] for number in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_has_a_name_of_its_own_and_says_what_is_promised(family):
    faults = faults_of(family)
    names = [fault.name for fault in faults]
    assert len(set(names)) == len(names)
    assert all(fault.promise and 0 <= fault.quick <= fault.full for fault in faults)
