"""Processes ended at random moments: writers, training, fine-tuning, chains.

A trial counts a signal only if it met its process at work. Where the process had ended before, the
trial draws another moment and begins again.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.small_files import SmallImages, write_small

import train
from ffcv_ssl import BetonError, DatasetWriter, Reader
from ffcv_ssl.fields import BytesField, FloatField, IntField, RGBImageField
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import EXIT_INTERRUPTED
from torture.frame import Trial, fault
from torture.processes import (
    after,
    begin,
    cellar,
    children_of,
    end_when,
    gone,
    has_landed,
    start_ranks,
    until_landed,
    wait_for,
)
from torture.runs import (
    CADENCES_MINUTES,
    CASES,
    NUM_EXTENDED_LINES,
    NUM_STEPS,
    begin_ranks,
    check_equal,
    extended_run,
    extended_words,
    training_words,
    undisturbed,
    watched_run,
    where_it_fell,
)
from torture.stages import (
    PROTOCOLS,
    begin_chain,
    check_chain,
    tune,
    tuned,
    undisturbed_chain,
    undisturbed_tuning,
)

KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = (*KILLS, signal.SIGHUP)
ERROR = 1
"""The exit code of Python for an exception, such as KeyboardInterrupt."""
NUM_LINES, STEP_S = 15, 0.05
"""Lines of metrics of a run of training: 12 steps and 3 evaluations; about how long one takes."""
SHARE_IN_TRAINING = 0.75
"""The share of signals that wait for a line: by the clock, most of so short a run is its end."""
lengths_s: dict[Any, float] = {}
"""How long the shortest run of each kind took."""


def at_random(trial: Trial, kind: Any, usual_s: float) -> float:
    """A moment (s) before the end of a run of that kind, which usually takes `usual_s`."""
    return trial.random.uniform(0, 1) * min(usual_s, lengths_s.get(kind, usual_s))


def after_a_line(trial: Trial, out: Path, number: int = NUM_LINES) -> Callable[[], bool]:
    """Whether a run is at a random moment after one of the `number` lines that it will have."""
    path = out / "metrics.jsonl"

    def lines():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wanted = trial.random.integers(min(lines(), number - 1), number)
    waited_s = trial.random.uniform(0, STEP_S)
    since: list[float] = []

    def has_come():
        if not since and lines() >= wanted:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + waited_s

    return has_come


def end_at_random(
    trial: Trial, kind: Any, usual_s: float, number: int, pid: int, log: Path, **options: bool
) -> int | None:
    """Send a signal to a forked process at a random moment; the exit code, or None where the
    process had ended before."""
    began = time.monotonic()
    code = end_when(pid, after(at_random(trial, kind, usual_s)), number, **options)
    if has_landed(code, log):
        return code
    lengths_s[kind] = min(lengths_s.get(kind, usual_s), time.monotonic() - began)
    return None


def check_code(code: int, number: int, log: Path, *others: int) -> None:
    """Whether a command ended as it should for a signal: it stopped in good order, or the signal
    ended it because it did not listen yet, or no longer, or it was about to end anyway."""
    allowed = {-number, *others}
    if number != signal.SIGKILL:
        allowed |= {0, EXIT_INTERRUPTED}
    if number == signal.SIGINT:
        allowed.add(ERROR)
    assert code in allowed, f"exit code {code} after signal {number}: {log.read_text()[-2000:]}"


# ---- Writing -------------------------------------------------------------------------------------

NUM_SAMPLES, NUM_OLD = 60, 7


class Dawdling(SmallImages):
    """Images that take a moment, so that a kill meets the writer at work."""

    def __getitem__(self, i):
        time.sleep(0.002)
        return super().__getitem__(i)


def write(path: Path, number: int = NUM_SAMPLES) -> None:
    """Write a file with two workers."""
    fields = {
        "image": RGBImageField(write_mode="raw"), "label": IntField(), "weight": FloatField(),
        "name": BytesField(),
    }  # fmt: skip
    writer = DatasetWriter(str(path), fields, num_workers=2)
    writer.from_indexed_dataset(Dawdling(number), chunksize=4)


def is_whole(path: Path, number: int) -> bool:
    """Whether a file has the samples 0 to `number`, each as it should be."""
    with Reader(path) as reader:
        if reader.num_samples != number:
            return False
        for i in range(number):
            image, label, weight, name = SmallImages(number)[i]
            assert np.array_equal(reader.decode(i, "image"), image), f"sample {i}"
            assert (
                int(reader.decode(i, "label")) == label
                and float(reader.decode(i, "weight")) == weight
            )
            assert bytes(reader.decode(i, "name")) == name
    return True


def opens(path: Path) -> bool:
    """Whether a file opens as a `.beton`."""
    try:
        Reader(path).close()
    except (BetonError, OSError):
        return False
    return True


@functools.cache
def seconds_to_write() -> float:
    """How long a second writer takes, when all is in memory."""
    for _ in range(2):
        began = time.monotonic()
        assert wait_for(begin(lambda: write(cellar() / "timed.beton"), cellar() / "log")) == 0
    return time.monotonic() - began


@fault("a writer is ended at a random moment", quick=3, full=100)
def writer_is_ended(trial: Trial) -> str:
    """A file that opens is whole, the old one or the new one; nobody is left behind; the next
    writer succeeds and leaves nothing else in the folder."""
    number, had_old = int(trial.random.choice(ENDS)), trial.random.random() < 0.5
    whole_group = trial.random.random() < 0.5
    folder, log = trial.folder / "data", trial.folder / "log"
    path = folder / "a.beton"

    def attempt():
        folder.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if had_old:
            write_small(path, NUM_OLD, mode="raw")
        pid = begin(lambda: write(path), log)
        length_s = seconds_to_write()
        code = end_at_random(trial, "writer", length_s, number, pid, log, whole_group=whole_group)
        assert gone(pid), "processes of the writer are left"
        return code

    code = until_landed(attempt)
    assert code == -number or (number, code) == (signal.SIGINT, ERROR), log.read_text()[-2000:]
    opened = sorted(p.name for p in folder.iterdir() if opens(p))
    assert opened in ([], ["a.beton"]), f"{opened} open"
    assert opened or not had_old, "the old file is gone"
    has_new = bool(opened) and is_whole(path, NUM_SAMPLES)
    if opened and not has_new:
        assert had_old and is_whole(path, NUM_OLD), "a file that opens is wrong"
    assert wait_for(begin(lambda: write(path), log)) == 0, log.read_text()[-2000:]
    assert is_whole(path, NUM_SAMPLES)
    assert [p.name for p in folder.iterdir()] == ["a.beton"], sorted(folder.iterdir())
    if has_new:
        return "when the new file was there"
    return "with the old file there" if had_old else "before there was a file"


# ---- Training ------------------------------------------------------------------------------------


class Training(NamedTuple):
    """What a trial of training draws."""

    method: str
    has_labels: bool
    settings: dict[str, Any]

    @classmethod
    def draw(cls, trial: Trial) -> Training:
        """Cases follow one another; how often it saves and whether it writes events is drawn."""
        cadence = float(trial.random.choice(CADENCES_MINUTES))
        tensorboard = bool(trial.random.random() < 0.5)
        settings = {"checkpoint__every_minutes": cadence, "log__tensorboard": tensorboard}
        return cls(*CASES[trial.number % len(CASES)], settings)

    def words(self, out: Path) -> list[str]:
        """Its command line."""
        return training_words(self.method, self.has_labels, out, **self.settings)


@fault("training is ended at random moments and goes on", quick=1, full=48)
def training_is_ended(trial: Trial) -> Counter:
    """A run ended by SIGKILL, SIGTERM or SIGINT at any moment, and perhaps again as it goes on,
    ends with the metrics, the events and the weights of an undisturbed one, for every method, with
    labelled streams and without, however often it saves."""
    drawn, fell = Training.draw(trial), Counter()
    expected = undisturbed(drawn.method, drawn.has_labels)

    def end(out, log, kind=(drawn.method, drawn.has_labels)):
        number = int(trial.random.choice(KILLS))
        if trial.random.random() < SHARE_IN_TRAINING:
            moment = after_a_line(trial, out)
            code = end_when(begin(lambda: train.main(drawn.words(out)), log), moment, number)
            code = code if has_landed(code, log) else None
        else:
            pid = begin(lambda: train.main(drawn.words(out)), log)
            code = end_at_random(trial, kind, expected.seconds, number, pid, log)
        if code is not None:
            check_code(code, number, log)
            fell[where_it_fell(out)] += 1
        return code

    out = begun_and_ended(trial.folder, end)
    if trial.random.random() < 0.5:
        # where this comes too late, the run is finished
        end(out, trial.folder / "second.log", kind=trial.folder)
    log = trial.folder / "last.log"
    assert wait_for(begin(lambda: train.main(drawn.words(out)), log)) == 0, log.read_text()[-2000:]
    check_equal(out, expected.records, expected.state)
    return fell


def begun_and_ended(folder: Path, end: Callable[[Path, Path], Any]) -> Path:
    """The folder of the first run that end(out, log) begins anew and ends while it is at work."""
    outs = (folder / f"run{number}" for number in range(100))

    def attempt():
        out = next(outs)
        return None if end(out, out.with_suffix(".log")) is None else out

    return until_landed(attempt)


@fault("an extended run is ended at random moments and goes on", quick=0, full=20)
def extension_is_ended(trial: Trial) -> str:
    """A finished run on images without labels, which began with another run's weights and is
    watched on labelled files of its own, gets more epochs and is ended by SIGKILL, SIGTERM or
    SIGINT at any moment of them; it goes on to the metrics and the weights of an undisturbed
    extension, with `--extend` or without once it is under way."""
    expected = extended_run()
    cadence = {"checkpoint__every_minutes": float(trial.random.choice(CADENCES_MINUTES))}
    number, is_by_line = int(trial.random.choice(KILLS)), trial.random.random() < SHARE_IN_TRAINING

    def end(out, log):
        shutil.copytree(watched_run(), out)
        words = extended_words(out, **cadence)
        if not is_by_line:
            pid = begin(lambda: train.main(words), log)
            code = end_at_random(trial, "extension", expected.seconds, number, pid, log)
        else:
            moment = after_a_line(trial, out, NUM_EXTENDED_LINES)
            code = end_when(begin(lambda: train.main(words), log), moment, number)
            code = code if has_landed(code, log) else None
        if code is not None:
            check_code(code, number, log)
        return code

    out, log = begun_and_ended(trial.folder, end), trial.folder / "last.log"
    step = checkpoint.load(out / "checkpoint.pt")["step"]
    words = extended_words(out, **cadence)
    if step > NUM_STEPS and trial.random.random() < 0.5:
        words.remove("--extend=True")
    assert wait_for(begin(lambda: train.main(words), log)) == 0, log.read_text()[-2000:]
    check_equal(out, expected.records, expected.state)
    return "in the new epochs" if step > NUM_STEPS else "before the first new checkpoint"


# ---- Training on two ranks -----------------------------------------------------------------------

SHARE_OF_STARTS, START_S = 0.25, 5.0
"""The share of signals that come while torchrun and torch start, and how long that takes."""


@fault("two ranks under torchrun are ended at random moments", quick=0, full=16, limit_s=400)
def two_ranks_are_ended(trial: Trial) -> str:
    """torchrun, or one of its ranks, is ended by SIGKILL, SIGTERM or SIGINT; all ranks end, with
    torchrun's exit code for a failure or the signal's; the run goes on to the undisturbed metrics,
    events and weights, for every method, with labelled streams and without."""
    drawn = Training.draw(trial)
    expected = undisturbed(drawn.method, drawn.has_labels, 2)
    end = functools.partial(end_ranks, trial, drawn)
    out = begun_and_ended(trial.folder, end)
    fell, log = where_it_fell(out), trial.folder / "last.log"
    if trial.number % 4 == 0:
        codes = [start_ranks(drawn.words(out), 2, log).wait(200)]
    else:  # two ranks all the same, without three new interpreters
        pids = begin_ranks(lambda: train.main(drawn.words(out)), 2, log)
        codes = [wait_for(pid) for pid in pids]
    assert not any(codes), (codes, log.read_text()[-2000:])
    check_equal(out, expected.records, expected.state)
    return fell


def end_ranks(trial: Trial, drawn: Training, out: Path, log: Path) -> bool | None:
    """Begin a run on two ranks and send a signal to torchrun or a rank; None if it had ended."""
    process = start_ranks(drawn.words(out), 2, log)
    wait_for_moment(trial, process, out)
    number = int(trial.random.choice(KILLS))
    victim = process.pid
    if trial.random.random() < 0.5:
        victim = int(trial.random.choice(children_of(process.pid) or [victim]))
    is_over = process.poll() is not None
    if not is_over:
        os.kill(victim, number)
    code, is_torchrun = process.wait(90), victim == process.pid
    # ranks whose torchrun was killed may work on: nobody told them
    if not gone(process.pid, 5):
        os.killpg(process.pid, signal.SIGKILL)
        assert is_torchrun and number == signal.SIGKILL, "ranks outlive their torchrun"
    assert gone(process.pid)
    if is_over or not has_landed(code, log):
        assert code == 0, log.read_text()[-2000:]
        return None
    own = {-number, ERROR} if is_torchrun else {ERROR}
    assert code in own | {0}, f"exit code {code} after signal {number}: {log.read_text()[-2000:]}"
    return True


def wait_for_moment(trial: Trial, process: Any, out: Path) -> None:
    """Wait for a moment of a run on ranks: of its start, or else after one of its lines."""
    has_come = after_a_line(trial, out)
    if trial.random.random() < SHARE_OF_STARTS:
        has_come = after(trial.random.uniform(0, START_S))
    while not has_come() and process.poll() is None:
        time.sleep(0.002)


# ---- Fine-tuning and chains ----------------------------------------------------------------------


@fault("fine-tuning is ended at random moments and goes on", quick=1, full=20)
def tuning_is_ended(trial: Trial) -> str:
    """Fine-tuning or transfer, ended at any moment, ends with the undisturbed result."""
    protocol = tuple(PROTOCOLS)[trial.number % 2]
    expected, seconds = undisturbed_tuning(protocol)
    cadence = {"saving__every_minutes": float(trial.random.choice(CADENCES_MINUTES))}
    number = int(trial.random.choice(KILLS))

    def end(out, log):
        pid = begin(lambda: tune(protocol, out, **cadence), log)
        code = end_at_random(trial, protocol, seconds, number, pid, log)
        if code is not None:
            check_code(code, number, log)
        return code

    out, log = begun_and_ended(trial.folder, end), trial.folder / "last.log"
    fell = "in training" if (out / "checkpoint.pt").exists() else "before the first checkpoint"
    code = wait_for(begin(lambda: tune(protocol, out, **cadence), log))
    assert code == 0, log.read_text()[-2000:]
    assert tuned(out) == expected, "the results differ"
    return fell


@fault("a chain is ended at random moments and goes on", quick=0, full=10, limit_s=600)
def chain_is_ended(trial: Trial) -> str:
    """A chain, alone or with the stage that it runs, is ended at any moment; the same command then
    ends with the undisturbed results of every stage."""
    _, seconds = undisturbed_chain()
    number, whole_group = int(trial.random.choice(KILLS)), trial.random.random() < 0.5

    def end(folder, log):
        folder.mkdir()
        pid = begin_chain(folder, log)
        code = end_at_random(trial, "chain", seconds, number, pid, log, whole_group=whole_group)
        assert gone(pid, 120), "a stage of the ended chain hangs"
        if code is not None:  # a stage ended by a signal gives 128 + the signal's number
            check_code(code, number, log, 128 + number, 128 + signal.SIGTERM)
        return code

    folder, log = begun_and_ended(trial.folder, end), trial.folder / "last.log"
    fell = where_it_fell(folder / "out" / "pretrain")
    assert wait_for(begin_chain(folder, log)) == 0, log.read_text()[-2000:]
    check_chain(folder)
    return fell
