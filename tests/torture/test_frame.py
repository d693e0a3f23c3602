"""The frame of `make torture`: it counts right, and no fault gets past it."""

import json
import subprocess
import sys

import pytest
from support.small_files import REPOSITORY

from torture import __main__ as command
from torture.frame import FAMILIES, faults_of, run_trial


@pytest.fixture(scope="module")
def rows():
    return command.run_family("examples", quick=True, words="")


@pytest.mark.whole
def test_trials_are_counted_and_their_outcomes_kept(rows):
    assert (rows["survived"]["tried"], rows["survived"]["survived"]) == (2, 2)
    assert rows["counted"]["tried"] == 14
    assert rows["counted"]["outcomes"] == {"refused": 6, "right": 8}
    assert rows["measured"]["figures"] == {"seconds": 7.0}


@pytest.mark.whole
def test_a_trial_that_dies_hangs_or_is_wrong_is_told_and_the_others_go_on(rows):
    assert rows["dies"]["tried"] == 2 and rows["dies"]["outcomes"] == {"lived": 1}
    assert rows["dies"]["failures"] == ["trial 0 ended its process with -6"]
    assert rows["hangs"]["failures"] == ["trial 0 hung"]
    assert rows["is wrong"]["failures"] == ["trial 0: AssertionError: two is not one"]
    assert [row["survived"] for row in rows.values()] == [2, 14, 2, 1, 0, 0]


def test_a_trial_that_is_left_out_is_said_and_not_counted():
    row = command.empty_row("it is found")
    outcome = {"outcomes": {"left out: no tool": 1}, "figures": {}, "error": None, "seconds": 0.1}
    command.add(row, outcome, "no failure")
    assert (row["tried"], row["survived"]) == (0, 0) and row["failures"] == []
    assert row["outcomes"] == {"left out: no tool": 1}


@pytest.mark.whole
def test_a_fault_whose_minutes_are_over_is_tried_no_further():
    rows = command.run_family("examples", quick=False, words="survived", minutes=0)
    assert (rows["survived"]["tried"], rows["survived"]["survived"]) == (1, 1)


@pytest.mark.whole
def test_the_command_fails_where_a_fault_was_not_survived(tmp_path):
    script = "import torture.__main__ as m; m.FAMILIES = ('examples',); exit(m.main())"
    given = ["--quick", "--only", "wrong", "--results", str(tmp_path / "r.json")]
    ended = subprocess.run(
        [sys.executable, "-c", script, *given], cwd=REPOSITORY / "tests", capture_output=True
    )
    assert ended.returncode == 1
    *_, failure, summary = ended.stdout.decode().splitlines()
    assert failure == "FAIL examples: is wrong: trial 0: AssertionError: two is not one"
    assert json.loads(summary)["survived"] == 0
    kept = json.loads((tmp_path / "r.json").read_text())["families"]["examples"]
    assert list(kept) == ["is wrong"] and kept["is wrong"]["tried"] == 1


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
