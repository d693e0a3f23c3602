"""Training on a terminal: a live line while it works, nothing of it afterwards."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from support.small_files import REPOSITORY

pytestmark = pytest.mark.whole

SETTINGS = [
    "--model.backbone=tiny", "--model.projector=8", "--resolution.min=32", "--resolution.max=32",
    "--data.batch_size=8", "--data.num_workers=1", "--system.device=cpu",
    "--system.torch_threads=1", "--optim.warmup_epochs=0", "--log.tensorboard=false",
]  # fmt: skip


def start(out, raw_beton, *more):
    """(the process of a run whose stderr is a terminal and whose stdout is a pipe, the terminal's
    other end)."""
    reader, writer = pty.openpty()
    words = [f"--out={out}", f"--data.train={raw_beton}", *SETTINGS, *more]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "SLURM_STEP_ID")}
    run = subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        stderr=writer, env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(writer)
    return run, reader


def read(reader, until=None):
    """What comes out of a terminal, to its end, or until a pattern is in it."""
    text, deadline = "", time.monotonic() + 240
    while until is None or not re.search(until, text):
        assert time.monotonic() < deadline, text
        try:
            piece = os.read(reader, 1 << 16)
        except OSError:  # its last writer has gone
            return text
        text += piece.decode()
    return text


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_leaves_the_terminal_in_order(tmp_path, raw_beton):
    run, reader = start(tmp_path / "run", raw_beton, "--epochs=2000")
    before = read(reader, until=r"epoch \d+ of 2000")
    run.send_signal(signal.SIGINT)
    text = before + read(reader)
    stdout, _ = run.communicate(timeout=240)
    os.close(reader)
    assert run.returncode == 75, text
    assert json.loads(stdout.splitlines()[-1])["status"] == "interrupted"
    assert "\x1b" not in stdout and "\x1b[?25l" not in text  # the cursor was never hidden
    lines = [line.rpartition("\x1b[2K")[2] for line in text.split("\r\n")]
    stopping, interrupted, rest = lines[-3:]
    assert stopping == "stopping after this step; the run can be resumed"
    assert "interrupted; checkpoint.pt holds step" in interrupted and rest == ""


def test_a_mistake_is_one_line_on_a_terminal_too(tmp_path, raw_beton):
    run, reader = start(tmp_path / "run", raw_beton, "--data.batch_size=999")
    text = read(reader)
    run.communicate(timeout=240)
    os.close(reader)
    assert run.returncode == 2
    (line,) = [line for line in text.split("\r\n") if line]
    assert line.endswith("expected at least one batch of 999; give --data.batch_size 64")
