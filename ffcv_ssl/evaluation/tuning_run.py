"""Runs that train a network on labels: their settings, data, folder and checkpoints.

Guarantees: a run is found again by its folder and refused where anything that decides its result
differs; a signal ends it with a checkpoint from which it goes on exactly.
"""

# N samples, K classes or labels

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveFloat

from ffcv_ssl.config import settings
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation import common
from ffcv_ssl.evaluation.encoder import FINETUNED, save_encoder
from ffcv_ssl.evaluation.results import make_record, report
from ffcv_ssl.evaluation.tuning import ClassTargets, MultiTargets
from ffcv_ssl.fields import NDArrayField
from ffcv_ssl.files import hold_folder
from ffcv_ssl.jobs.slurm import SlurmConfig
from ffcv_ssl.reader import Reader
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.label_choice import class_counts
from ffcv_ssl.training.run_data import open_dataset, rank_share
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT, RunFolder

AGREE_EVERY = 8  # steps between two moments when several ranks agree on whether to save or stop
# A resumed run may differ in these and in nothing else; what the paths hold is compared instead.
FREE_KEYS = ("checkpoint", "out", "data.train", "data.val", "data.num_workers", "data.os_cache")
FREE_GROUPS = ("saving.", "log.", "system.", "slurm.")


@dataclass(frozen=True)
class SavingConfig:
    """When a run is saved; at its end it is in any case."""

    every_minutes: PositiveFloat = 10.0
    """Minutes between checkpoints."""


@dataclass(frozen=True)
class Tuning(common.Evaluation):
    """What runs that train a pretrained network on labels have in common."""

    out: str | None = None
    """The run's folder, and that of its result; null: one named after the run in the checkpoint's
    folder, and the result in that itself."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the network's forward pass; bf16 is autocast. The loss is float32 in any case."""
    layer: NonNegativeInt = 0
    """What the classifier sees: 0 the backbone's features, k those after the projector's layer k
    with its batch-norm and ReLU (the last layer has no ReLU)."""
    holdout: float = 0.1
    """Share of the training labels, of each class, that `select: holdout` selects on."""
    saving: SavingConfig = field(default_factory=SavingConfig)
    log: settings.LogConfig = field(default_factory=settings.LogConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self):
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout: got {self.holdout:g}, expected above 0, below 1")
        if self.slurm.partition is not None and self.out is None:
            raise UserError("out: got none, expected a folder for the job: --out runs/NAME")


# ---- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a run trains, selects and measures on."""

    pair: common.Pair
    train: ClassTargets | MultiTargets
    """Targets of the training file's samples."""
    val: ClassTargets | MultiTargets
    """Targets of the validation file's samples."""
    labels: str
    """The labels that may be used, in words."""

    def split(self, fraction, seed):
        """Indices (rest, held out) of the training samples that may be used. Raises UserError
        where the latter can select nothing."""
        rest, held_out = common.split_holdout(self.pair.labels, fraction, seed)
        if len(held_out) == 0:
            raise UserError("holdout: no class has two labels to hold one out; choose more labels")
        several = isinstance(self.train, MultiTargets)
        if several and not (self.train.labels[held_out] == 1).any():
            got = f"none of the {len(held_out)} images held out has any of the labels"
            raise UserError(f"holdout: {got}; use a larger --holdout or another --seed")
        return rest, held_out

    def train_loader(self, indices, batch_size, seed, world):
        """Cropped and flipped views of some training samples, in random order. Raises UserError
        where they make no batch, or one of a single image a rank."""
        share = rank_share("data.batch_size", batch_size, world)
        if share == 1:
            got = f"got {batch_size} for {world.size} ranks, so that batch-norm would see one image"
            raise UserError(f"data.batch_size: {got} alone; expected {2 * world.size} or more")
        loader = common.augmented_loader(
            self.pair.train, self.pair, world, seed, indices=indices, batch_size=share
        )
        if len(loader) == 0:
            loader.close()
            got = f"{len(indices)} labelled samples make no batch of {batch_size}"
            raise UserError(f"{self.pair.train.path}: {got}; lower data.batch_size")
        return loader

    def clean_loader(self, part, world, indices=None):
        """Centre crops of samples of `train` or `val`, by default of all that have a label."""
        dataset = getattr(self.pair, part)
        if indices is None and dataset.labels is not None:
            indices = np.flatnonzero(dataset.labels >= 0)
        return common.clean_loader(dataset, self.pair, world, indices)

    def describe(self):
        """The data for a record."""
        return {**self.pair.describe(), "labels": self.labels}


