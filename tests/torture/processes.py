"""Processes to be ended: forked from this one, or started anew where they must be.

A fork of a process that has imported everything and has started no thread costs milliseconds, a new
interpreter seconds.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.small_files import REPOSITORY


@functools.cache
def cellar() -> Path:
    """A folder for what many trials share, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="torture.kills."))
    owner = os.getpid()  # not a child that was forked
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def folder_in_memory() -> Path:
    """A folder in memory, where the system has one, removed when this process ends; one that a
    killed process of this user left there goes now."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    for left in Path(where).glob("torture.memory.*.*"):
        owner = left.name.split(".")[2]
        if not Path("/proc", owner).exists() and left.stat().st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"torture.memory.{os.getpid()}.", dir=where))
    mine = os.getpid()  # not a child that was forked
    atexit.register(lambda: os.getpid() == mine and shutil.rmtree(folder, ignore_errors=True))
    return folder


def begin(work: Callable[[], Any], log: Path) -> int:
    """Fork a process, the leader of a group, that exits with what work() returns; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int) -> int:
    """The exit code of a forked process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_after(pid: int, seconds: float, number: int, whole_group: bool = False) -> int | None:
    """Send a signal after so many seconds; the exit code, or None if it had ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return None
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    (os.killpg if whole_group else os.kill)(pid, number)
    return wait_for(pid)


def gone(group: int, limit_s: float = 20) -> bool:
    """Whether no process of a group is left, within a time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def one_line(error: Exception) -> str:
    """ "refused", for the outcomes. Raises AssertionError unless the error is one short line."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 3000, f"not one short line: {text!r}"
    return "refused"


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        bits_a, bits_b = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        return torch.equal(bits_a, bits_b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def start(words: list[str], log: Path) -> subprocess.Popen:
    """A new interpreter with these words, the leader of a group."""
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def start_ranks(words: list[str], size: int, log: Path) -> subprocess.Popen:
    """train.py under torchrun, the leader of a group."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return start([*launcher, "--monitor_interval=0.1", "train.py", *words], log)


def ranks_of(parent: int) -> list[int]:
    """Process ids of torchrun's ranks."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
    )
    return [int(pid) for pid in listed.stdout.split()]
