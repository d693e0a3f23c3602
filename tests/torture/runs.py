"""Tiny runs that trials disturb, and what undisturbed ones leave: computed once for each kind."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from support.process_limits import free_port
from support.small_files import SmallImages, write_small
from support.states import equal_states
from support.tuning_files import records

import train
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.methods.find import library_methods
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import EVENTS_FOLDER, X_AXES, read_metrics
from torture.processes import begin, cellar, wait_for

TINY = {
    "epochs": 2, "model.backbone": "tiny", "model.projector": "16-8", "optim.name": "sgd",
    "optim.lr": 0.05, "optim.warmup_epochs": 0, "resolution.min": 16, "resolution.max": 16,
    "data.num_workers": 1, "log.every_steps": 1, "log.tensorboard": False, "precision": "fp32",
    "system.device": "cpu", "system.torch_threads": 1,
}  # fmt: skip
SHORT = {"data.batch_size": 8, "evaluation.knn_k": 2, "checkpoint.keep_every": 1}
"""2 epochs of 3 steps."""
LONGER = {
    "data.batch_size": 16, "evaluation.batch_size": 20, "evaluation.knn_bank": 50,
    "views.small_images": True,
}  # fmt: skip
"""2 epochs of 6 steps."""
NUM_IMAGES, NUM_STEPS = 24, 6
LABELLED = {"labelled.loss": "suncet", "labelled.classes_per_batch": 3,
            "labelled.images_per_class": 4, "labelled.labels.fraction": 0.8}  # fmt: skip
INSTANCE = {"views.recipe": "instance"}
METHODS = (*train.METHODS, *sorted(library_methods()))
CASES = tuple(itertools.product(METHODS, (False, True)))
"""(method, whether a labelled stream trains beside it)."""
CADENCES_MINUTES = (1e-6, 5e-4, 10.0)
"""A checkpoint after each step, after a few, at the ends of epochs only."""


def words_of(settings: dict[str, Any], **more: Any) -> list[str]:
    """Words of a command line; `a__b` stands for the key `a.b`."""
    settings = {**settings, **{key.replace("__", "."): value for key, value in more.items()}}
    return [f"--{key}={value}" for key, value in settings.items()]


@functools.cache
def run_ahead() -> None:
    """Train once in this process, so that its forks need no time for imports and kernels, and their
    signals meet a run at work. No thread of it is left, as a fork has none of its parent's."""
    words = training_words("simclr", True, cellar() / "ahead", log__tensorboard=True)
    before, deadline = len(os.listdir("/proc/self/task")), time.monotonic() + 20
    assert train.main(words) == 0
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline, "a run leaves threads behind"
        time.sleep(0.02)


# ---- Short runs in this process ------------------------------------------------------------------


def write_images(path: Path, images: type = SmallImages) -> Path:
    """A file of NUM_IMAGES images."""
    with mock.patch("support.small_files.SmallImages", images):
        write_small(path, NUM_IMAGES, (16, 16), mode="raw")
    return path


def pretrain(out: Path, data: Path, **settings: object) -> tuple[int, str]:
    """(exit code, stderr) of a run of 2 epochs of 3 steps; `a__b` stands for the key `a.b`."""
    given = {**TINY, **SHORT, "out": out, "data.train": data, "data.val": data}
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = train.main(words_of(given, **settings))
    return code, errors.getvalue()


class Short(NamedTuple):
    """A short run that nothing disturbed: its data, its folder, its metrics and its state."""

    data: Path
    out: Path
    records: list[dict[str, Any]]
    state: dict[str, Any]


@functools.cache
def short_run() -> Short:
    """A short run, with TensorBoard; it stays as it is."""
    data, out = write_images(cellar() / "short.beton"), cellar() / "short"
    assert pretrain(out, data, log__tensorboard=True) == (0, "")
    return Short(data, out, records(out), trained_state(out))


def check_short(out: Path) -> None:
    """Whether a short run ended as an undisturbed one."""
    check_equal(out, short_run().records, short_run().state)


# ---- Longer runs in processes of their own -------------------------------------------------------


@functools.cache
def images() -> dict[str, str]:
    """Files to train and to validate on."""
    sizes = {"train": 100, "val": 33}
    paths = {part: cellar() / f"{part}.beton" for part in sizes}
    return {
        f"data.{part}": write_small(path, sizes[part], (16, 16), mode="raw")
        for part, path in paths.items()
    }


def training_words(method: str, has_labels: bool, out: Path, **settings: Any) -> list[str]:
    """The command line of train.py for a method."""
    given = {**TINY, **LONGER, **images(), "method": method, "out": out}
    given |= LABELLED if has_labels else {}
    given |= INSTANCE if method == "instance_simclr" else {}
    return words_of(given, **settings)


class Undisturbed(NamedTuple):
    """What a run leaves that nothing ended, and how long it took."""

    records: list[dict[str, Any]]
    state: dict[str, Any]
    seconds: float


