"""Processes to be ended: forked from this one, or started anew where they must be.

A fork of a process that has imported everything and has started no thread costs milliseconds, a new
interpreter seconds. No process outlives the one that began it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from support.small_files import REPOSITORY

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
SAID_TO_STOP = "stopping after this step"
"""What a command writes when it has heard a signal."""


# ---- Folders -------------------------------------------------------------------------------------


@functools.cache
def cellar() -> Path:
    """A folder for what many trials share, removed when this process ends."""
    return _own_folder("torture.cellar", tempfile.gettempdir())


def folder_in_memory() -> Path:
    """A folder in memory, where the system has one, removed when this process ends."""
    in_memory = os.access("/dev/shm", os.W_OK)
    return _own_folder("torture.memory", "/dev/shm" if in_memory else tempfile.gettempdir())


def _own_folder(name: str, where: str) -> Path:
    """A folder of this process in `where`; one that a killed process of this user left there goes
    now."""
    for left in Path(where).glob(f"{name}.*.*"):
        owner = left.name.split(".")[2]
        if not Path("/proc", owner).exists() and left.stat().st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.{os.getpid()}.", dir=where))
    mine = os.getpid()  # not a child that was forked
    atexit.register(lambda: os.getpid() == mine and shutil.rmtree(folder, ignore_errors=True))
    return folder


# ---- Forks ---------------------------------------------------------------------------------------


def begin(work: Callable[[], Any], log: Path) -> int:
    """Fork a process, the leader of a group, that exits with what work() returns; its id."""
    parent, pid = os.getpid(), os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child does it too: whoever comes first
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        end_with(parent)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin_together(works: Sequence[Callable[[], Any]], logs: Sequence[Path]) -> list[int]:
    """Fork a process for each work; all of them begin their work at one moment. Their ids."""
    reading, writing = os.pipe()

    def held(work):
        os.close(writing)
        os.read(reading, 1)  # returns when nobody holds the other end any more
        return work()

    pids = [begin(functools.partial(held, work), log) for work, log in zip(works, logs)]
    os.close(reading)
    os.close(writing)
    return pids


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent, the process `parent`, ends; and let it hear
    the signals that a shell's `nohup` and `&` have its children ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def wait_for(pid: int) -> int:
    """The exit code of a forked process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds are over, from now."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


def end_when(
    pid: int, has_come: Callable[[], bool], number: int, whole_group: bool = False
) -> int | None:
    """Send a signal at a moment; the exit code, or None if the process had ended before."""
    while not has_come():
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return None
        time.sleep(0.001)
    (os.killpg if whole_group else os.kill)(pid, number)
    return wait_for(pid)


# ---- Signals -------------------------------------------------------------------------------------


def has_landed(code: int | None, log: Path) -> bool:
    """Whether a signal met a process at work: it ended the process, or the process has said that
    it heard the signal. code: the exit code, None where the process had ended before."""
    return code not in (None, 0) or (code == 0 and SAID_TO_STOP in log.read_text(errors="replace"))


def until_landed(attempt: Callable[[], T | None]) -> T:
    """What attempt() returns, which is called again while it returns None: the signal came too
    late."""
    for _ in range(20):
        answer = attempt()
        if answer is not None:
            return answer
    raise AssertionError("of 20 signals none met the process at work")


# ---- New interpreters ----------------------------------------------------------------------------


def start(words: list[str], log: Path) -> subprocess.Popen:
    """A new interpreter with these words, the leader of a group."""
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=file, stderr=file,
            start_new_session=True, preexec_fn=functools.partial(end_with, os.getpid()),
        )  # fmt: skip


def start_ranks(words: list[str], size: int, log: Path) -> subprocess.Popen:
    """train.py under torchrun, the leader of a group."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return start([*launcher, "--monitor_interval=0.1", "train.py", *words], log)


# ---- What runs -----------------------------------------------------------------------------------


class Running(NamedTuple):
    """A process that has not ended."""

    pid: int
    parent: int
    group: int


def running() -> Iterator[Running]:
    """The processes of the machine that have not ended: no zombies."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            about = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if about[0] not in "ZX":
            yield Running(int(path.parent.name), int(about[1]), int(about[2]))


def children_of(parent: int) -> list[int]:
    """Process ids of a process's children, such as torchrun's ranks."""
    return [process.pid for process in running() if process.parent == parent]


def gone(group: int, limit_s: float = 20) -> bool:
    """Whether no process of a group runs any more, within a time."""
    deadline = time.monotonic() + limit_s
    while any(process.group == group for process in running()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def one_line(error: Exception) -> str:
    """ "refused", for the outcomes. Raises AssertionError unless the error is one short line."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 3000, f"not one short line: {text!r}"
    return "refused"
