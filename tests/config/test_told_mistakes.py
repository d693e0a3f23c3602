"""A mistake under torchrun: later starts end at once, and those of another torchrun do not."""

import os
import tempfile
import time

import pytest

from ffcv_ssl import command_line
from ffcv_ssl.config import told_mistakes
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import command


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(n, max_restarts): this process is start n under torchrun."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def as_start(count, max_restarts=3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))

    return as_start


def refuse(argv):
    raise UserError("epochs: got 0")


def test_a_mistake_is_said_by_the_first_start_alone(start, capsys, monkeypatch):
    start(0)
    assert command.run_ranks(refuse, []) == 2
    assert capsys.readouterr().err == "epochs: got 0\n"
    start(1)
    assert command.run_ranks(lambda argv: pytest.fail("run again"), []) == 2
    monkeypatch.setattr(command_line, "find", lambda name: pytest.fail("loaded"))
    assert command_line.main(["train"]) == 2
    assert capsys.readouterr() == ("", "")


def test_a_first_start_and_another_torchrun_run(start, monkeypatch):
    start(0)
    told_mistakes.mark_mistake()
    assert not told_mistakes.is_told()  # the mark of a torchrun with the same process id
    start(1)
    assert told_mistakes.is_told()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not told_mistakes.is_told()


def test_without_restarts_nothing_is_written(start, tmp_path, monkeypatch):
    start(0, max_restarts=0)
    told_mistakes.mark_mistake()
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    told_mistakes.mark_mistake()
    assert list(tmp_path.iterdir()) == []


def test_a_mark_that_cannot_be_written_costs_nothing(start, tmp_path):
    (tmp_path / f"ffcv_ssl-{os.geteuid()}").write_text("a file")
    start(0)
    told_mistakes.mark_mistake()
    start(1)
    assert not told_mistakes.is_told()


def test_old_marks_are_removed(start, tmp_path, monkeypatch):
    start(0)
    told_mistakes.mark_mistake()
    (old,) = tmp_path.glob("*/mistake-*")
    os.utime(old, (time.time() - told_mistakes.KEPT_S - 1,) * 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    told_mistakes.mark_mistake()
    assert not old.exists() and len(list(tmp_path.glob("*/mistake-*"))) == 1


def test_a_crash_leaves_no_mark(start, tmp_path):
    start(0)
    with pytest.raises(ZeroDivisionError):
        command.run_ranks(lambda argv: 1 // 0, [])
    assert list(tmp_path.iterdir()) == []
