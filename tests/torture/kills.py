"""Processes ended at random moments: writers, training, fine-tuning, chains.

What an undisturbed run leaves is computed once for each kind of run.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from support.small_files import SmallImages, write_small
from support.tuning_files import (
    NUM_CLASSES,
    alone,
    parse,
    records,
    tiny_encoder,
    without_clock,
    write_coloured,
)

import train
from ffcv_ssl import BetonError, DatasetWriter, Reader
from ffcv_ssl.errors import Interrupted
from ffcv_ssl.evaluation import protocol_run
from ffcv_ssl.evaluation.protocols import finetune, transfer
from ffcv_ssl.fields import BytesField, FloatField, IntField, RGBImageField
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import EXIT_INTERRUPTED, StopSignal
from torture.frame import Trial, fault
from torture.processes import (
    begin,
    cellar,
    end_after,
    gone,
    ranks_of,
    same,
    start,
    start_ranks,
    wait_for,
)

KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = (*KILLS, signal.SIGHUP)


# ---- Writing -------------------------------------------------------------------------------------

NUM_SAMPLES, NUM_OLD = 60, 7


class Dawdling(SmallImages):
    """Images that take a moment, so that a kill meets the writer at work."""

    def __getitem__(self, i):
        time.sleep(0.002)
        return super().__getitem__(i)


def write(path: Path, number: int = NUM_SAMPLES) -> None:
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


@functools.cache
def seconds_to_write() -> float:
    path = cellar() / "timed.beton"
    began = time.monotonic()
    assert wait_for(begin(lambda: write(path), cellar() / "log")) == 0
    return time.monotonic() - began


@fault("a writer is ended at a random moment", quick=3, full=100)
def _(trial: Trial) -> str:
    """A file that opens is whole, the old one or the new one; nobody is left behind; the next
    writer succeeds and leaves nothing else in the folder."""
    folder = trial.folder / "data"
    folder.mkdir()
    path, had_old = folder / "a.beton", trial.random.random() < 0.5
    if had_old:
        write_small(path, NUM_OLD, mode="raw")
    number = int(trial.random.choice(ENDS))
    moment_s = trial.random.uniform(0, 1.1) * seconds_to_write()
    pid = begin(lambda: write(path), trial.folder / "log")
    code = end_after(pid, moment_s, number, whole_group=trial.random.random() < 0.5)
    assert gone(pid), "processes of the writer are left"
    opened = sorted(p.name for p in folder.iterdir() if _opens(p))
    assert opened in ([], ["a.beton"]), f"{opened} open"
    assert opened or not had_old, "the old file is gone"
    if opened:
        has_new = is_whole(path, NUM_SAMPLES)
        assert has_new or (had_old and is_whole(path, NUM_OLD)), "a file that opens is wrong"
        assert has_new or code is not None
    assert wait_for(begin(lambda: write(path), trial.folder / "log")) == 0
    assert is_whole(path, NUM_SAMPLES)
    assert [p.name for p in folder.iterdir()] == ["a.beton"], sorted(folder.iterdir())
    return _where(moment_s / seconds_to_write(), code, bool(opened) and has_new)


def _opens(path: Path) -> bool:
    try:
        Reader(path).close()
    except (BetonError, OSError):
        return False
    return True


def _where(share: float, code: int | None, is_done: bool) -> str:
    if code is None:
        return "after the end"
    if is_done:
        return "at the end"
    return "in the first third" if share < 1 / 3 else "later"


# ---- Training ------------------------------------------------------------------------------------

SETTINGS = {
    "epochs": 2, "data.batch_size": 16, "data.num_workers": 1, "views.small_images": True,
    "resolution.min": 16, "resolution.max": 16, "model.backbone": "tiny",
    "model.projector": "16-8", "optim.name": "sgd", "optim.lr": 0.05, "optim.warmup_epochs": 0,
    "evaluation.batch_size": 20, "evaluation.knn_bank": 50, "log.every_steps": 1,
    "log.tensorboard": False, "system.device": "cpu", "system.torch_threads": 1,
    "precision": "fp32", "checkpoint.every_minutes": 1e-6,
}  # fmt: skip
METHODS = ("simclr", "vicreg", "barlow", "byol", "moco", "simsiam", "supervised")
LABELLED = {"labelled.loss": "suncet", "labelled.classes_per_batch": 3,
            "labelled.images_per_class": 4}  # fmt: skip


@functools.cache
def images() -> dict[str, str]:
    """Files to train and to validate on."""
    sizes = {"train": 100, "val": 33}
    paths = {part: cellar() / f"{part}.beton" for part in sizes}
    return {
        f"data.{part}": write_small(path, sizes[part], (16, 16), mode="raw")
        for part, path in paths.items()
    }


class Undisturbed(NamedTuple):
    """What a run leaves that nothing ended, and how long it took."""

    records: list[dict[str, Any]]
    state: dict[str, Any]
    seconds: float


def words_of(method: str, has_labels: bool, out: Path) -> list[str]:
    given = {**SETTINGS, **images(), "method": method, "out": out}
    given |= LABELLED if has_labels else {}
    return [f"--{key}={value}" for key, value in given.items()]


def trained_state(out: Path) -> dict[str, Any]:
    """The weights and all that trains them at a run's end."""
    saved = checkpoint.load(out / "checkpoint.pt")
    return {name: saved[name] for name in ("model", "method", "optimizer", "probes", "step")}


