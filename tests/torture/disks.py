"""Disks: full, slow, damaged, replaced under a run; clocks set back; two runs in one folder.

Runs are tiny. A full disk is a file whose writes are refused with "No space left on device".
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from support.small_files import SmallImages
from support.states import equal_states

import evaluate
import train
from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.jobs import chain
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import EXIT_INTERRUPTED, EXIT_USER_ERROR
from ffcv_ssl.training.metrics_log import EVENTS_FOLDER
from torture.bad_disks import Delays, full_at, slow_disk
from torture.frame import Trial, fault
from torture.processes import begin, begin_together, cellar, wait_for
from torture.runs import (
    NUM_STEPS,
    check_short,
    metrics_in,
    pretrain,
    records,
    short_run,
    write_images,
)
from torture.stages import chain_words, check_chain, undisturbed_chain

DAY_S = 86400.0


@contextlib.contextmanager
def at_step(step: int, action):
    """Call `action()` once, when a run has made `step` steps."""
    original, done = train.Trainer._train_step, []

    def train_step(self, data, px):
        original(self, data, px)
        if self.step == step and not done:
            done.append(True)
            action()

    with mock.patch.object(train.Trainer, "_train_step", train_step):
        yield


def assert_one_line(errors: str, *parts: str) -> None:
    assert errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors, (part, errors)


def evaluated(*words: object) -> tuple[int, str]:
    """(exit code, stderr) of evaluate.py with these words, on one thread."""
    usual = ("--data.num_workers=1", "--system.device=cpu", "--system.torch_threads=1")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = evaluate.main([*map(str, words), *usual])
    return code, errors.getvalue()


# ---- Full disks --------------------------------------------------------------------------------

WRITTEN = (
    "config.yaml", "metrics.jsonl", "events.out", "checkpoint.pt", "checkpoint_epoch_0001.pt",
    "report.png", "backbone.safetensors",
)  # fmt: skip


def largest_in(folder: Path, name: str) -> int:
    """Bytes of the largest file with `name` in its name, in a folder or below."""
    return max(path.stat().st_size for path in folder.rglob(f"*{name}*"))


@fault("full disk under a run", quick=1, full=10 * len(WRITTEN))
def full_disk(trial: Trial) -> str:
    """Whatever file of its folder a run cannot write or not write to its end, it ends with one line
    that names the reason and an exit code; what was saved stays, and started again it ends with the
    metrics and the weights of a run that nothing disturbed."""
    undisturbed = short_run()
    # quick trials take the checkpoint
    name = WRITTEN[(trial.number + (3 if trial.quick else 0)) % len(WRITTEN)]
    skip = int(trial.random.integers(0, 3)) if name == "checkpoint.pt" else 0
    room = int(trial.random.integers(0, largest_in(undisturbed.out, name)))
    out = trial.folder / "run"
    run = functools.partial(pretrain, out, undisturbed.data, log__tensorboard=name == "events.out")
    with full_at(name, room, skip) as opened:
        code, errors = run()
    assert opened, f"{name} was never written"
    assert code == EXIT_USER_ERROR, (code, errors)
    if name == "events.out":  # TensorBoard's thread prints a traceback of its own before
        errors = errors.splitlines(keepends=True)[-1]
    assert_one_line(errors, str(out), "No space left on device", "free some space")
    assert not list(out.glob("*.tmp")), list(out.iterdir())
    for file in out.glob("checkpoint*.pt"):
        checkpoint.load(file)
    assert run()[0] == 0
    check_short(out)
    return f"{name}: refused writes told in one line, then finished with the same results"


EVALUATIONS = (
    ("knn", "results.jsonl", "results.jsonl"), ("knn", "-backbone.tmp", "-backbone.npy"),
    ("knn", "-backbone.xxh3", "-backbone.xxh3"), ("finetune", "metrics.jsonl", "metrics.jsonl"),
    ("finetune", "checkpoint.pt", "checkpoint.pt"), ("finetune", "results.jsonl", "results.jsonl"),
)  # fmt: skip
"""Protocols, and the files that they write: names while they are written, and at the end."""


def evaluate_short(protocol: str, out: Path) -> tuple[int, str]:
    """(exit code, stderr) of a protocol on the short run, with results in `out`."""
    words = [protocol, f"--checkpoint={short_run().out}", f"--out={out}"]
    if protocol == "finetune":
        words += ["--epochs=2", "--data.batch_size=8", "--log.tensorboard=false"]
        words += ["--log.every_steps=1", "--precision=fp32"]
    return evaluated(*words)


@functools.cache
def evaluated_short(protocol: str) -> Path:
    """The folder of a protocol's results that nothing disturbed."""
    out = cellar() / f"short_{protocol}"
    code, errors = evaluate_short(protocol, out)
    assert code == 0, errors
    return out


