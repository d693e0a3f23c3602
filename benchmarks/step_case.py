"""Times the step of `train.Trainer`, as a whole and in parts.

A part costs milliseconds; two runs of the same step differ by more. So parts are not measured by
leaving one out. Instead, each part's start and end are recorded within the step on the device's
time line (CUDA events; the clock on a CPU), without waiting for the device. As a check, the step
without probes, averages and other extras is timed as a whole too.
"""
# Shapes: B images per batch, V views, D features.

import gc
import time
from collections import defaultdict
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

import train
from ffcv_ssl.training.clock import Clock
from ffcv_ssl.training.meters import Interval
from ffcv_ssl.training.optimizers import make_optimizer

MODEL, LOSS, REST = "model, forward and backward", "loss, forward and backward", "the rest"
TEACHER, AVERAGE, OPTIMIZER = "teacher's forward", "teacher's average", "optimiser"
PROBES, CLIPPING = "probes", "clipping"
AVERAGES, WATCH = "averages of losses", "watch for not finite losses"
WHOLE = "whole"

# The error of bfloat16 through 50 layers; with other work or weights it would be about 1.
_SAME_WORK = 0.05


class Spans:
    """Time spent in functions by name."""

    def __init__(self, clock):
        self.clock, self.marks = clock, defaultdict(list)

    def timed(self, name, function):
        """Wrap the function so that its time is counted under `name`."""

        def run(*arguments, **options):
            start = self.clock.now()
            result = function(*arguments, **options)
            self.marks[name].append((start, self.clock.now()))
            return result

        return run

    def timed_loss(self, name, function):
        """Wrap a method's loss so that its forward and backward pass are counted. The backward pass
        goes from the gradient of the loss to the gradients of the features that the loss reads."""

        def run(outputs, labels):
            start = self.clock.now()
            loss, terms = function(outputs, labels)
            self.marks[name].append((start, self.clock.now()))
            backward = []
            self.marks[name].append(backward)
            for tensor in (loss, *read_by_loss(outputs)):
                tensor.register_hook(lambda _: backward.append(self.clock.now()))
            return loss, terms

        return run

    def seconds(self, name):
        """The sum so far; call `clock.wait()` before."""
        return sum(self.clock.seconds(moments[0], moments[-1]) for moments in self.marks[name])


def read_by_loss(outputs):
    """The features of each view that the method's loss reads."""
    kinds = ("prediction", "class", "embedding")
    return [next(features[kind] for kind in kinds if kind in features) for features in outputs]