@functools.cache
def undisturbed(method: str, has_labels: bool, size: int = 1) -> Undisturbed:
    """A run of a method on `size` ranks."""
    run_ahead()
    out = cellar() / f"{method}_{has_labels}_{size}"
    log, began = out.with_suffix(".log"), time.monotonic()
    words = training_words(method, has_labels, out)
    codes = [wait_for(pid) for pid in begin_ranks(lambda: train.main(words), size, log)]
    assert codes == [0] * size, log.read_text()[-2000:]
    return Undisturbed(records(out), trained_state(out), time.monotonic() - began)


def begin_ranks(work: Callable[[], Any], size: int, log: Path) -> list[int]:
    """Fork a process for each rank, as torchrun starts them. Their ids."""
    if size == 1:
        return [begin(work, log)]
    port = free_port()

    def as_rank(rank):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in launcher.items()})
        return work()

    return [begin(functools.partial(as_rank, rank), log) for rank in range(size)]


# ---- An extended run, watched on files of its own ------------------------------------------------

NUM_EXTENDED_LINES = 17
"""Of its metrics: 12 steps and 5 evaluations."""


class Unlabelled(SmallImages):
    """The same images without labels."""

    def __getitem__(self, i):
        image, _, *others = super().__getitem__(i)
        return image, -1, *others


def watched_words(out: Path, **settings: Any) -> list[str]:
    """A run of 2 epochs of 3 steps on images without labels."""
    unlabelled, labelled = cellar() / "unlabelled.beton", short_run().data
    if not unlabelled.exists():
        write_images(unlabelled, Unlabelled)
    given = {
        **TINY, **SHORT, "data.train": unlabelled, "probes.train": labelled,
        "probes.val": labelled, "init_from": short_run().out, "out": out,
    }  # fmt: skip
    return words_of(given, **settings)


@functools.cache
def watched_run() -> Path:
    """Its folder, finished; it stays as it is."""
    out = cellar() / "watched"
    assert train.main(watched_words(out)) == 0
    return out


def extended_words(out: Path, **settings: Any) -> list[str]:
    """The same run with 2 more epochs."""
    return watched_words(out, epochs=4, extend=True, **settings)


@functools.cache
def extended_run() -> Undisturbed:
    """The run extended, and how long it took in a process of its own."""
    out = shutil.copytree(watched_run(), cellar() / "extended")
    log, began = out.with_suffix(".log"), time.monotonic()
    assert wait_for(begin(lambda: train.main(extended_words(out)), log)) == 0, log.read_text()
    return Undisturbed(records(out), trained_state(out), time.monotonic() - began)


# ---- What they leave -----------------------------------------------------------------------------


def trained_state(out: Path) -> dict[str, Any]:
    """The weights and all that trains them at a run's end."""
    saved = checkpoint.load(out / "checkpoint.pt")
    names = ("model", "method", "optimizer", "probes", "labelled", "step", "rng")
    return {name: saved[name] for name in names if name in saved}


def check_equal(out: Path, metrics: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Whether a run left these metrics and this state, and nothing unfinished."""
    assert records(out) == metrics, "the metrics differ"
    assert equal_states(trained_state(out), state), "the weights differ"
    assert not list(out.glob("*.tmp")), "unfinished files are left"
    if (out / EVENTS_FOLDER).exists():
        check_events(out)


def check_events(out: Path) -> None:
    """Whether TensorBoard shows what the metrics hold: no step is lost, hidden or shown twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / EVENTS_FOLDER), size_guidance={"scalars": 0})
    events.Reload()
    shown = {
        (key, event.step, np.float32(event.value))
        for key in events.Tags()["scalars"]
        for event in events.Scalars(key)
    }
    number = sum(len(events.Scalars(key)) for key in events.Tags()["scalars"])
    written = [
        (key, record["step"], np.float32(value))
        for record in read_metrics(out)
        for key, value in record.items()
        if key not in X_AXES and isinstance(value, int | float)
    ]
    lost = sorted(set(written) - shown)[:3]
    assert not lost and number == len(written), f"{number} events of {len(written)}, lost {lost}"


def metrics_in(folder: Path) -> list[dict]:
    """The figures of the results in a folder, without the names of pictures, which tell the path of
    the checkpoint."""
    return [without_pictures(record["metrics"]) for record in read_results(folder)]


def without_pictures(figures: Any) -> Any:
    """Figures, of one depth or of several, without the names of pictures."""
    if not isinstance(figures, dict):
        return figures
    return {key: without_pictures(of_it) for key, of_it in figures.items() if key != "confusion"}


def where_it_fell(out: Path) -> str:
    """Where a longer run stood when it was ended, from what it left."""
    if not (out / "checkpoint.pt").exists():
        return "before the first checkpoint"
    step = checkpoint.load(out / "checkpoint.pt")["step"]
    lines = records(out)
    evaluated = {line["step"] for line in lines if any(key.startswith("val/") for key in line)}
    if step == 12:
        return "at the end" if step in evaluated else "in evaluation"
    if step == 6 and step not in evaluated:
        return "in evaluation"
    return "in training"
