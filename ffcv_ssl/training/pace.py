"""How fast a run is and how long it is going to take, for its log lines and its live line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ffcv_ssl.training.console import Phase, in_words
from ffcv_ssl.training.optimizers import resolution_at
from ffcv_ssl.training.world import World

T = TypeVar("T")


class Pace:
    """The pace of a run since this process started it, or goes on with it.

    config: the trainer's, of which epochs, resolution and evaluation count. evaluation: with
    `num_images`; None: the run has none. A step's cost grows with the number of its pixels, so that
    the estimate holds while the resolution grows.
    """

    def __init__(self, config: Any, steps_per_epoch: int, evaluation: Any, world: World) -> None:
        self.config, self.steps_per_epoch, self.world = config, steps_per_epoch, world
        self.num_evaluated = 0 if evaluation is None else evaluation.num_images
        self.pixels = [resolution_at(e, config.resolution) ** 2 for e in range(config.epochs)]
        self.seconds = self.work = 0.0  # of the steps measured so far, but for the first
        self.evaluation_s: float | None = None
        self.epoch_began: float | None = None
        self.step, self.is_first = 0, True
        self.phase: Phase | None = None

    def steps(self, steps: Iterable[T], step: int) -> Iterator[T]:
        """Yield the steps of an epoch from `step` on; measure and show them."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        name, pixels = f"epoch {epoch + 1} of {self.config.epochs}", self.pixels[epoch]
        options: Any = {"announced": self.is_first, "beyond": self._run_left, "done": rest}
        with self.world.console.phase(name, self.steps_per_epoch, "steps", **options) as phase:
            self.phase, self.step = phase, step
            before = time.perf_counter()
            self.epoch_began = None if rest else before
            for data in steps:
                yield data
                now = time.perf_counter()
                if not self.is_first:  # it compiles kernels, and torch looks for the fastest ones
                    self.seconds, self.work = self.seconds + now - before, self.work + pixels
                self.is_first, before, self.step = False, now, self.step + 1
                phase.advance()
        self.phase = None

    @contextlib.contextmanager
    def evaluation(self, step: int) -> Iterator[Phase]:
        """The block is the evaluation after so many steps."""
        what = "the untrained network"
        if step:
            what = f"after epoch {step // self.steps_per_epoch} of {self.config.epochs}"
        began, announced = time.perf_counter(), self.evaluation_s is None
        options: Any = {"announced": announced}
        name = f"evaluating {what}"
        with self.world.console.phase(name, self.num_evaluated, **options) as phase:
            yield phase
        self.evaluation_s = time.perf_counter() - began

    def left_s(self, step: int) -> float | None:
        """Seconds from a step to the end of the run, or None as long as too little is known."""
        if self.work == 0:
            return None
        epoch, rest = divmod(step, self.steps_per_epoch)
        pixels = self.steps_per_epoch * sum(self.pixels[epoch:])
        pixels -= rest * self.pixels[epoch] if rest else 0
        left_s = self.seconds / self.work * pixels
        if self.num_evaluated:
            left_s += self._evaluations_from(epoch + (rest > 0)) * (self.evaluation_s or 0)
        return left_s

    def _evaluations_from(self, epoch: int) -> int:
        """How many evaluations there are after epoch `epoch`, which is at least 1, and later."""
        every, epochs = self.config.evaluation.every_epochs, self.config.epochs
        return epochs // every - (max(1, epoch) - 1) // every + (epochs % every > 0)

    def describe(self, step: int) -> str:
        """The end of a log line after so many steps: the time of an epoch that is over, and what is
        left of the run."""
        text, epoch = "", step // self.steps_per_epoch
        if self.phase is not None:
            self.phase.spoke = time.perf_counter()
        if step % self.steps_per_epoch == 0 and self.epoch_began is not None:
            epoch_s = time.perf_counter() - self.epoch_began
            text = f"  epoch {epoch} of {self.config.epochs} in {in_words(epoch_s)}"
        left_s = self.left_s(step)
        if left_s is None or epoch == self.config.epochs:
            return text
        return f"{text}  {in_words(left_s)} left"

    def _run_left(self) -> str:
        left_s = self.left_s(self.step)
        return "" if left_s is None else f"  (run: {in_words(left_s)})"
