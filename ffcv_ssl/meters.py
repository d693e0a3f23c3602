"""What a training loop measures between two log lines, without waiting for the device."""

from __future__ import annotations

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode


class Averages:
    """Means kept on the device: a step adds, and only `take` waits for the numbers.

    `sums` maps a name to a float64 tensor (sum, weight), fit for a checkpoint.
    """

    def __init__(self):
        self.sums = {}

    def add(self, name, value, weight):
        """Add a sum and its weight, scalar tensors, to the mean called `name`."""
        pair = torch.stack([value.detach().double(), weight.double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self):
        """The means as floats by name; starts anew. A mean of nothing is left out."""
        pairs = {name: pair.tolist() for name, pair in self.sums.items()}
        self.sums = {}
        return {name: total / weight for name, (total, weight) in pairs.items() if weight}


class Interval:
    """Images per second, and the share of time spent waiting for data, since the last log line."""

    def __init__(self):
        self.start()

    def start(self):
        """Begin to measure."""
        self.images, self.wait_s, self.since = 0, 0.0, time.perf_counter()

    def timed(self, batches):
        """Yield the batches, measuring how long each is waited for."""
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def take(self):
        """(images per second, share of time waiting), both rounded; starts anew."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate, wait = round(self.images / seconds, 1), round(min(1.0, self.wait_s / seconds), 4)
        self.start()
        return rate, wait


def flops_per_image(model, sides_px):
    """Floating-point operations of a training step, forward and backward, an image with all its
    views; `model` takes a list of views (B, 3, px, px) and returns a list of dicts of features.

    Counted on a twin without data (meta device): it computes nothing and draws no random numbers.
    """
    twin = copy.deepcopy(model).to("meta").train()
    views = [torch.empty(2, 3, px, px, device="meta") for px in sides_px]
    with FlopCounterMode(display=False) as counter:
        last = [list(features.values())[-1] for features in twin(views)]
        sum(z.sum() for z in last).backward()
    return counter.get_total_flops() // 2