@fault("full disk under an evaluation", quick=1, full=5 * len(EVALUATIONS))
def full_disk_evaluation(trial: Trial) -> str:
    """Whatever file an evaluation cannot write or not write to its end, its results, the features
    that it keeps or the checkpoint of a fine-tuning, it ends with one line and an exit code; again
    it ends with the undisturbed result."""
    protocol, name, kept = EVALUATIONS[trial.number % len(EVALUATIONS)]
    expected, out = evaluated_short(protocol), trial.folder / "out"
    room = int(trial.random.integers(0, largest_in(expected, kept)))
    with full_at(name, room, 0) as opened:
        code, errors = evaluate_short(protocol, out)
    assert opened, f"{name} was never written"
    assert code == EXIT_USER_ERROR, (code, errors)
    assert_one_line(errors.splitlines(keepends=True)[-1], str(out))
    assert "No space left" in errors or "disk is full" in errors, errors
    assert metrics_in(out) == [], "half a result is left"
    code, errors = evaluate_short(protocol, out)
    assert code == 0, errors
    assert metrics_in(out) == metrics_in(expected), "the results differ"
    assert not [p for p in out.rglob("*tmp*") if p.is_file()], "unfinished files are left"
    return f"{protocol}, {name}: told in one line, then finished with the same result"


# ---- Damage ------------------------------------------------------------------------------------

LOADED = 100
"""Flips of a trial that are only loaded, without a command."""


@functools.cache
def interrupted_run() -> Path:
    """The folder of a short run that was interrupted after 4 of 6 steps."""
    out, data = cellar() / "interrupted", short_run().data
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert pretrain(out, data)[0] == EXIT_INTERRUPTED
    return out