@functools.cache
def undisturbed(method: str, has_labels: bool, size: int = 1) -> Undisturbed:
    out = cellar() / f"{method}_{has_labels}_{size}"
    words, began = words_of(method, has_labels, out), time.monotonic()
    if size == 1:
        code = wait_for(begin(lambda: train.main(words), out.with_suffix(".log")))
    else:
        code = start_ranks(words, size, out.with_suffix(".log")).wait()
    assert code == 0, out.with_suffix(".log").read_text()[-2000:]
    return Undisturbed(records(out), trained_state(out), time.monotonic() - began)


def where_it_fell(out: Path, is_ended: bool) -> str:
    """Where a run stood when it was ended, from what it left."""
    if is_ended:
        return "after the end"
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


def check_equal(out: Path, expected: Undisturbed) -> None:
    assert records(out) == expected.records, "the metrics differ"
    assert same(trained_state(out), expected.state), "the weights differ"
    assert not list(out.glob("*.tmp")), "unfinished files are left"


@fault("training is ended at random moments and goes on", quick=1, full=42)
def _(trial: Trial) -> str:
    """A run ended by SIGKILL, SIGTERM or SIGINT at any moment, and again as it goes on, ends with
    the metrics and the weights of an undisturbed one, for every method and a labelled stream."""
    cases = [*((method, False) for method in METHODS), ("simclr", True), ("byol", True)]
    method, has_labels = cases[trial.number % len(cases)]
    expected, out = undisturbed(method, has_labels), trial.folder / "run"
    words, log = words_of(method, has_labels, out), trial.folder / "log"
    fell = ""
    for _ in range(int(trial.random.integers(1, 3))):
        moment_s = trial.random.uniform(0, 1.1) * expected.seconds
        number = int(trial.random.choice(KILLS))
        code = end_after(begin(lambda: train.main(words), log), moment_s, number)
        # a signal that comes before the run listens, or when it is over, ends it as usual
        allowed = {None, 0, EXIT_INTERRUPTED, -number, 1 if number == signal.SIGINT else 0}
        assert code in allowed, f"exit code {code}: {log.read_text()[-2000:]}"
        fell = fell or where_it_fell(out, code in (None, 0))
    code = wait_for(begin(lambda: train.main(words), log))
    assert code == 0, log.read_text()[-2000:]
    check_equal(out, expected)
    return fell


@fault("two ranks under torchrun are ended at random moments", quick=0, full=8, limit_s=400)
def _(trial: Trial) -> str:
    """torchrun, or one of its ranks, is ended; the run goes on to the undisturbed numbers."""
    method = ("simclr", "byol", "moco", "vicreg")[trial.number % 4]
    expected, out = undisturbed(method, False, 2), trial.folder / "run"
    words, log = words_of(method, False, out), trial.folder / "log"
    process = start_ranks(words, 2, log)
    # half of the time passes before torch is imported: that half is drawn less often
    deadline = time.monotonic() + trial.random.uniform(0.3, 1.1) * expected.seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    is_ended, victims = process.poll() is not None, [process.pid]
    if trial.random.random() < 0.5:
        victims = ranks_of(process.pid) or victims
    if not is_ended:
        os.kill(int(trial.random.choice(victims)), int(trial.random.choice(KILLS)))
        try:
            process.wait(90)
        finally:
            if not gone(process.pid, 5):  # ranks whose torchrun was killed
                os.killpg(process.pid, signal.SIGKILL)
    assert gone(process.pid)
    fell = where_it_fell(out, is_ended)
    assert start_ranks(words, 2, log).wait(200) == 0, log.read_text()[-2000:]
    check_equal(out, expected)
    return fell


# ---- Fine-tuning ---------------------------------------------------------------------------------

PROTOCOLS = {
    "finetune": (finetune.FineTuneConfig, finetune.run, {"epochs": 3, "optim__lr": 0.5}),
    "transfer": (
        transfer.TransferConfig,
        transfer.run,
        {"steps": 8, "grid__lrs": "[0.01, 0.3]", "grid__weight_decays": "[0]"},
    ),
}