class StepCase:
    """A run's trainer and, after `prepare`, a batch of noise on its device.

    config: a train.Config; its folder is made. world: a World of one rank. All times are seconds
    per step, between two moments at which the device is idle.
    """

    def __init__(self, config, world):
        Path(config.out).mkdir(parents=True, exist_ok=True)
        self.trainer = train.Trainer(config, world, SimpleNamespace(asked=False))
        self.config, self.px = config, config.resolution.max
        self.clock = Clock(world.device)

    def prepare(self, bare=True):
        """Make the batch and, to measure the bare pass and parts of a step, what they need.
        RuntimeError unless the bare pass and the step compute the same embeddings."""
        trainer, name = self.trainer, self.config.optim.name
        train_set, layout, device = trainer.train_set, trainer.layout, trainer.world.device
        num_classes = None if train_set.labels is None else train_set.num_classes
        sizes = (self.config.unlabelled_batch_size, self.config.labelled_batch_size)
        self.data = trainer.streams.noise(self.px, sizes, num_classes, device, layout)
        if not bare:
            return
        views = list(self.data.unlabelled.views)
        sides = sorted({view.shape[-1] for view in views}, reverse=True)
        groups = [[view for view in views if view.shape[-1] == side] for side in sides]
        self.joined = [torch.cat(group).contiguous(memory_format=layout) for group in groups]
        self.encode = trainer.model.encode
        if self.config.system.compile:
            self.encode = torch.compile(self.encode)
        self.optimizers = {
            other: make_optimizer(replace(self.config.optim, name=other), trainer.learner)
            for other in ("lars", "sgd")
        }
        self.optimizers[name] = trainer.optimizer
        self._check_same_work(sorted(views, key=lambda view: -view.shape[-1]))

    @torch.no_grad()
    def _check_same_work(self, views):
        outputs = self.trainer._forward(self.trainer.network, views, len(views))
        step = torch.cat([features["embedding"] for features in outputs]).float()
        with self.trainer._autocast():
            bare = [self.encode(images)[self.trainer.model.last] for images in self.joined]
        difference = (torch.cat(bare).float() - step).norm() / step.norm()
        if not difference < _SAME_WORK:
            expected = f"expected less than {_SAME_WORK}"
            raise RuntimeError(f"bare pass and step differ by {difference:.3f}, {expected}")

    def bare(self, num_steps):
        """The floor: forward and backward pass of backbone and projector alone, on views joined in
        advance; the gradient of the embedding is ones. No loss, no update."""
        last = self.trainer.model.last

        def forward_backward():
            for images in self.joined:
                with self.trainer._autocast():
                    embedding = self.encode(images)[last]
                embedding.backward(torch.ones_like(embedding))
            self.trainer.optimizer.zero_grad(set_to_none=True)

        return self._time(num_steps, forward_backward)

    def step(self, num_steps):
        """The trainer's whole step on the batch of noise."""
        return self._time(num_steps, self._train_step)

    def step_without_extras(self, num_steps):
        """The step with SGD and without probes, averages, watch and the teacher's update."""
        trainer = self.trainer
        off = [(trainer.averages, "add_losses"), (trainer.watch, "see")]
        off.append((trainer.method, "after_update"))
        with ExitStack() as stack:
            for owner, name in off:
                stack.enter_context(patch.object(owner, name, lambda *_: None))
            stack.enter_context(patch.object(trainer, "probes", None))
            stack.enter_context(patch.object(trainer, "optimizer", self.optimizers["sgd"]))
            return self.step(num_steps)

    def parts(self, num_steps, optimizer=None):
        """{name: seconds per step} of WHOLE, and of the parts that add up to WHOLE.

        optimizer: `lars` or `sgd` instead of the configured one, with gradients clipped to 1.
        """
        trainer, spans = self.trainer, Spans(self.clock)
        with ExitStack() as stack:
            if optimizer is not None:
                clipping = replace(self.config, optim=replace(self.config.optim, clip_norm=1.0))
                stack.enter_context(patch.object(trainer, "config", clipping))
                chosen = self.optimizers[optimizer]
                stack.enter_context(patch.object(trainer, "optimizer", chosen))
            functions = self._functions()
            for name, (owner, function) in functions.items():
                wrap = spans.timed_loss if name == LOSS else spans.timed
                timed = wrap(name, getattr(owner, function))
                stack.enter_context(patch.object(owner, function, timed))
            self._time(num_steps, spans.timed(WHOLE, self._train_step))
        names = (WHOLE, *functions)
        found = {name: spans.seconds(name) / num_steps for name in names}
        found[MODEL] -= found[LOSS] + found.get(TEACHER, 0)
        found[REST] = found[WHOLE] - sum(found[name] for name in found if name != WHOLE)
        return found

    def _functions(self):
        """The parts of a step to time: {name: (object, its function)}."""
        trainer = self.trainer
        functions = {MODEL: (trainer, "_backward"), LOSS: (trainer.method, "loss")}
        if hasattr(trainer.method, "teacher"):
            functions[TEACHER] = (trainer.method, "targets")
            functions[AVERAGE] = (trainer.method, "after_update")
        functions[OPTIMIZER] = (trainer.optimizer, "step")
        if trainer.config.optim.clip_norm:
            functions[CLIPPING] = (nn.utils, "clip_grad_norm_")
        if trainer.probes is not None:
            functions[PROBES] = (trainer.probes, "train_step")
        functions[AVERAGES] = (trainer.averages, "add_losses")
        functions[WATCH] = (trainer.watch, "see")
        return functions

    def log_line(self):
        """Seconds per log line: reading the averages, checking all weights, and writing."""
        self._train_step()
        self.clock.wait()
        start = time.perf_counter()
        self.trainer._log(self.px)
        return time.perf_counter() - start

    def loop(self, num_warm, num_steps):
        """`num_steps` steps of the trainer's loop with loader and log lines, measured after
        `num_warm` steps have used up the batches loaded in advance: {"images_per_s", "data_wait"
        (share)}."""
        trainer, interval = self.trainer, Interval(self.clock.device)
        with closing(trainer.streams.steps(0, self.px)) as steps:
            for number, data in enumerate(interval.timed(steps), 1):
                trainer._train_step(data, self.px)
                if trainer.step % self.config.log.every_steps == 0:
                    trainer._log(self.px)
                if number in (num_warm, num_warm + num_steps):
                    self.clock.wait()
                    seconds, waited = interval.seconds()
                    interval.start()
                if number == num_warm + num_steps:
                    break
        rate = num_steps * self.config.unlabelled_batch_size / seconds
        return {"images_per_s": rate, "data_wait": waited / seconds}

    def peak_memory_mib(self, num_warm, num_steps):
        """Peak memory of the running loop: torch's allocations on a GPU, or the process' resident
        memory on a CPU."""
        self.loop(num_warm, num_steps)  # cuDNN tries algorithms; some need far more memory
        gc.collect()
        if self.clock.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.clock.device)
            self.loop(num_warm, num_steps)
            return torch.cuda.max_memory_allocated(self.clock.device) / 2**20
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        self.loop(num_warm, num_steps)
        with open("/proc/self/status") as status:
            return next(int(s.split()[1]) for s in status if s.startswith("VmHWM")) / 1024

    def close(self):
        """End the loader's threads."""
        self.trainer.close()

    def _train_step(self):
        self.trainer._train_step(self.data, self.px)

    def _time(self, num_steps, action):
        self.clock.wait()
        start = time.perf_counter()
        for _ in range(num_steps):
            action()
        self.clock.wait()
        return (time.perf_counter() - start) / num_steps
