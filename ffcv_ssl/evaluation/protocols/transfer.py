"""Transfer: a pretrained network fine-tuned on another dataset, its rate and decay found on a grid.

    python evaluate.py transfer --config configs/transfer/cifar10.yaml --checkpoint runs/simclr
    python evaluate.py transfer --config configs/transfer/voc07.yaml --checkpoint runs/simclr \\
        --grid.max_trials 8 --steps 5000

The procedure of Assran et al. 2020, appendix C (that of Chen et al. 2020a, after Kornblith et al.
2019): 20,000 steps of SGD with Nesterov momentum at batch 256, crops and flips, a cosine to 0
without warm-up, a momentum of batch-norm's statistics that goes by the steps an epoch; weight
decays of the grid are divided by the rate. Each trial trains without a held-out part of the
training file, which selects one; that one is trained again on all of it, and measured on centre
crops of the validation file. A label field with an array of 1, 0 and -1 (left
out) a sample is taken for several labels: binary cross-entropy, and the mean average precision of
VOC07. The same command again goes on exactly where it stopped, in the middle of a trial too.
"""

# G trials

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn.modules.batchnorm import _BatchNorm

from ffcv_ssl.config import settings
from ffcv_ssl.errors import NonFiniteLoss, UserError
from ffcv_ssl.evaluation.tuning import Classifier, Tuner, evaluate
from ffcv_ssl.evaluation.tuning_run import Keeper, Tuning, finish_run, log_record, tune
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.meters import Counters
from ffcv_ssl.training.optimizers import lr_at


def log_spaced(low, high, num):
    """`num` values from low to high, equal factors apart, of four digits."""
    return tuple(float(f"{value:.4g}") for value in np.geomspace(low, high, num))


@dataclass(frozen=True)
class GridConfig:
    """The rates and decays to try."""

    lrs: list[PositiveFloat] = field(default_factory=lambda: list(log_spaced(1e-4, 1e-1, 7)))
    """Learning rates, at the run's batch."""
    weight_decays: list[NonNegativeFloat] = field(
        default_factory=lambda: [0.0, *log_spaced(1e-6, 1e-3, 7)]
    )
    """Weight decays times the rate: each is divided by it. 0 is none."""
    max_trials: PositiveInt | None = None
    """A budget: so many pairs of both, drawn by chance with the seed; null: all of them."""
    seed: NonNegativeInt = 0
    """Decides which pairs are drawn."""

    def __post_init__(self):
        for name in ("lrs", "weight_decays"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"grid.{name}: got {values}, expected one or more, each once")

    def trials(self):
        """Pairs (lr, weight decay), in the grid's order."""
        pairs = list(product(self.lrs, self.weight_decays))
        if self.max_trials is None or self.max_trials >= len(pairs):
            return pairs
        drawn = np.random.Generator(np.random.Philox(self.seed)).permutation(len(pairs))
        return [pairs[index] for index in sorted(drawn[: self.max_trials])]


