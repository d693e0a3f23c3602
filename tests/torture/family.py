"""The trials of one family, in a process of their own: rows of the table come of what it tells.

A process that dies or hangs costs the trial that it was at; the others follow in a new one. Each
process has a folder of its own for temporary files, and nothing of either is left when it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torture.frame import LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]
IMPORT_S = 120.0
"""What a family's imports may take, and all else between two trials."""
END_S = 60.0
"""What a process may take to end after its last trial, and its children to be gone."""
PROCESS_ROW = "the process of these trials"
"""The row of what goes wrong between trials."""
STOP = threading.Event()
"""Set where no further trial shall begin."""


@dataclasses.dataclass
class Family:
    """Trials of a family that are wanted, and the rows that they fill."""

    name: str
    quick: bool
    words: str = ""
    """Of the faults that are wanted; "" is all."""
    minutes: float = math.inf
    """At most, of each fault."""
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    """Names of all faults of the family, whether wanted or not."""
    trials: int | None = None
    """How many are wanted; None: the process has not told yet."""
    ended: int = 0
    """How many of them were tried or left out."""
    current: dict[str, Any] | None = None
    """What the process told of the trial that it is at."""

    def run(self) -> None:
        """Try all; where a process ends before, the next one goes on behind the trial it was at."""
        while not STOP.is_set():
            before = self.ended
            why = self.run_process()
            if why is None or STOP.is_set():
                break
            self.fail(why)
            if self.ended in (before, self.trials):  # a family that cannot begin is tried once
                break
        self.rows = {name: row for name, row in self.rows.items() if row["run"]}

    def run_process(self) -> str | None:
        """Run trials until their process ends: why that was too early or wrong, None if it was
        neither."""
        hangs = False
        with own_process(self.wanted()) as (process, pipe):
            for line in lines_of(process, pipe):
                hangs = hangs or "hangs" in line
                self.take(line)
            code = end(process)
        if hangs:
            return "hung"
        if code is None:
            return f"did not end within {END_S:.0f} s of its last trial"
        is_whole = code == 0 and self.current is None and self.ended == self.trials
        return None if is_whole else f"ended its process with {code}"

    def wanted(self) -> dict[str, Any]:
        """The arguments of `frame.serve`, but for the pipe."""
        spent = {name: row["seconds"] for name, row in self.rows.items()}
        wanted = {"family": self.name, "quick": self.quick, "words": self.words}
        return {**wanted, "minutes": self.minutes, "skip": self.ended, "spent": spent}

    def take(self, line: dict[str, Any]) -> None:
        """Keep what the process told."""
        if "faults" in line:
            self.faults, self.trials = line["faults"], sum(f["asked"] for f in line["wanted"])
            for fault in line["wanted"]:
                self.rows.setdefault(fault.pop("fault"), empty_row(**fault))
        elif "fault" in line:
            self.current = line
        elif "left_out" in line:
            self.ended += 1
        elif "outcomes" in line and self.current:
            failure = f"trial {self.current['number']}: {line['error']}" if line["error"] else None
            self.count(self.current["fault"], line, failure)
            self.current, self.ended = None, self.ended + 1

    def fail(self, why: str) -> None:
        """Count the trial that a process was at when it died or hung, or else the process."""
        nothing: dict[str, Any] = {"outcomes": {}, "figures": {}, "seconds": 0.0}
        if self.current is None:
            self.rows.setdefault(PROCESS_ROW, empty_row("It lives until the last trial.", 1))
            self.count(PROCESS_ROW, nothing, f"after {self.ended} trials: {why}")
            return
        fault, number = self.current["fault"], self.current["number"]
        seconds = time.monotonic() - self.current["began"]
        self.count(fault, {**nothing, "seconds": seconds}, f"trial {number} {why}")
        self.current, self.ended = None, self.ended + 1

    def count(self, name: str, line: dict[str, Any], failure: str | None) -> None:
        """Count a trial in its row, unless it was left out; failure: None if it was survived."""
        is_left_out = any(words.startswith(LEFT_OUT) for words in line["outcomes"])
        number = 0 if is_left_out else max(1, sum(line["outcomes"].values()))
        row = self.rows[name]
        row["run"] += not is_left_out
        row["tried"] += number
        row["seconds"] += line["seconds"]
        if failure:
            row["failures"].append(failure[:300])
        else:
            row["survived"] += number
            row["outcomes"] = dict(Counter(row["outcomes"]) + Counter(line["outcomes"]))
            for figure, value in line["figures"].items():
                row["figures"][figure] = max(value, row["figures"].get(figure, value))
        show(self.name, name, row)


def empty_row(promise: str, asked: int) -> dict[str, Any]:
    """A row without a trial. asked: trials that a whole run has; run: trials that were made."""
    counts = {"asked": asked, "run": 0, "tried": 0, "survived": 0, "seconds": 0.0}
    return {"promise": promise, **counts, "failures": [], "outcomes": {}, "figures": {}}


@contextlib.contextmanager
def own_process(wanted: dict[str, Any]) -> Iterator[tuple[subprocess.Popen, int]]:
    """(process of a family's trials, the pipe that it tells of them on); it, its children and
    their temporary files are gone afterwards."""
    reading, writing = os.pipe()
    found_in = os.pathsep.join([f"{ROOT}/tests", str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="torture.", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "torture.frame", json.dumps({**wanted, "pipe": writing})],
            pass_fds=[writing],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": found_in, "TMPDIR": folder},
        )
        os.close(writing)
        try:
            yield process, reading
        finally:
            process.kill()
            process.wait()
            end_all(folder)


def end_all(folder: str) -> None:
    """Kill every process whose temporary files go to this folder: children may have groups and
    sessions of their own, which outlive the process that started them."""
    until = time.monotonic() + END_S
    while (left := processes_of(folder)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def processes_of(folder: str) -> list[int]:
    """Ids of the living processes that were started with this TMPDIR."""
    found, wanted = [], f"TMPDIR={folder}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or of another user
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def lines_of(process: subprocess.Popen, pipe: int) -> Iterator[dict[str, Any]]:
    """The lines that a process writes to the pipe, until it ends. Where none comes for too long,
    the process is killed and the last line is {"hangs": True}."""
    text, until = b"", time.monotonic() + IMPORT_S
    with open(pipe, "rb", buffering=0) as file:
        while time.monotonic() < until:
            if STOP.is_set():
                process.kill()
                return
            has_ended = process.poll() is not None
            if not select.select([file], [], [], 0 if has_ended else 0.5)[0]:
                if has_ended:  # children of it may hold the pipe open
                    return
                continue
            piece = file.read(1 << 16)
            *lines, text = (text + piece).split(b"\n")
            for line in map(json.loads, lines):
                until = time.monotonic() + line.get("limit_s", IMPORT_S)
                yield {**line, "began": time.monotonic()}
            if not piece:
                return
    process.send_signal(signal.SIGUSR1)  # prints where its threads are
    time.sleep(1)
    process.kill()
    yield {"hangs": True}


def end(process: subprocess.Popen) -> int | None:
    """The exit code of a process that has told all; None if it does not end."""
    try:
        return process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        return None


def show(family: str, name: str, row: dict[str, Any]) -> None:
    """Print a row over the line before; without a terminal, at 1, 10, 100... trials."""
    text = f"{family}: {name}: {row['survived']:,} of {row['tried']:,} survived"
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif str(row["tried"]).strip("0") == "1" or row["tried"] != row["survived"]:
        print(text, flush=True)
