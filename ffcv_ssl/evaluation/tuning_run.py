"""Runs that train a network on labels: their settings, their folder, their start and their result.

Guarantees: a run is found again by its folder, and refused where anything that decides its result
differs; a signal ends it with a checkpoint from which it goes on exactly.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import PositiveFloat

from ffcv_ssl.config import settings
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import protocol_run
from ffcv_ssl.evaluation.datasets import EvalDatasets, labels_digest, with_field_names
from ffcv_ssl.evaluation.encoder import Encoder, save_encoder
from ffcv_ssl.evaluation.former_names import RENAMED, layer_of_depth
from ffcv_ssl.evaluation.protocol_settings import ProtocolConfig
from ffcv_ssl.evaluation.results import checkpoint_folder, make_record, report, results_folder
from ffcv_ssl.evaluation.tuning import Classifier, Tuner, evaluate
from ffcv_ssl.evaluation.tuning_data import TuningData, open_tuning_data
from ffcv_ssl.jobs.slurm import SlurmConfig
from ffcv_ssl.loader import Loader
from ffcv_ssl.training import checkpoint, runtime
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.run_folder import BACKBONE, RunFolder
from ffcv_ssl.training.weight_files import FINETUNED
from ffcv_ssl.training.world import World

# What a resumed run may differ in, besides what all runs may: the weights are compared instead.
FREE_KEYS = (*runtime.FREE_KEYS, "checkpoint")
FREE_GROUPS = (*runtime.FREE_GROUPS, "saving.")


@dataclass(frozen=True)
class SavingConfig:
    """When a run is saved; its end is saved in any case."""

    every_minutes: PositiveFloat = 10.0
    """Minutes between checkpoints."""


@dataclass(frozen=True)
class TuningConfig(ProtocolConfig):
    """Settings of every protocol that trains a pretrained network on labels."""

    out: str | None = None
    """Folder of the run and of its result; null: the result goes to the checkpoint's folder, and
    the run to a folder in it that is named after the run's settings."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the network's forward pass; bf16 is autocast. The loss is float32 in any case."""
    depth: str = "backbone"
    """What the classifier sees: the features of the backbone, or those of projector_1 (after the
    projector's first layer with its batch-norm and ReLU; the last layer has no ReLU)..."""
    holdout: float = 0.1
    """Share of each class' training labels that `select: holdout` selects on."""
    saving: SavingConfig = field(default_factory=SavingConfig)
    log: settings.LogConfig = field(default_factory=settings.LogConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout: got {self.holdout:g}, expected above 0, below 1")
        if self.slurm.partition is not None and self.out is None:
            raise UserError("out: got none, expected a folder for the job: --out runs/NAME")


class TuningRun(ABC):
    """A run in its folder: what fine-tuning and transfer have in common.

    `loaders` are closed at the end; `used` is {num_trained, num_held_out}: numbers of images.
    """

    protocol: str

    def __init__(
        self,
        config: Any,
        encoder: Encoder,
        data: TuningData,
        folder: RunFolder,
        world: World,
        stop: StopSignal | None,
    ) -> None:
        self.config, self.encoder, self.data = config, encoder, data
        self.folder, self.world = folder, world
        self.loaders: dict[str, Loader] = {}
        self.used: dict[str, int] = {}
        self.tracer = runtime.Tracer(folder.path, config.system.profile, world)
        minutes = config.saving.every_minutes
        self.saver = runtime.Saver(folder, self.state, self.position, minutes, world, stop)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Open the loaders, and set all that the run begins with."""

    @abstractmethod
    def plan(self) -> str:
        """What the run is going to do, in words."""

    @abstractmethod
    def position(self) -> str:
        """Where the run stands, in words."""

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """What the run has done so far: step, images, seconds... for a line of metrics."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the run goes on from. Raises NonFiniteLoss for what is not worth keeping."""

    @abstractmethod
    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    @abstractmethod
    def fit(self, results: Path) -> dict[str, Any]:
        """Train to the end; returns the record of the result, reported in the folder `results`."""

    def open_measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Open the loaders `val` and, where something is held out, `holdout`. Returns the indices
        (rest, held out) of the training samples that may be used."""
        config, data = self.config, self.data
        rest, held_out = data.datasets.chosen, np.empty(0, np.int64)
        if config.select == "holdout":
            rest, held_out = data.split(config.holdout, config.seed)
            self.loaders["holdout"] = data.clean_loader("train", self.world, held_out)
        self.loaders["val"] = data.clean_loader("val", self.world)
        return rest, held_out

    def start(self, saved: dict[str, Any] | None) -> None:
        """Begin at step 0, or where the checkpoint `saved` left the run."""
        self.folder.write_config()
        if saved is not None:
            self.load_state(saved)
        last_step = None if saved is None else self.counters()["step"]
        self.folder.open_log(last_step, self.config.log)
        if saved is None:
            self.world.say(f"{self.folder.path}: {self.plan()}")
            return
        checkpoint.restore_rng_state(saved["rng"])
        self.saver.mark_saved()
        self.world.say(f"{self.folder.path}: resumed at {self.position()}")
        for note in self.folder.notes(saved):
            self.world.say(note)

    def measure(self, network: Classifier, part: str) -> dict[str, Any]:
        """Metrics of a network on the images of `loaders[part]`; saves and ends at a signal."""
        targets, loader = self.data.val if part == "val" else self.data.train, self.loaders[part]
        name, world = f"evaluating on {part}", self.world
        with world.console.phase(name, len(loader.indices)) as phase:
            batch = loader.batch_size * world.size
            before_batch = phase.counting(self.saver.save_and_exit_if_asked, batch)
            return evaluate(
                network, loader, targets, world, self.config.precision, before_batch,
                self.folder.path,
            )  # fmt: skip

    def say_steps(self, tuner: Tuner, total_steps: int) -> dict[str, Any]:
        """Print the log line of the steps since the last one; returns what metrics hold of them."""
        tuner.check_finite(self.folder.path)
        record = tuner.record()
        self.world.say(runtime.log_line(tuner.step, total_steps, record))
        return record

    def finish(self, network: Classifier, metrics: dict[str, Any], results: Path) -> dict[str, Any]:
        """Save the network and report its result in the folder `results`; returns the record.

        The run has been saved before, so that a failure here (disk full) costs no training. The
        checkpoint keeps the record alone: the run is finished.
        """
        folder, world, done = self.folder, self.world, self.counters()
        data = {**self.data.describe(), **self.used}
        record = make_record(self.protocol, self.encoder, data, self.config, metrics)
        record["finetuned"] = str(folder.path / FINETUNED)
        if world.is_first:
            save_encoder(record["finetuned"], network, self.encoder, self.encoder.about)
            record = report(record, results)
        shown = {f"val/{key}": metrics[key] for key in ("top1", "top5", "map") if key in metrics}
        folder.write({**done, **shown})  # last, so that it is not written twice after a failure
        folder.save({"result": record})
        folder.forget_previous()
        metric = self.data.val.metric
        world.say(f"{folder.path}: finished, {metric} on val: {metrics[metric]:.2%}")
        return record

    def close(self) -> None:
        """End the loaders' threads."""
        self.tracer.close()
        for loader in self.loaders.values():
            loader.close()


def tune(
    make: type[TuningRun], config: Any, world: World, stop: StopSignal | None
) -> dict[str, Any]:
    """Do what a TuningConfig says, or go on; returns the result's record, the same one if the run
    was finished before. make: the run's class."""
    encoder = protocol_run.open_encoder(config, world)
    config, data = open_tuning(config, encoder, world)
    with open_run(make.protocol, config, encoder, data, world) as (folder, saved, results):
        if saved is not None and "result" in saved:
            world.say(f"{folder.path}: already finished")
            folder.forget_previous()  # a kill may have come between
            return saved["result"]
        run = make(config, encoder, data, folder, world, stop)
        try:
            with folder.restoring():
                run.start(saved)
            return run.fit(results)
        finally:
            run.close()


def open_tuning(config: Any, encoder: Encoder, world: World) -> tuple[Any, TuningData]:
    """(config with what its data left open, the data). Raises UserError where the data or the depth
    are missing."""
    config = replace(config, data=with_field_names(config.data, encoder))
    encoder.check_depths([config.depth], "depth", stages=False)
    data = open_tuning_data(config.data, config.labels, encoder, world)
    return resolved(config, data.datasets), data


def open_tuning_datasets(config: Any, encoder: Encoder, world: World) -> EvalDatasets:
    """The datasets alone, to check a call. Raises as `open_tuning`."""
    return open_tuning(config, encoder, world)[1].datasets


def resolved(config: Any, datasets: EvalDatasets) -> Any:
    """A TuningConfig with what its data left open: runs that see other pixels differ in it."""
    loading = datasets.loading
    data = replace(
        config.data, train=datasets.train.path, val=datasets.val.path, mean=loading.mean,
        std=loading.std, resolution_px=datasets.resolution_px, center_ratio=datasets.center_ratio,
    )  # fmt: skip
    return replace(config, data=data)


@dataclass(frozen=True)
class Content:
    """What a run begins with, weights or labels, as a RunFolder compares it."""

    text: str

    def describe(self) -> str:
        """Equal for equal content."""
        return self.text


@contextlib.contextmanager
def open_run(
    protocol: str, config: Any, encoder: Encoder, data: TuningData, world: World
) -> Iterator[tuple[RunFolder, dict | None, Path]]:
    """Within it: (the run's RunFolder, its checkpoint's state or None, the folder of results).

    config: with what its data left open resolved. Raises UserError where the folder is another
    run's.
    """
    results = results_folder(config)
    path = results if config.out else results / folder_name(protocol, config)
    source = checkpoint_folder(config.checkpoint)
    has_kept_copies = any(path.glob("checkpoint_epoch_*.pt"))  # a run of this kind keeps none
    if (path / BACKBONE).exists() or has_kept_copies or path.resolve() == source.resolve():
        raise UserError(f"out: got {path}, a pretraining run's folder; use another --out")
    contents = {
        "train": data.datasets.train,
        "val": data.datasets.val,
        "pretrained": Content(encoder.fingerprint),
        "labels": Content(f"{labels_digest(data.datasets)} ({data.labels})"),
    }
    with runtime.hold(path, world):
        folder, saved = runtime.open_folder(
            path, config_dict(config), contents, world, FREE_KEYS, FREE_GROUPS, RENAMED
        )
        try:
            yield folder, saved, results
        finally:
            folder.close()


def folder_name(protocol: str, config: Any) -> str:
    """A run's name by what is usually varied: data of a transfer, labels, depth, seed, kept copy.

    The depth is named by its number, layer0 for the backbone, so that runs of before are found.
    """
    labels = config.labels
    words = "all" if labels.is_all else f"{100 * (labels.fraction or 0):g}percent"
    if labels.count is not None:
        words = f"{labels.count}labels"
    if labels.file is not None:
        words = Path(labels.file).stem
    dataset = Path(config.data.train).stem if protocol == "transfer" else ""
    kept = Path(config.checkpoint).stem.partition("checkpoint_")[2]
    layer = f"layer{layer_of_depth(config.depth)}"
    parts = (protocol, dataset, words, layer, f"seed{config.seed}", kept)
    return "_".join(part for part in parts if part)