def open_task(config, encoder, world):
    """The data of a `Tuning`: one class a sample, or several labels where the field is an array.

    Raises UserError where a file or its labels are missing, or the two files' labels differ.
    """
    data = config.data
    if data.train and _is_array(data.train, data.label_field):
        return _open_labels(config, encoder, world)
    pair = common.open_pair(data, config.labels, encoder)
    targets = (
        ClassTargets(labels, pair.num_classes, world.device)
        for labels in (pair.labels, pair.val.labels)
    )
    return Task(pair, *targets, class_counts(pair.labels, pair.num_classes))


def _is_array(path, field_name):
    if not Path(path).is_file():
        return False
    with Reader(path) as reader:
        return isinstance(reader.fields.get(field_name), NDArrayField)


def _open_labels(config, encoder, world):
    """The task of files whose label field is an array of K numbers, 1, 0 or -1."""
    data = config.data
    if not config.labels.is_all:
        raise UserError("labels: got a choice, but the images have several labels each; use all")
    if not data.val:
        raise UserError("data.val: got none, expected --data.val FILE.beton")
    sets = [open_dataset(p, data.image_field, data.label_field) for p in (data.train, data.val)]
    train, val = (_read_labels(dataset, data.label_field) for dataset in sets)
    if train.shape[1] != val.shape[1]:
        sides = f"{val.shape[1]} labels an image, expected {train.shape[1]} as in {data.train}"
        raise UserError(f"{data.val}: field '{data.label_field}': got {sides}")
    if not (val == 1).any():
        raise UserError(f"{data.val}: field '{data.label_field}': no image has any of the labels")
    loading, px, ratio = common.resolve_data(data, encoder)
    everyone = np.zeros(len(train), np.int64)  # one class of samples, of which any may be held out
    pair = common.Pair(*sets, everyone, train.shape[1], None, loading, px, ratio)
    words = f"{len(train)} images, {train.shape[1]} labels each"
    targets = (MultiTargets(labels, world.device) for labels in (train, val))
    return Task(pair, *targets, words)


def _read_labels(dataset, field_name):
    """(N, K) int8. Raises UserError for other values than 1, 0 and -1."""
    with Reader(dataset.path) as reader:
        where = f"{dataset.path}: field '{field_name}'"
        shape = getattr(reader.fields.get(field_name), "shape", ())
        if len(shape) != 1:
            raise UserError(f"{where}: got no list of labels, expected an array of (K,) a sample")
        labels = np.stack([reader.decode(i, field_name) for i in range(dataset.num_samples)])
    bad = np.argwhere(~np.isin(labels, (-1, 0, 1)))
    if len(bad):
        sample, label = bad[0]
        got = f"sample {sample} has {labels[sample, label]} for label {label}"
        raise UserError(f"{where}: {got}, expected 1, 0 or -1 (left out)")
    return labels.astype(np.int8)


# ---- The folder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a run begins with, weights or labels, as a RunFolder compares it."""

    text: str

    def describe(self):
        """Equal for equal content."""
        return self.text


@contextlib.contextmanager
def open_run(config, name, encoder, task, world):
    """Within it: (the run's RunFolder, its checkpoint's state or None, the folder of results).

    config: with what its data left open resolved; name: of the folder where `out` names none.
    Raises UserError where the folder is another run's.
    """
    results = common.results_folder(config)
    path = results if config.out else results / name
    source = Path(config.checkpoint)
    source = source if source.is_dir() else source.parent
    has_copies = any(path.glob("checkpoint_epoch_*.pt"))  # which a run of this kind never makes
    if (path / BACKBONE).exists() or has_copies or path.resolve() == source.resolve():
        raise UserError(f"out: got {path}, a pretraining run's folder; use another --out")
    with hold_folder(path) if world.is_first else contextlib.nullcontext():
        sets = {
            "train": task.pair.train,
            "val": task.pair.val,
            "pretrained": Content(encoder.fingerprint),
            "labels": Content(f"{common.labels_digest(task.pair)} ({task.labels})"),
        }
        folder = RunFolder(path, config_dict(config), sets, FREE_KEYS, FREE_GROUPS, world.is_first)
        saved = folder.read_checkpoint()
        world.barrier()  # the first rank may write one as soon as all have read
        try:
            yield folder, saved, results
        finally:
            folder.close()


