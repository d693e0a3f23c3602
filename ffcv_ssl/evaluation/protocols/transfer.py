"""Transfer: a pretrained network fine-tuned on another dataset, its rate and decay found on a grid.

    python evaluate.py transfer --config configs/transfer/cifar10.yaml --checkpoint runs/simclr
    python evaluate.py transfer --config configs/transfer/voc07.yaml --checkpoint runs/simclr \\
        --grid.max_trials 8 --steps 5000

The procedure of Assran et al. 2020, appendix C (that of Chen et al. 2020a, after Kornblith et al.
2019): 20,000 steps of SGD with Nesterov momentum at batch 256, crops and flips, a cosine to 0
without warm-up, a momentum of batch-norm's statistics that depends on the steps per epoch; the
grid's weight decays are divided by the rate. Each trial trains without a held-out part of the
training file, on which one trial is selected; its settings train once more on the whole file, and
the result is measured on centre crops of the validation file. A label field with an array of 1, 0
and -1 (left out) per sample means several labels: binary cross-entropy, and the mean average
precision of VOC07. The same command again goes on exactly where it stopped, in the middle of a
trial too.
"""

# G trials

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ffcv_ssl.config import settings
from ffcv_ssl.errors import NonFiniteLoss, UserError
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.tuning import Classifier, Tuner
from ffcv_ssl.evaluation.tuning_run import TuningConfig, TuningRun, open_tuning_datasets, tune
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.memory import names_out_of_memory
from ffcv_ssl.training.meters import Counters
from ffcv_ssl.training.optimizers import lr_at
from ffcv_ssl.training.world import World

# Batch-norm's statistics over about ten steps of an epoch, but over ten batches at least.
NORM_EPOCH_SHARE, MAX_NORM_MOMENTUM = 10, 0.1


def log_spaced(low: float, high: float, num: int) -> tuple[float, ...]:
    """`num` values from low to high, equal factors apart, rounded to four digits."""
    return tuple(float(f"{value:.4g}") for value in np.geomspace(low, high, num))


@dataclass(frozen=True)
class GridConfig:
    """The rates and decays to try."""

    lrs: list[PositiveFloat] = field(default_factory=lambda: list(log_spaced(1e-4, 1e-1, 7)))
    """Learning rates, at the run's batch size."""
    weight_decays: list[NonNegativeFloat] = field(
        default_factory=lambda: [0.0, *log_spaced(1e-6, 1e-3, 7)]
    )
    """Weight decays times the learning rate: each is divided by the rate. 0 is no decay."""
    max_trials: PositiveInt | None = None
    """A budget: so many pairs of rate and decay, drawn at random; null: all pairs."""
    seed: settings.Seed = 0  # type: ignore[valid-type]
    """Decides which pairs are drawn."""

    def __post_init__(self) -> None:
        for name in ("lrs", "weight_decays"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"grid.{name}: got {values}, expected one or more different values")

    def trials(self) -> list[tuple[float, float]]:
        """Pairs (lr, weight decay), in the grid's order."""
        pairs = list(product(self.lrs, self.weight_decays))
        if self.max_trials is None or self.max_trials >= len(pairs):
            return pairs
        drawn = np.random.Generator(np.random.Philox(self.seed)).permutation(len(pairs))
        return [pairs[index] for index in sorted(drawn[: self.max_trials])]


