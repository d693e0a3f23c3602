"""Disks: full, slow, replaced under a run; clocks set back; two runs in one folder.

Runs are tiny and in this process. A full disk is a file whose writes are refused with "No space
left on device", which needs neither a mount nor the rights to make one.
"""

import builtins
import contextlib
import errno
import functools
import io
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from support.small_files import SmallImages, write_small

import train
from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import MEASURED, read_metrics
from torture.frame import Trial, fault

SETTINGS = {
    "epochs": 2, "model.backbone": "tiny", "model.projector": "8-4", "optim.name": "sgd",
    "optim.lr": 0.1, "optim.warmup_epochs": 0.5, "resolution.min": 16, "resolution.max": 16,
    "data.batch_size": 8, "data.num_workers": 1, "log.every_steps": 1, "precision": "fp32",
    "evaluation.knn_k": 2, "system.device": "cpu", "system.torch_threads": 1,
    "log.tensorboard": "false", "checkpoint.keep_every": 1,
}  # fmt: skip
NUM_IMAGES, NUM_STEPS = 24, 6


def pretrain(out: Path, data: Path, **settings: object) -> tuple[int, str]:
    """(exit code, stderr) of a run of 2 epochs of 3 steps; `a__b` stands for the key `a.b`."""
    settings = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    words = [f"--out={out}", f"--data.train={data}", f"--data.val={data}"]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = train.main([*words, *(f"--{key}={value}" for key, value in settings.items())])
    return code, errors.getvalue()


def records(out: Path) -> list[dict]:
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(out)]


def write_data(path: Path, images: type = SmallImages) -> Path:
    with mock.patch("support.small_files.SmallImages", images):
        write_small(path, NUM_IMAGES, (16, 16), mode="raw")
    return path


