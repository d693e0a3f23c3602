"""What a fault is, and how its trials are run.

A fault is a function marked with `@fault(...)` in a module of this package that `FAMILIES` names.
It is called once a trial, with an empty folder and random numbers of its own, and raises (an
AssertionError, usually) where the promise in its docstring does not hold. What it returns is
counted or kept:

- a str: what happened in this trial, in a few words. The table counts each of them.
- a Counter: the same for a trial that tries many things; `tried` then grows by its total.
- a dict of numbers: figures, such as {"seconds to open": 0.2}. The table shows the largest of each.

Trials run in a process of their own for each family, which is started again where a trial kills or
hangs it. Trial k of a fault always draws the same random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEFT_OUT = "left out: "
"""Begins what a trial returns that cannot be made here. It is neither tried nor survived."""
IS_QUICK = True
"""Whether this process runs the trials of `--quick`; families read it when they are imported."""
FAMILIES = ("files", "sources", "kills", "disks", "load", "threads", "scale", "pages", "jpegs")
"""Modules of this package, in the order of the table."""


@dataclasses.dataclass
class Trial:
    """What a fault gets."""

    folder: Path
    """Empty, and removed afterwards."""
    random: np.random.Generator
    number: int
    """0, 1, 2...; trials of `--quick` are the first of the whole."""
    quick: bool


def choices_of(trial: Trial) -> random.Random:
    """A source of choices, from the trial's random numbers: for what takes a `random.Random`."""
    return random.Random(int(trial.random.integers(2**62)))


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    promise: str
    run: Callable[[Trial], str | Counter | dict[str, float]]
    quick: int
    """Trials of `--quick`."""
    full: int
    limit_s: float
    """A trial that takes longer hangs."""


_FOUND: dict[str, list[Fault]] = {}


def fault(name: str, quick: int, full: int, limit_s: float = 120) -> Callable:
    """Decorator: a fault of that name, tried `quick` or `full` times; its docstring is what is
    promised."""

    def register(function):
        promise = " ".join((function.__doc__ or "").split())
        assert promise, f"{name}: say in the docstring what is promised"
        found = _FOUND.setdefault(function.__module__, [])
        found.append(Fault(name, promise, function, quick, full, limit_s))
        return function

    return register


def faults_of(family: str) -> list[Fault]:
    """The faults of a family, in the order of its module."""
    module = importlib.import_module(f"torture.{family}")
    return _FOUND.get(module.__name__, [])


def trials_of(family: str, quick: bool, words: str = "") -> list[tuple[Fault, int]]:
    """[(fault, number)] of a family's trials, of the faults with `words` in their names."""
    chosen = [fault for fault in faults_of(family) if words in f"{family} {fault.name}"]
    return [(f, number) for f in chosen for number in range(f.quick if quick else f.full)]


def run_trial(fault: Fault, number: int, quick: bool) -> dict[str, Any]:
    """One trial's outcome: {"outcomes": {words: how many}, "figures", "error" (None: survived)}."""
    folder = Path(tempfile.mkdtemp(prefix="torture."))
    random = np.random.default_rng([zlib.crc32(fault.name.encode()), number])
    outcomes: Counter = Counter()
    figures: dict[str, float] = {}
    error = None
    try:
        answer = fault.run(Trial(folder, random, number, quick))
        if isinstance(answer, Counter):
            outcomes = answer
        elif isinstance(answer, dict):
            figures = answer
        else:
            outcomes[str(answer or "survived")] += 1
    except Exception:
        error = traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"outcomes": dict(outcomes), "figures": figures, "error": error}


def serve(
    family: str, quick: bool, words: str, minutes: float, skip: int, spent: dict, pipe: int
) -> None:
    """Run a family's trials from number `skip` on, of each fault until `minutes` are over, and
    write lines of JSON to `pipe`: one of all faults, then one before (its fault) and one after (its
    outcome) each trial. spent: seconds of each fault's trials before. What trials print is kept for
    a failure only."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    global IS_QUICK
    IS_QUICK = quick
    with open(pipe, "w") as lines:

        def tell(**line):
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        trials = trials_of(family, quick, words)
        asked = Counter(fault for fault, _ in trials)
        wanted = [{"fault": f.name, "promise": f.promise, "asked": n} for f, n in asked.items()]
        tell(faults=[fault.name for fault in faults_of(family)], wanted=wanted)
        seconds = Counter(spent)
        for fault, number in trials[skip:]:
            if seconds[fault.name] > 60 * minutes:
                tell(left_out=True)
                continue
            tell(fault=fault.name, number=number, limit_s=fault.limit_s)
            outcome = timed_trial(fault, number, quick)
            seconds[fault.name] += outcome["seconds"]
            tell(**outcome)


def timed_trial(fault: Fault, number: int, quick: bool) -> dict[str, Any]:
    """`run_trial`, with its seconds and the last line of its error; all else that a trial prints
    goes to stderr where it fails."""
    began, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        outcome = run_trial(fault, number, quick)
    if outcome["error"]:
        print(printed.getvalue()[-2000:], outcome["error"], file=sys.stderr, flush=True)
        outcome["error"] = outcome["error"].strip().splitlines()[-1]
    return {"seconds": time.perf_counter() - began, **outcome}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torture import frame  # the module that families import, not this __main__

    frame.serve(**json.loads(sys.argv[1]))