def tune(protocol, make, config, world, stop):
    """Do what a `Tuning` says, or go on; returns the result's record, the same one if it was
    finished. make: the run's class. The folder of a transfer also bears its data's name."""
    encoder = common.open_encoder(config, world)
    config = replace(config, data=common.with_fields(config.data, encoder))
    check_layer(encoder, config.layer)
    task = open_task(config, encoder, world)
    config = resolved(config, task.pair)
    name = folder_name(protocol, config, task.pair.train.path if protocol == "transfer" else "")
    with open_run(config, name, encoder, task, world) as (folder, saved, results):
        if saved is not None and "result" in saved:
            world.say(f"{folder.path}: finished before")
            return saved["result"]
        tuning = make(config, encoder, task, folder, world, stop)
        try:
            tuning.start(saved)
            return tuning.fit(results)
        finally:
            tuning.close()


def resolved(config, pair):
    """A `Tuning` with what its data left open: runs that see other pixels differ in it."""
    loading = pair.loading
    data = replace(
        config.data, train=pair.train.path, val=pair.val.path, mean=loading.mean, std=loading.std,
        resolution_px=pair.resolution_px, center_ratio=pair.center_ratio,
    )  # fmt: skip
    return replace(config, data=data)


def check_layer(encoder, layer):
    """Raise UserError for a projector layer that an encoder does not have."""
    if layer >= len(encoder.widths):
        got = f"got {layer}, but {encoder.path} has {len(encoder.widths) - 1} projector layers"
        raise UserError(f"layer: {got}; 0 is the backbone")


def folder_name(protocol, config, data=""):
    """A run's name by what is usually varied: data, labels, layer, seed, epoch of a kept copy."""
    labels = config.labels
    words = "all" if labels.is_all else f"{100 * (labels.fraction or 0):g}percent"
    if labels.count is not None:
        words = f"{labels.count}labels"
    if labels.file is not None:
        words = Path(labels.file).stem
    kept = Path(config.checkpoint).stem.partition("checkpoint_")[2]
    parts = (protocol, Path(data).stem, words, f"layer{config.layer}", f"seed{config.seed}", kept)
    return "_".join(part for part in parts if part)


def log_record(tuner, total_steps, world):
    """The line of metrics about a Tuner's steps since the last one, which is also said."""
    record = tuner.record()
    world.say(
        f"step {tuner.step}/{total_steps}  loss {record['train/loss']:.4f}  lr {record['lr']:.4g}  "
        f"{record['train/images_per_s']:.0f} images/s  data wait {record['train/data_wait']:.0%}"
    )
    return record


def finish_run(protocol, run, network, metrics, done, results):
    """Save a run's network and report its result in the folder `results`; returns the record.

    run: has config, encoder, task, folder, world, and used: {num_trained, num_held_out} images; it
    is saved, so that a failure here (disk full) costs no training. done: the counters' record. The
    checkpoint keeps the record alone: the run is finished.
    """
    folder, world = run.folder, run.world
    data = {**run.task.describe(), **run.used}
    record = make_record(protocol, run.encoder, data, run.config, metrics)
    record["finetuned"] = str(folder.path / FINETUNED)
    if world.is_first:
        save_encoder(record["finetuned"], network, run.encoder, run.encoder.about)
        record = report(record, results)
    shown = {f"val/{key}": metrics[key] for key in ("top1", "top5", "map") if key in metrics}
    folder.write({**done, **shown})  # last: what a failure before it left is not written twice
    folder.save({"result": record})
    words = f"{run.task.val.metric} on val: {metrics[run.task.val.metric]:.2%}"
    world.say(f"{folder.path}: finished, {words}")
    return record


class Keeper:
    """Saves a run when it is due, and ends it, saved, when a signal asks for it.

    state() returns what a checkpoint holds; all ranks call it. minutes: between two checkpoints.
    """

    def __init__(self, folder, state, minutes, world, stop):
        self.folder, self.state, self.minutes = folder, state, minutes
        self.world, self.stop = world, stop
        self.saved_at = time.perf_counter()

    def save(self):
        """Write the checkpoint."""
        self.folder.save({**self.state(), "rng": checkpoint.rng_state()})
        self.saved_at = time.perf_counter()

    def save_if_due(self, step):
        """Called after each step: save once in a while. Raises Interrupted at a signal."""
        if self.world.size > 1 and step % AGREE_EVERY:
            return
        is_due = time.perf_counter() - self.saved_at >= 60 * self.minutes
        asked, is_due = self.world.any(self._is_asked, is_due)
        if asked or is_due:
            self.save()
        if asked:
            self._exit()

    def exit_if_asked(self):
        """Save and raise Interrupted where a rank was told to stop."""
        if self.world.any(self._is_asked)[0]:
            self.save()
            self._exit()

    @property
    def _is_asked(self):
        return self.stop is not None and self.stop.asked

    def _exit(self):
        where = self.folder.path
        raise Interrupted(f"{where}: interrupted, {CHECKPOINT} is saved; start it again to go on")
