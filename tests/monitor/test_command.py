"""`ffcv-ssl monitor`: what it prints and writes, and how it refuses."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from support.metric_runs import write_metric_run, write_records
from support.outputs import closed_stdout, full_stdout

from ffcv_ssl.monitor import __main__ as command


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_metric_run(tmp_path / "runs/a", 20, epochs=2)
    return tmp_path / "runs/a"


def test_it_writes_the_page_and_says_so_in_json(run, capsys):
    assert command.main(["runs/a"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    page = run.parents[1] / "report.html"
    assert summary["out"] == str(page) and summary["bytes"] == page.stat().st_size
    (about,) = summary["runs"]
    assert (about["name"], about["state"], about["step"]) == ("a", "finished", 20)
    assert about["best_top1"] == about["last_top1"] == pytest.approx(0.9 - 0.5 / 3)
    assert command.main(["runs"]) == 0  # its own page is replaced


def test_what_was_left_out_is_said(run, capsys):
    write_records(run, ["half a line\n"], "a")
    assert command.main(["runs"]) == 0
    assert capsys.readouterr().err == "a: lines of metrics.jsonl that are no records: 1\n"


def test_a_run_without_records_has_a_page(run, capsys):
    write_records(run, [])
    assert command.main(["runs/a", "--out", "new.html"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["records"] == 0


REFUSALS = [
    ("none", "none: no such folder; give a run's folder, such as runs/first"),
    ("file", "file: cannot be read (Not a directory); give a run's folder, such as runs/first"),
    (
        "empty",
        "empty: no run: no metrics.jsonl or checkpoint.pt there or below; give a run's folder",
    ),
    ("other --serve", "other: no run: no metrics.jsonl or checkpoint.pt there or below;"),
    ("", "the following arguments are required: runs; see --help"),
    ("runs --nothing", "unrecognized arguments: --nothing; see --help"),
    ("runs --out=empty", "is a folder, expected a regular file or a new name to write to"),
    ("runs --out=", "got an empty path, expected the name of a file to write"),
    ("runs --out=none/a.html", "none); make it first"),
    ("runs --out=file/a.html", "a.html: cannot be written (Not a directory)"),
    ("runs", "report.html: is not a page of this command; use --out HTML"),
    ("runs --port=8000", "--port: got '8000' without --serve; add --serve"),
    ("runs --serve --port=70000", "--port: got '70000', expected 0 to 65535"),
    ("runs --serve --port=-1", "--port: got '-1', expected 0 to 65535"),
    ("runs --serve --port=x", "--port: got 'x', expected 0 to 65535"),
    ("runs --serve --out=a.html", "--out: got 'a.html' with --serve, which writes no file; leave"),
]


@pytest.mark.parametrize("words, said", REFUSALS)
def test_a_mistake_is_one_line_and_exit_2(run, capsys, words, said):
    for name in ("empty", "other/folder"):
        os.makedirs(name)
    for name in ("file", "report.html"):
        Path(name).write_text("mine")
    assert command.main(words.split()) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert said in line and out == ""
    assert Path("report.html").read_text() == "mine"


def test_an_empty_path_is_no_run(run, capsys):
    assert command.main([""]) == 2
    expected = "runs: got an empty path, expected a run's folder, or a folder of runs\n"
    assert capsys.readouterr().err == expected


def test_a_page_that_cannot_be_written_is_one_line(run, monkeypatch, capsys):
    def fail(path, text, temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_text", fail)
    assert command.main(["runs", "--out", "a.html"]) == 2
    line = "a.html: cannot be written (No space left on device); free some space\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_full_or_closed_stdout_is_no_traceback(run, monkeypatch, capsys):
    with full_stdout() as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command.main(["runs"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert command.main(["runs"]) == 1
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_it_reads_is_one_line(run, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Board, "refresh", stop)
    assert command.main(["runs"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