@fault("bit flipped in a checkpoint", quick=1, full=20)
def flipped_bit(trial: Trial) -> Counter:
    """A run's checkpoint with a wrong bit is refused with one line and exit code 2, by the run that
    would go on from it and by an evaluation, and stays as it is; or the bit is where nothing is
    read from, and the run and the evaluation end as undisturbed ones."""
    content, outcomes = (interrupted_run() / "checkpoint.pt").read_bytes(), Counter()
    state = checkpoint.load(interrupted_run() / "checkpoint.pt")
    path = trial.folder / "checkpoint.pt"
    positions = trial.random.integers(0, 8 * len(content), size=1 + LOADED)
    for position in positions[1:]:
        path.write_bytes(flipped(content, position))
        try:
            assert equal_states(checkpoint.load(path), state), f"bit {position}: other weights"
            outcomes["the same weights"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused in one line"] += 1
    outcomes[use_damaged(trial.folder / "run", flipped(content, positions[0]))] += 1
    return outcomes


def flipped(content: bytes, position: int) -> bytes:
    """The bytes with another bit at a position, counted in bits."""
    damaged = bytearray(content)
    damaged[position // 8] ^= 1 << (position % 8)
    return bytes(damaged)


def use_damaged(out: Path, damaged: bytes) -> str:
    """Go on with an interrupted run whose checkpoint is damaged, and evaluate it."""
    shutil.copytree(interrupted_run(), out)
    (out / "checkpoint.pt").write_bytes(damaged)
    words = ("knn", f"--checkpoint={out}", f"--out={out}/knn")
    (code, errors), (again, more) = evaluated(*words), pretrain(out, short_run().data)
    if (code, again) == (0, 0):
        check_short(out)
        assert metrics_in(out / "knn") == metrics_in(interrupted_results())
        return "the commands ended as if undisturbed"
    assert (code, again) == (EXIT_USER_ERROR, EXIT_USER_ERROR), (code, errors, again, more)
    for told in (errors, more):
        assert_one_line(told, f"{out}/checkpoint.pt: not a readable checkpoint")
    assert (out / "checkpoint.pt").read_bytes() == damaged and metrics_in(out / "knn") == []
    return "both commands refused it in one line"


@functools.cache
def interrupted_results() -> Path:
    """The folder of the k-NN results of the interrupted run."""
    out = cellar() / "interrupted_knn"
    code, errors = evaluated("knn", f"--checkpoint={interrupted_run()}", f"--out={out}")
    assert code == 0, errors
    return out


# ---- Time --------------------------------------------------------------------------------------


@functools.cache
def number_of_delays() -> int:
    """How often a short run waits for its disk."""
    folder = cellar() / "delays"
    folder.mkdir()
    assert wait_for(begin_slow(folder, 0.0, None, None)) == 0, (folder / "log").read_text()
    return (folder / "delays").stat().st_size


def begin_slow(folder: Path, longest_s: float, random, last: int | None) -> int:
    """Fork a short run in `folder/run` on a slow disk, killed in its delay number `last`."""
    data = short_run().data
    random = random or mock.Mock(uniform=lambda low, high: high)

    def run():
        with slow_disk(folder, Delays(folder / "delays", longest_s, random, last)):
            return pretrain(folder / "run", data)[0]

    return begin(run, folder / "log")


@fault("slow disk", quick=1, full=10)
def killed_on_a_slow_disk(trial: Trial) -> dict[str, float]:
    """A run on a disk that takes its time in the middle of each write, and for each flush and
    rename, is killed in one of these moments; it goes on there to the metrics and the weights of
    another."""
    number = number_of_delays()
    last = 1 + int(trial.random.integers(number))
    longest_s = 0.003 if trial.quick else 0.03
    assert wait_for(begin_slow(trial.folder, longest_s, trial.random, last)) == -signal.SIGKILL
    assert (trial.folder / "delays").stat().st_size == last
    code = wait_for(begin_slow(trial.folder, longest_s, trial.random, None))
    assert code == 0, (trial.folder / "log").read_text()
    delays = (trial.folder / "delays").stat().st_size - last
    assert delays > 0, "the disk was not slow"
    check_short(trial.folder / "run")
    return {"delays before the kill": last, "delays after it": delays}


@fault("clock set back", quick=1, full=10)
def clock_set_back(trial: Trial) -> str:
    """A run is interrupted, its files get times of tomorrow, and it goes on while the system clock
    says yesterday: its metrics, events and weights are those of another, and an evaluation takes
    its last checkpoint."""
    undisturbed, out = short_run(), trial.folder / "run"
    run = functools.partial(pretrain, out, undisturbed.data, log__tensorboard=True)
    step = int(trial.random.integers(1, NUM_STEPS))
    with at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run()[0] == EXIT_INTERRUPTED
    tomorrow = time.time() + DAY_S
    for file in out.rglob("*"):
        os.utime(file, (tomorrow, tomorrow))
    before = set((out / EVENTS_FOLDER).iterdir())
    clock, reads = time.time, []

    def yesterday():
        reads.append(clock() - DAY_S)
        return reads[-1]

    with mock.patch.object(time, "time", yesterday):
        assert run() == (0, "")
        assert reads, "nobody looked at the clock"
        assert evaluated("knn", f"--checkpoint={out}", f"--out={trial.folder}/knn")[0] == 0
    assert len(set((out / EVENTS_FOLDER).iterdir()) - before) >= 1
    check_short(out)
    found, expected = metrics_in(trial.folder / "knn"), metrics_in(evaluated_short("knn"))
    assert found == expected, (found, expected)
    return "finished with the same metrics, events and weights"


# ---- Others at the same files ------------------------------------------------------------------


class _Others(SmallImages):
    """Other images of the same sizes, with the same labels."""

    def __getitem__(self, i):
        image, *others = super().__getitem__(i)
        return 255 - image, *others


@fault("data replaced under a run", quick=2, full=10)
def data_replaced(trial: Trial) -> str:
    """A run whose data set is replaced by another of the same size, renamed over it or written into
    it, trains on the former images or ends with one line that names the file; it is not resumed
    with other images."""
    former, _, expected, _ = short_run()
    data, out = trial.folder / "data.beton", trial.folder / "run"
    shutil.copyfile(former, data)
    other = write_images(trial.folder / "other.beton", _Others)
    assert other.stat().st_size == data.stat().st_size
    content = other.read_bytes()

    def replace():
        if trial.number % 2:
            with open(data, "r+b") as file:
                file.write(content)
        else:
            os.replace(other, data)

    with at_step(int(trial.random.integers(1, NUM_STEPS)), replace):
        code, errors = pretrain(out, data)
    how = "overwritten" if trial.number % 2 else "renamed over"
    if code == 0:
        assert records(out) == expected, "trained on other images"
        outcome = "went on with the former images"
    else:
        assert code == 2
        assert_one_line(errors, str(data))
        found = records(out)
        assert found == expected[: len(found)], "trained on other images before the error"
        outcome = "one line that names the file"
    code, errors = pretrain(out, data)
    assert code == 2
    assert_one_line(errors, "train data")
    return f"{how}: {outcome}; resume refused"


def start_two(trial: Trial, work) -> None:
    """Start work() in two processes at once, or one up to 0.3 s after the other: exactly one is
    refused, with one line and exit code 2."""
    late_s = float(trial.random.choice([0, trial.random.uniform(0, 0.3)]))
    logs = [trial.folder / "first.log", trial.folder / "second.log"]

    def late():
        time.sleep(late_s)
        return work()

    codes = [wait_for(pid) for pid in begin_together([work, late], logs)]
    told = [log.read_text() for log in logs]
    assert sorted(codes) == [0, EXIT_USER_ERROR], (codes, told)
    assert_one_line(told[codes.index(EXIT_USER_ERROR)], "another process trains here")


@fault("two runs in one folder", quick=1, full=10)
def two_runs(trial: Trial) -> str:
    """One of two runs that start in one folder is refused, in one line; the other ends with the
    metrics and the weights of a run alone."""
    out, data = trial.folder / "run", short_run().data

    def run():
        code, errors = pretrain(out, data)
        print(errors, end="")
        return code

    start_two(trial, run)
    check_short(out)
    return "one refused in one line, the other undisturbed"


@fault("two chains in one folder", quick=0, full=5)
def two_chains(trial: Trial) -> str:
    """One of two chains that start in one folder is refused, in one line; the other ends with the
    results of a chain alone."""
    undisturbed_chain()
    words = chain_words(trial.folder)
    start_two(trial, lambda: chain.main(words))
    check_chain(trial.folder)
    return "one refused in one line, the other undisturbed"