@dataclass(frozen=True)
class TransferConfig(TuningConfig):
    """Fine-tuning on another dataset, with a grid of rates and decays."""

    steps: PositiveInt = 20000
    """Updates of each trial, and of the final training."""
    momentum: PositiveFloat = 0.9
    """Nesterov momentum."""
    select: Literal["holdout", "val"] = "holdout"
    """Which trial counts: the best on a held-out part of the training file; or, reported as such,
    on the validation file, with the whole training file to train on."""
    grid: GridConfig = field(default_factory=GridConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum >= 1:
            raise UserError(f"momentum: got {self.momentum:g}, expected below 1")


def set_norm_momentum(network: nn.Module, steps_per_epoch: int) -> None:
    """Let batch-norm's running statistics forget as in Chen et al. 2020a, appendix B.8: each step
    keeps max(1 - 10 / s, 0.9) of them, with s steps per epoch. torch's momentum is the share that a
    step replaces."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = min(NORM_EPOCH_SHARE / steps_per_epoch, MAX_NORM_MOMENTUM)


def run(config: TransferConfig, world: World, stop: StopSignal | None = None) -> dict[str, Any]:
    """Transfer, or go on; returns the result's record, the same one if the run was finished.
    Raises UserError, Interrupted, and NonFiniteLoss where no trial had a finite loss."""
    return tune(Transferring, config, world, stop)


class Transferring(TuningRun):
    """A run: G trials, one after the other, and the final training with the best trial's settings.

    `scores` holds the selection's measurement of each finished trial, None where its loss was not
    finite. `spent` counts what the finished trials did (steps, images, flops...): the counters of
    the run go on over all trials.
    """

    protocol = "transfer"

    def prepare(self) -> None:
        config, everything = self.config, self.data.datasets.chosen
        rest, held_out = self.open_measured()
        self.used = {"num_trained": len(everything), "num_held_out": len(held_out)}
        for name, indices in (("trial", rest), ("final", everything)):
            self.loaders[name] = self.data.train_loader(
                indices, config.data.batch_size, config.seed, self.world
            )
        self.trials = config.grid.trials()
        self.scores: list[float | None] = []
        self.spent: dict[str, Any] = dict.fromkeys((*Counters.NAMES, "seconds"), 0)
        self.tuner: Tuner | None = None

    def plan(self) -> str:
        return (
            f"{len(self.trials)} trials and a final one of {self.config.steps} steps each on "
            f"{self.data.labels}, {self.used['num_held_out']} of them held out of the trials"
        )

    def position(self) -> str:
        step = 0 if self.tuner is None else self.tuner.step
        return f"step {step} of trial {len(self.scores) + 1}"

    def counters(self) -> dict[str, Any]:
        """All but the epoch count on over the trials."""
        record = self._tuner().done.record()
        return {**record, **{key: self.spent[key] + record[key] for key in self.spent}}

    def state(self) -> dict[str, Any]:
        self._tuner().check_finite(self.folder.path)
        return {"scores": self.scores, "spent": self.spent, "tuner": self._tuner().state_dict()}

    def load_state(self, saved: dict[str, Any]) -> None:
        self.scores, self.spent = saved["scores"], saved["spent"]
        self._tuner().load_state_dict(saved["tuner"])

    @names_out_of_memory("data.batch_size")
    def fit(self, results: Path) -> dict[str, Any]:
        """Try all pairs, train with the best; returns the record of the result."""
        while len(self.scores) < len(self.trials):
            self._try_next()
        best, (lr, decay) = self._best()
        self._train(f"final: lr {lr:.4g}, weight decay {decay:.4g}")
        self.saver.save()
        network = self._tuner().network
        metrics = self.measure(network, "val")
        metrics |= {
            "selected_on": self.config.select, "selection_score": self.scores[best], "lr": lr,
            "weight_decay": decay, "num_trials": len(self.trials),
            "num_diverged": sum(score is None for score in self.scores),
        }  # fmt: skip
        return self.finish(network, metrics, results)

    def _try_next(self) -> None:
        """Train and measure one trial."""
        trial, (lr, decay) = len(self.scores), self.trials[len(self.scores)]
        name = f"trial {trial + 1}/{len(self.trials)}: lr {lr:.4g}, weight decay {decay:.4g}"
        metric, part = self.data.train.metric, self.config.select
        try:
            self._train(name)
            score = self.measure(self._tuner().network, part)[metric]
        except NonFiniteLoss:
            score = None
        shown = {} if score is None else {f"{part}/{metric}": score}
        done = self.counters()
        self.folder.write({**done, "trial": trial, "lr": lr, "weight_decay": decay, **shown})
        outcome = "loss not finite" if score is None else f"{metric} on {part} {score:.1%}"
        self.world.say(f"{name}: {outcome}")
        self.spent = {key: done[key] for key in self.spent}
        self.scores, self.tuner = [*self.scores, score], None

    def _best(self) -> tuple[int, tuple[float, float]]:
        """(number of the best trial, its pair); the first of equal ones."""
        known = [score for score in self.scores if score is not None]
        if not known:
            raise NonFiniteLoss(
                f"{self.folder.path}: none of {len(self.scores)} trials had a finite loss; "
                "lower grid.lrs"
            )
        best = self.scores.index(max(known))
        return best, self.trials[best]

    def _train(self, name: str) -> None:
        """Bring the current training to its end, from where its tuner stands."""
        tuner = self._tuner()
        if tuner.step == 0:
            self.world.say(name)
        steps, number = tuner.train(self.config.steps), self.config.steps
        for _ in self.world.console.over(steps, name, number, done=tuner.step):
            if tuner.step % self.config.log.every_steps == 0:
                self._log(tuner)
            self.saver.save_if_due(tuner.step)
        if tuner.averages.sums:
            self._log(tuner)

    def _tuner(self) -> Tuner:
        """The current training; at step 0 where it has not begun."""
        self.tuner = self.tuner or self._make_tuner()
        return self.tuner

    def _make_tuner(self) -> Tuner:
        """A tuner at step 0: of the next trial, or of the final training."""
        config, is_final = self.config, len(self.scores) == len(self.trials)
        lr, decay = self._best()[1] if is_final else self.trials[len(self.scores)]
        optim = settings.OptimConfig(
            name="sgd", lr=lr, lr_scaling="none", momentum=config.momentum, nesterov=True,
            weight_decay=decay / lr, warmup_epochs=0.0, end_ratio=0.0,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        network = Classifier(self.encoder.model, config.depth, self.data.train.num_outputs)
        loader = self.loaders["final" if is_final else "trial"]
        set_norm_momentum(network, len(loader))

        def lr_of(step):
            return lr_at(step, optim, config.data.batch_size, 1, config.steps)

        return Tuner(
            network, loader, self.data.train, optim, lr_of, config, self.world, self.tracer
        )

    def _log(self, tuner: Tuner) -> None:
        record = self.say_steps(tuner, self.config.steps)
        self.folder.write({**record, **self.counters(), "trial": len(self.scores)})


COMMAND = Command(
    TransferConfig, run, "the same on other data, over a grid of rates", open_tuning_datasets,
    resumes=True,
)  # fmt: skip
