"""A stdout that takes no more: the work goes on, or ends with one line."""

import json
import sys

import pytest
from support.outputs import closed_stdout, full_stdout

from ffcv_ssl.config.stdout import say_if_possible
from ffcv_ssl.training.command import run_ranks
from ffcv_ssl.training.world import World

REASONS = {
    full_stdout: "stdout: cannot be written (No space left on device); free some space",
    closed_stdout: "stdout: nobody reads it any more",
}


@pytest.mark.parametrize("output", REASONS)
def test_training_goes_on_where_nobody_reads_its_lines(output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", output())
    World().say("step 1")
    World().say("step 2")
    assert capsys.readouterr().err == f"{REASONS[output]}; the work goes on without its lines\n"
    with monkeypatch.context() as both:
        both.setattr(sys, "stderr", full_stdout(is_buffered=False))
        both.setattr(sys, "stdout", output())
        say_if_possible("not even that can be said")


@pytest.mark.parametrize("output, code", [(full_stdout, 2), (closed_stdout, 0)])
def test_a_summary_that_cannot_be_printed_is_one_line(output, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", output())
    assert run_ranks(lambda argv: (0, {"a": 1}), []) == code
    said = capsys.readouterr().err
    line = "summary: stdout: cannot be written (No space left on device); all is saved; free"
    assert said.startswith(line) if code else said == ""


def test_a_summary_is_the_last_line(capsys):
    assert run_ranks(lambda argv: (75, {"a": 1}), []) == 75
    assert json.loads(capsys.readouterr().out) == {"a": 1}