@dataclass(frozen=True)
class Transfer(Tuning):
    """Fine-tuning on another dataset, with a grid of rates and decays."""

    steps: PositiveInt = 20000
    """Updates of each trial, and of the final training."""
    momentum: PositiveFloat = 0.9
    """Nesterov momentum."""
    select: Literal["holdout", "val"] = "holdout"
    """Which trial counts: the best on a held-out part of the training file; or, reported as such,
    on the validation file, with all of the training file to train on."""
    grid: GridConfig = field(default_factory=GridConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.momentum >= 1:
            raise UserError(f"momentum: got {self.momentum:g}, expected below 1")


def set_norm_momentum(network, steps_per_epoch):
    """Let batch-norm's running statistics forget as in Chen et al. 2020a, appendix B.8: a step
    keeps max(1 - 10 / s, 0.9) of them, s steps an epoch. torch's momentum is what it takes anew."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = min(10 / steps_per_epoch, 0.1)


def run(config, world, stop=None):
    """Do what a Transfer says, or go on; returns the result's record, the same one if it was
    finished. Raises UserError, Interrupted, and NonFiniteLoss where no trial had a finite loss."""
    return tune("transfer", Transferring, config, world, stop)


class Transferring:
    """A run: G trials, one after the other, and the final training with the best one's settings.

    `scores` holds what the selection measured of each finished trial, None where its loss was not
    finite. `spent` is what the finished trials did (steps, images, flops...): metrics count on.
    """

    def __init__(self, config, encoder, task, folder, world, stop):
        self.config, self.encoder, self.task = config, encoder, task
        self.folder, self.world = folder, world
        self.trials, self.scores, self.tuner = config.grid.trials(), [], None
        self.spent = dict.fromkeys((*Counters.NAMES, "seconds"), 0)
        everything, part, held_out = task.pair.chosen, task.pair.chosen, []
        self.selection = task.clean_loader("val", world)
        self.loaders = [self.selection]
        self.val_loader = self.selection
        if config.select == "holdout":
            part, held_out = task.split(config.holdout, config.seed)
            self.selection = task.clean_loader("train", world, held_out)
            self.loaders.append(self.selection)
        self.used = {"num_trained": len(everything), "num_held_out": len(held_out)}
        rest = (config.data.batch_size, config.seed, world)
        self.trial_loader, self.final_loader = (
            task.train_loader(indices, *rest) for indices in (part, everything)
        )
        self.loaders += [self.trial_loader, self.final_loader]
        self.keeper = Keeper(folder, self._state, config.saving.every_minutes, world, stop)

    def start(self, saved):
        """Begin with the first trial, or where the checkpoint `saved` left it."""
        self.folder.write_config()
        if saved is None:
            self.folder.open_log(None, self.config.log.tensorboard)
            each = f"{len(self.trials)} trials and a final one of {self.config.steps} steps each"
            held_out = f"{self.used['num_held_out']} of them held out of the trials"
            self.world.say(f"{self.folder.path}: {each} on {self.task.labels}, {held_out}")
            return
        self.scores, self.spent = saved["scores"], saved["spent"]
        self.tuner = self._make_tuner()
        self.tuner.load_state_dict(saved["tuner"])
        self.folder.open_log(self._done()["step"], self.config.log.tensorboard)
        checkpoint.restore_rng_state(saved["rng"])
        where = f"step {self.tuner.step} of trial {len(self.scores) + 1}"
        self.world.say(f"{self.folder.path}: resumed at {where}")
        if note := self.folder.note_versions(saved):
            self.world.say(note)

    def _state(self):
        self.tuner.check_finite(self.folder.path)
        return {"scores": self.scores, "spent": self.spent, "tuner": self.tuner.state_dict()}

    def fit(self, results):
        """Try all, train the best; returns the record of the result, which is reported in the
        folder `results`."""
        while len(self.scores) < len(self.trials):
            self._try_next()
        best, (lr, decay) = self._best()
        self._train(f"final: lr {lr:.4g}, weight decay {decay:.4g}")
        self.keeper.save()
        network, done = self.tuner.network, self._done()
        metrics = evaluate(network, self.val_loader, self.task.val, *self._how())
        metrics |= {
            "selected_on": self.config.select, "selection_score": self.scores[best], "lr": lr,
            "weight_decay": decay, "num_trials": len(self.trials),
            "num_diverged": sum(score is None for score in self.scores),
        }  # fmt: skip
        return finish_run("transfer", self, network, metrics, done, results)

    def _try_next(self):
        """Train and measure one trial."""
        trial, (lr, decay) = len(self.scores), self.trials[len(self.scores)]
        name = f"trial {trial + 1}/{len(self.trials)}: lr {lr:.4g}, weight decay {decay:.4g}"
        metric, part = self.task.train.metric, self.config.select
        targets = self.task.val if part == "val" else self.task.train
        try:
            self._train(name)
            score = evaluate(self.tuner.network, self.selection, targets, *self._how())[metric]
        except NonFiniteLoss:
            score = None
        shown = {} if score is None else {f"{part}/{metric}": score}
        done = self._done()
        record = {**done, "trial": trial, "lr": lr, "weight_decay": decay, **shown}
        self.folder.write(record)
        words = "loss not finite" if score is None else f"{metric} on {part} {score:.1%}"
        self.world.say(f"{name}: {words}")
        self.spent = {key: done[key] for key in self.spent}
        self.scores, self.tuner = [*self.scores, score], None

    def _best(self):
        """(number of the best trial, its pair); the first of equal ones."""
        known = [score for score in self.scores if score is not None]
        if not known:
            what = f"none of {len(self.scores)} trials had a finite loss"
            raise NonFiniteLoss(f"{self.folder.path}: {what}; lower grid.lrs")
        best = self.scores.index(max(known))
        return best, self.trials[best]

    def _train(self, name):
        """Bring the current training to its end, from where its tuner stands, if there is one."""
        self.tuner = self.tuner or self._make_tuner()
        if self.tuner.step == 0:
            self.world.say(name)
        for _ in self.tuner.train(self.config.steps):
            if self.tuner.step % self.config.log.every_steps == 0:
                self._log()
            self.keeper.save_if_due(self.tuner.step)
        if self.tuner.averages.sums:
            self._log()

    def _make_tuner(self):
        """A tuner at step 0: of the next trial, or of the final training."""
        config, is_final = self.config, len(self.scores) == len(self.trials)
        lr, decay = self._best()[1] if is_final else self.trials[len(self.scores)]
        optim = settings.OptimConfig(
            name="sgd", lr=lr, lr_scaling="none", momentum=config.momentum, nesterov=True,
            weight_decay=decay / lr, warmup_epochs=0.0, end_ratio=0.0,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        network = Classifier(self.encoder.model, config.layer, self.task.train.num_outputs)
        loader = self.final_loader if is_final else self.trial_loader
        set_norm_momentum(network, len(loader))

        def lr_of(step):
            return lr_at(step, optim, config.data.batch_size, 1, config.steps)

        return Tuner(network, loader, self.task.train, optim, lr_of, config, self.world)

    def _how(self):
        return self.world, self.config.precision, self.keeper.exit_if_asked, self.folder.path

    def _log(self):
        self.tuner.check_finite(self.folder.path)
        record = log_record(self.tuner, self.config.steps, self.world)
        self.folder.write({**record, **self._done(), "trial": len(self.scores)})

    def _done(self):
        """The counters' record; all but the epoch count on over the trials."""
        record = self.tuner.done.record()
        return {**record, **{key: self.spent[key] + record[key] for key in self.spent}}

    def close(self):
        """End the loaders' threads."""
        for loader in self.loaders:
            loader.close()