@functools.cache
def coloured() -> dict[str, str]:
    """Files of labelled images whose colour tells their class."""
    return {
        f"data__{part}": write_coloured(cellar() / f"c_{part}.beton", np.arange(n) % NUM_CLASSES)
        for part, n in (("train", 120), ("val", 60))
    }


def tune(protocol: str, out: Path) -> int:
    """The run of a protocol in this process, with an encoder of a thousand weights."""
    config_class, function, usual = PROTOCOLS[protocol]
    protocol_run.open_encoder = lambda config, world: tiny_encoder()
    config = parse(config_class, **usual, **coloured(), out=out, saving__every_minutes=1e-6)
    torch.set_num_threads(1)
    with StopSignal() as stop:
        try:
            record = function(config, alone(), stop)
        except Interrupted:
            return EXIT_INTERRUPTED
    (out / "record").write_text(json.dumps(without_clock(record), sort_keys=True, default=str))
    return 0


@functools.cache
def undisturbed_tuning(protocol: str) -> tuple[str, list[dict[str, Any]], float]:
    out, began = cellar() / protocol, time.monotonic()
    coloured()
    log = cellar() / f"{protocol}.log"
    assert wait_for(begin(lambda: tune(protocol, out), log)) == 0, log.read_text()[-2000:]
    return (out / "record").read_text(), records(out), time.monotonic() - began


@fault("fine-tuning is ended at random moments and goes on", quick=1, full=12)
def _(trial: Trial) -> str:
    """Fine-tuning or transfer, ended at any moment, ends with the undisturbed result."""
    protocol = tuple(PROTOCOLS)[trial.number % 2]
    result, lines, seconds = undisturbed_tuning(protocol)
    out, log = trial.folder / "run", trial.folder / "log"
    number = int(trial.random.choice(KILLS))
    moment_s = trial.random.uniform(0, 1.1) * seconds
    code = end_after(begin(lambda: tune(protocol, out), log), moment_s, number)
    fell = "after the end" if code in (None, 0) else "in training"
    if not (out / "checkpoint.pt").exists():
        fell = "before the first checkpoint"
    assert wait_for(begin(lambda: tune(protocol, out), log)) == 0, log.read_text()[-2000:]
    assert (out / "record").read_text() == result, "the results differ"
    assert records(out) == lines, "the metrics differ"
    return fell


# ---- Chains --------------------------------------------------------------------------------------


def chain_words(folder: Path) -> list[str]:
    """The words of a chain that pretrains and then fits a probe, in `folder/out`."""
    usual = {key: value for key, value in {**SETTINGS, **images()}.items() if key != "out"}
    probe = {
        "checkpoint": "{pretrain}", **images(), "data.num_workers": 1, "system.device": "cpu",
        "system.torch_threads": 1,
    }  # fmt: skip
    stages = {
        "pretrain": {"command": "train", "overrides": usual},
        "probe": {"command": "knn", "overrides": probe},
    }
    path = folder / "chain.yaml"
    path.write_text(json.dumps({"out": str(folder / "out"), "stages": stages}))
    return ["-m", "ffcv_ssl.jobs.chain", str(path)]


def chain_results(folder: Path) -> tuple[Any, ...]:
    out = folder / "out"
    found = json.loads((out / "probe" / "results.jsonl").read_text().splitlines()[-1])
    return records(out / "pretrain"), found["metrics"], trained_state(out / "pretrain")


@functools.cache
def undisturbed_chain() -> tuple[tuple[Any, ...], float]:
    folder = cellar() / "chain"
    folder.mkdir()
    began, log = time.monotonic(), folder / "log"
    assert start(chain_words(folder), log).wait(300) == 0, log.read_text()[-2000:]
    return chain_results(folder), time.monotonic() - began


@fault("a chain is ended at random moments and goes on", quick=0, full=8, limit_s=600)
def _(trial: Trial) -> str:
    """A chain, alone or with the stage that it runs, is ended at any moment; the same command then
    ends with the undisturbed results of every stage."""
    expected, seconds = undisturbed_chain()
    words, log = chain_words(trial.folder), trial.folder / "log"
    process = start(words, log)
    deadline = time.monotonic() + trial.random.uniform(0, 1.1) * seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    is_ended = process.poll() is not None
    if not is_ended:
        number, is_group = int(trial.random.choice(KILLS)), trial.random.random() < 0.5
        (os.killpg if is_group else os.kill)(process.pid, number)
        process.wait(120)
        assert gone(process.pid, 120), "a stage of the ended chain hangs"
    fell = where_it_fell(trial.folder / "out" / "pretrain", is_ended)
    assert start(words, log).wait(300) == 0, log.read_text()[-2000:]
    found = chain_results(trial.folder)
    assert found[:2] == expected[:2], "the results differ"
    assert same(found[2], expected[2]), "the weights differ"
    return fell
