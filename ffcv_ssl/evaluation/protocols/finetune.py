"""Fine-tuning: a pretrained network and a new linear classifier, trained together on few labels.

    python evaluate.py finetune --checkpoint runs/simclr --labels.fraction 0.1 --layer 1
    python evaluate.py finetune --config configs/finetune/suncet_10percent.yaml --checkpoint runs/a

Training sees crops and flips, the measurement centre crops. Which epoch counts is decided on a part
of the training labels that is held out, and by the validation file only where `select: val` asks
for that; the result says which. The run's folder holds `config.yaml`, `metrics.jsonl`,
`checkpoint.pt` and at the end `finetuned.safetensors`, which every protocol takes as a checkpoint.
The same command again goes on exactly where it stopped. Sources: Assran et al. 2020, appendix B
(SGD with Nesterov momentum, a classifier of zeros, no decay); Chen et al. 2020b, sections 2 and 3
(LARS, from a layer of the projector).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt

from ffcv_ssl.config import settings
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.tuning import Classifier, Tuner, evaluate
from ffcv_ssl.evaluation.tuning_run import Keeper, Tuning, finish_run, log_record, tune
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.optimizers import lr_at, make_optimizer


def suncet_sgd():
    """The optimiser of SuNCEt's fine-tuning on CIFAR-10; its rate is for a batch of 256."""
    return settings.OptimConfig(
        name="sgd", lr=0.05, nesterov=True, weight_decay=0.0, warmup_epochs=0.0, end_ratio=0.0
    )


@dataclass(frozen=True)
class FineTune(Tuning):
    """Fine-tuning of a whole network."""

    epochs: PositiveInt = 60
    """Passes over the labels."""
    select: Literal["holdout", "last", "val"] = "holdout"
    """Which epoch counts: the best on a part of the training labels that is held out; the last; or,
    reported as such, the best on the validation file."""
    optim: settings.OptimConfig = field(default_factory=suncet_sgd)

    def __post_init__(self):
        super().__post_init__()
        if self.optim.warmup_epochs >= self.epochs:
            got = f"got {self.optim.warmup_epochs:g}, expected less than epochs ({self.epochs})"
            raise UserError(f"optim.warmup_epochs: {got}")
        if self.optim.clip_norm:
            raise UserError(f"optim.clip_norm: got {self.optim.clip_norm:g}, expected 0 here")
        make_optimizer(self.optim, torch.nn.Linear(1, 1))  # torch has its own limits


def run(config, world, stop=None):
    """Fine-tune as a FineTune says, or go on; returns the result's record, the same one if it was
    finished. Raises UserError, Interrupted, NonFiniteLoss."""
    return tune("finetune", FineTuning, config, world, stop)