@functools.cache
def undisturbed() -> tuple[Path, list[dict]]:
    """(data, records) of a run that nothing disturbs; made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="torture.undisturbed."))
    data = write_data(folder / "data.beton")
    assert pretrain(folder / "run", data) == (0, "")
    return data, records(folder / "run")


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


# ---- Full disks --------------------------------------------------------------------------------

WRITTEN = (
    "config.yaml", "metrics.jsonl", "events.out", "checkpoint.pt", "checkpoint_epoch_0001.pt",
    "report.png", "backbone.safetensors",
)  # fmt: skip


class _Full(io.FileIO):
    """A file with room for `room` bytes."""

    room = 0

    def write(self, content):
        self.room -= memoryview(content).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


@contextlib.contextmanager
def full_at(name: str, room: int, skip: int):
    """No space for files with `name` in their names, but for the first `skip` of them."""
    opened, original, seen = [], io.open, []

    def open_(file, mode="r", *args, **options):
        # TensorBoard opens bytes
        is_it = not isinstance(file, int) and name in Path(os.fsdecode(file)).name
        if not is_it or not set(mode) & set("wax+"):
            return original(file, mode, *args, **options)
        seen.append(file)
        if len(seen) <= skip:
            return original(file, mode, *args, **options)
        raw = _Full(file, mode.replace("b", "").replace("t", ""))
        raw.room = room
        opened.append(file)
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def no_links(*names):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with contextlib.ExitStack() as patches:
        for module in (io, builtins):
            patches.enter_context(mock.patch.object(module, "open", open_))
        if "epoch" in name:  # a link needs no space
            patches.enter_context(mock.patch.object(os, "link", no_links))
        yield opened


@fault("full disk under a run", quick=1, full=len(WRITTEN))
def full_disk(trial: Trial) -> str:
    """Whatever file of its folder a run cannot write, it ends with one line that names the reason
    and an exit code; what was saved stays, and started again it ends with the metrics of a run that
    nothing disturbed."""
    data, expected = undisturbed()
    # quick trials take the checkpoint
    name = WRITTEN[(trial.number + (3 if trial.quick else 0)) % len(WRITTEN)]
    skip = int(trial.random.integers(1, 3)) if name == "checkpoint.pt" else 0
    room = int(trial.random.integers(0, 40))
    more = {"log__tensorboard": "true"} if name == "events.out" else {}
    out = trial.folder / "run"
    with full_at(name, room, skip) as opened:
        code, errors = pretrain(out, data, **more)
    assert opened, f"{name} was never written"
    assert code == 2, (code, errors)
    if name == "events.out":  # TensorBoard's thread prints a traceback of its own before
        errors = errors.splitlines(keepends=True)[-1]
    assert_one_line(errors, str(out), "No space left on device", "free some space")
    assert not list(out.glob("*.tmp")), list(out.iterdir())
    for file in out.glob("checkpoint*.pt"):
        checkpoint.load(file)
    assert pretrain(out, data, **more)[0] == 0
    assert records(out) == expected
    return f"{name}: refused writes told in one line, then finished with the same metrics"


# ---- Damage ------------------------------------------------------------------------------------


def _equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@fault("bit flipped in a checkpoint", quick=1, full=20)
def flipped_bit(trial: Trial) -> Counter:
    """A checkpoint with a wrong bit is refused in one line, or the bit is where nothing is read
    from and the same weights load."""
    path, outcomes = trial.folder / "checkpoint.pt", Counter()
    weights = {f"layer{i}": torch.full((i + 1, 7), 0.1 * i) for i in range(6)}
    state = {"model": weights, "config": {"optim": {"lr": 0.1}}, "step": 3, "note": "a"}
    checkpoint.save(path, state)
    content = path.read_bytes()
    for position in trial.random.integers(0, 8 * len(content), size=100):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert _equal(checkpoint.load(path), state), f"bit {position} gives other weights"
            outcomes["the same weights"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused in one line"] += 1
    return outcomes


# ---- Time --------------------------------------------------------------------------------------


@fault("slow disk", quick=1, full=3)
def slow_disk(trial: Trial) -> str:
    """A run on a disk that takes its time for every flush and rename has the metrics of another."""
    data, expected = undisturbed()

    def slowly(function):
        def call(*args, **options):
            time.sleep(trial.random.uniform(0, 0.02 if trial.quick else 0.5))
            return function(*args, **options)

        return call

    with (
        mock.patch.object(os, "fsync", slowly(os.fsync)),
        mock.patch.object(os, "replace", slowly(os.replace)),
    ):
        assert pretrain(trial.folder / "run", data) == (0, "")
    assert records(trial.folder / "run") == expected
    return "finished with the same metrics"


@fault("clock set back", quick=1, full=3)
def clock_set_back(trial: Trial) -> str:
    """A run whose system clock is set back by a day has the metrics of another, and ends."""
    data, expected = undisturbed()
    clock, offset = time.time, [0.0]

    def set_back():
        offset[0] = -86400.0

    step = int(trial.random.integers(1, NUM_STEPS))
    with mock.patch.object(time, "time", lambda: clock() + offset[0]), at_step(step, set_back):
        assert pretrain(trial.folder / "run", data) == (0, "")
    assert records(trial.folder / "run") == expected
    return "finished with the same metrics"


# ---- Others at the same files ------------------------------------------------------------------


class _Others(SmallImages):
    """Other images of the same sizes, with the same labels."""

    def __getitem__(self, i):
        image, *others = super().__getitem__(i)
        return 255 - image, *others


@fault("data replaced under a run", quick=2, full=10)
def data_replaced(trial: Trial) -> str:
    """Where a data set is replaced by another of the same size under a run, renamed over it or
    written into it, the run trains on the former images or ends with one line that names the file;
    it is not resumed with other images."""
    former, expected = undisturbed()
    data, out = trial.folder / "data.beton", trial.folder / "run"
    shutil.copyfile(former, data)
    other = write_data(trial.folder / "other.beton", _Others)
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


@fault("two runs in one folder", quick=1, full=5)
def two_runs(trial: Trial) -> str:
    """A second run in the folder of a running one is refused in one line; the first one ends with
    the metrics of a run alone."""
    data, expected = undisturbed()
    out, seen = trial.folder / "run", []
    step = int(trial.random.integers(1, NUM_STEPS + 1))
    with at_step(step, lambda: seen.append(pretrain(out, data))):
        assert pretrain(out, data) == (0, "")
    ((code, errors),) = seen
    assert code == 2
    assert_one_line(errors, str(out), "another process trains here")
    assert records(out) == expected
    return "the second refused in one line, the first undisturbed"
