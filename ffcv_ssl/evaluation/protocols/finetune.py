"""Fine-tuning: a pretrained network and a new linear classifier, trained together on few labels.

    python evaluate.py finetune --checkpoint runs/simclr --labels.fraction 0.1 --depth projector_1
    python evaluate.py finetune --config configs/finetune/suncet_10percent.yaml --checkpoint runs/a

Training sees crops and flips, the measurement sees centre crops. Which epoch counts is decided on a
held-out part of the training labels, and on the validation file only where `select: val` asks for
that; the result says which. The run's folder holds `config.yaml`, `metrics.jsonl`, `checkpoint.pt`
and at the end `finetuned.safetensors`, which every protocol takes as a checkpoint. The same command
again goes on exactly where it stopped. Sources: Assran et al. 2020, appendix B (SGD with Nesterov
momentum, a classifier of zeros, no decay); Chen et al. 2020b, sections 2 and 3 (LARS, from a layer
of the projector).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

from ffcv_ssl.config import settings
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.tuning import Classifier, Tuner
from ffcv_ssl.evaluation.tuning_run import TuningConfig, TuningRun, open_tuning_datasets, tune
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.memory import names_out_of_memory
from ffcv_ssl.training.optimizers import lr_at, make_optimizer
from ffcv_ssl.training.world import World


def suncet_sgd() -> settings.OptimConfig:
    """The optimiser of SuNCEt's fine-tuning on CIFAR-10; its rate is for a batch of 256."""
    return settings.OptimConfig(
        name="sgd", lr=0.05, nesterov=True, weight_decay=0.0, warmup_epochs=0.0, end_ratio=0.0
    )


@dataclass(frozen=True)
class FineTuneConfig(TuningConfig):
    """Fine-tuning of a whole network."""

    epochs: PositiveInt = 60
    """Passes over the labels."""
    select: Literal["holdout", "last", "val"] = "holdout"
    """Which epoch counts: the best on a held-out part of the training labels; the last one; or,
    reported as such, the best on the validation file."""
    optim: settings.OptimConfig = field(default_factory=suncet_sgd)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.warmup_epochs >= self.epochs:
            raise UserError(
                f"optim.warmup_epochs: got {self.optim.warmup_epochs:g}, "
                f"expected less than epochs ({self.epochs})"
            )
        if self.optim.clip_norm:
            raise UserError(f"optim.clip_norm: got {self.optim.clip_norm:g}, expected 0 here")
        make_optimizer(self.optim, torch.nn.Linear(1, 1))  # torch has its own limits


def run(config: FineTuneConfig, world: World, stop: StopSignal | None = None) -> dict[str, Any]:
    """Fine-tune, or go on; returns the result's record, the same one if the run was finished.
    Raises UserError, Interrupted, NonFiniteLoss."""
    return tune(FineTuning, config, world, stop)


class FineTuning(TuningRun):
    """A run: it trains epoch by epoch, keeps the best epoch's weights and measures those.

    `best` is {epoch, score, network} of the best epoch so far, the first of equal ones, or None
    where nothing is selected; `is_due`: the last epoch is still to be measured for the selection.
    """

    protocol = "finetune"

    def prepare(self) -> None:
        config, data = self.config, self.data
        train, held_out = self.open_measured()
        self.used = {"num_trained": len(train), "num_held_out": len(held_out)}
        loader = data.train_loader(train, config.data.batch_size, config.seed, self.world)
        self.loaders["train"], steps_per_epoch = loader, len(loader)

        def lr_of(step):
            return lr_at(step, config.optim, config.data.batch_size, config.epochs, steps_per_epoch)

        torch.manual_seed(config.seed)
        network = Classifier(self.encoder.model, config.depth, data.train.num_outputs)
        self.tuner = Tuner(
            network, loader, data.train, config.optim, lr_of, config, self.world, self.tracer
        )
        self.best: dict[str, Any] | None = None
        self.is_due = False

    def plan(self) -> str:
        return (
            f"{self.config.epochs} epochs of {self.tuner.steps_per_epoch} steps on "
            f"{self.data.labels}, {self.used['num_held_out']} of them held out"
        )

    def position(self) -> str:
        return f"step {self.tuner.step}"

    def counters(self) -> dict[str, Any]:
        return self.tuner.done.record()

    def state(self) -> dict[str, Any]:
        self.tuner.check_finite(self.folder.path)
        return {"tuner": self.tuner.state_dict(), "best": self.best, "is_due": self.is_due}

    def load_state(self, saved: dict[str, Any]) -> None:
        self.tuner.load_state_dict(saved["tuner"])
        self.best, self.is_due = saved["best"], saved["is_due"]

    @names_out_of_memory("data.batch_size")
    def fit(self, results: Path) -> dict[str, Any]:
        while True:
            epoch, step_in_epoch = divmod(self.tuner.step, self.tuner.steps_per_epoch)
            if step_in_epoch == 0:
                if self.is_due:
                    self._select(epoch)
                if epoch == self.config.epochs:
                    return self._finish(results)
            self._train_epoch(epoch)

    def _train_epoch(self, epoch: int) -> None:
        number = self.tuner.steps_per_epoch
        name, done = f"epoch {epoch + 1} of {self.config.epochs}", self.tuner.step % number
        steps = self.tuner.train((epoch + 1) * number)
        for _ in self.world.console.over(steps, name, number, announced=not epoch, done=done):
            if self.tuner.step % self.config.log.every_steps == 0:
                self._log()
            self.saver.save_if_due(self.tuner.step)
        self._log()
        self.is_due = self.config.select != "last"
        self.saver.save_if_due(0)  # the epochs end on all ranks alike: they agree here, too

    def _log(self) -> None:
        total_steps = self.config.epochs * self.tuner.steps_per_epoch
        self.folder.write(self.say_steps(self.tuner, total_steps))

    def _select(self, epoch: int) -> None:
        """Measure the epoch that has ended, and keep its weights if it is the best."""
        part, network = self.config.select, self.tuner.network
        metrics = self.measure(network, part)
        metric = self.data.train.metric
        score = metrics[metric]
        if self.best is None or score > self.best["score"]:
            weights = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
            self.best = {"epoch": epoch, "score": score, "network": weights}
        self.is_due = False
        shown = {f"{part}/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self.folder.write({**self.counters(), **shown})
        self.world.say(f"epoch {epoch}/{self.config.epochs}  {metric} on {part}: {score:.1%}")

    def _finish(self, results: Path) -> dict[str, Any]:
        """Measure on the validation file, save the network, report the record and return it."""
        self.saver.save()
        network, last = self.tuner.network, self.measure(self.tuner.network, "val")
        metrics = {"selected_on": self.config.select, "best_epoch": self.config.epochs, **last}
        if self.best is not None:
            network = copy.deepcopy(network)  # a signal still saves the last epoch's weights
            network.load_state_dict(self.best["network"])
            metrics |= self.measure(network, "val")
            metrics |= {"best_epoch": self.best["epoch"], "selection_score": self.best["score"]}
        metrics |= {f"last_{key}": value for key, value in last.items() if key != "per_class"}
        return self.finish(network, metrics, results)


COMMAND = Command(
    FineTuneConfig, run, "the whole network, trained on few labels", open_tuning_datasets,
    resumes=True,
)  # fmt: skip