class FineTuning:
    """A run: it trains epoch by epoch, keeps the best one's weights, and measures them at the end.

    `best` is {epoch, score, network} of the best epoch so far, the first of equal ones, where there
    is a selection; `is_due` says that the last epoch is still to be measured for it.
    """

    def __init__(self, config, encoder, task, folder, world, stop):
        self.config, self.encoder, self.task = config, encoder, task
        self.folder, self.world = folder, world
        self.loaders = self._open_loaders()
        steps = len(self.loaders["train"])

        def lr_of(step):
            return lr_at(step, config.optim, config.data.batch_size, config.epochs, steps)

        torch.manual_seed(config.seed)
        network = Classifier(encoder.model, config.layer, task.train.num_outputs)
        rest = (config.optim, lr_of, config, world)
        self.tuner = Tuner(network, self.loaders["train"], task.train, *rest)
        self.best, self.is_due = None, False
        self.keeper = Keeper(folder, self._state, config.saving.every_minutes, world, stop)

    def _open_loaders(self):
        config, task, world = self.config, self.task, self.world
        loaders, train, held_out = {}, task.pair.chosen, []
        if config.select == "holdout":
            train, held_out = task.split(config.holdout, config.seed)
            loaders["holdout"] = task.clean_loader("train", world, held_out)
        self.used = {"num_trained": len(train), "num_held_out": len(held_out)}
        batch_size = config.data.batch_size
        loaders["train"] = task.train_loader(train, batch_size, config.seed, world)
        loaders["val"] = task.clean_loader("val", world)
        return loaders

    def start(self, saved):
        """Begin at step 0, or where the checkpoint `saved` left it."""
        self.folder.write_config()
        self.folder.open_log(saved and saved["tuner"]["done"]["step"], self.config.log.tensorboard)
        if saved is None:
            how = f"{self.config.epochs} epochs of {self.tuner.steps_per_epoch} steps"
            held_out = f"{self.used['num_held_out']} of them held out"
            self.world.say(f"{self.folder.path}: {how} on {self.task.labels}, {held_out}")
            return
        self.tuner.load_state_dict(saved["tuner"])
        self.best, self.is_due = saved["best"], saved["is_due"]
        checkpoint.restore_rng_state(saved["rng"])
        self.world.say(f"{self.folder.path}: resumed at step {self.tuner.step}")
        if note := self.folder.note_versions(saved):
            self.world.say(note)

    def _state(self):
        self._check_finite()
        return {"tuner": self.tuner.state_dict(), "best": self.best, "is_due": self.is_due}

    def _check_finite(self):
        self.tuner.check_finite(self.folder.path)

    def fit(self, results):
        """Train to the end; returns the record of the result, which is reported in the folder
        `results`."""
        while True:
            epoch, rest = divmod(self.tuner.step, self.tuner.steps_per_epoch)
            if rest == 0:
                if self.is_due:
                    self._select(epoch)
                if epoch == self.config.epochs:
                    return self._finish(results)
            self._train_epoch(epoch)

    def _train_epoch(self, epoch):
        end = (epoch + 1) * self.tuner.steps_per_epoch
        for _ in self.tuner.train(end):
            if self.tuner.step % self.config.log.every_steps == 0:
                self._log()
            self.keeper.save_if_due(self.tuner.step)
        self._log()
        self.is_due = self.config.select != "last"
        self.keeper.save_if_due(0)

    def _log(self):
        self._check_finite()
        total = self.config.epochs * self.tuner.steps_per_epoch
        self.folder.write(log_record(self.tuner, total, self.world))

    def _measure(self, network, part):
        targets = self.task.val if part == "val" else self.task.train
        rest = (self.world, self.config.precision, self.keeper.exit_if_asked, self.folder.path)
        return evaluate(network, self.loaders[part], targets, *rest)

    def _select(self, epoch):
        """Measure the epoch that has ended, and keep its weights if it is the best."""
        part, network = self.config.select, self.tuner.network
        metrics = self._measure(network, part)
        score = metrics[self.task.train.metric]
        if self.best is None or score > self.best["score"]:
            weights = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
            self.best = {"epoch": epoch, "score": score, "network": weights}
        self.is_due = False
        shown = {f"{part}/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self.folder.write({**self.tuner.done.record(), **shown})
        what = f"{self.task.train.metric} on {part}"
        self.world.say(f"epoch {epoch}/{self.config.epochs}  {what}: {score:.1%}")

    def _finish(self, results):
        """Measure on the validation file, save the network, report the record and return it."""
        self.keeper.save()
        network, last = self.tuner.network, self._measure(self.tuner.network, "val")
        metrics = {"selected_on": self.config.select, "best_epoch": self.config.epochs, **last}
        if self.best is not None:
            network = copy.deepcopy(network)  # the last one stays, to be saved at a signal
            network.load_state_dict(self.best["network"])
            metrics |= self._measure(network, "val")
            metrics |= {"best_epoch": self.best["epoch"], "selection_score": self.best["score"]}
        metrics |= {f"last_{key}": value for key, value in last.items() if key != "per_class"}
        done = self.tuner.done.record()
        return finish_run("finetune", self, network, metrics, done, results)

    def close(self):
        """End the loaders' threads."""
        for loader in self.loaders.values():
            loader.close()
