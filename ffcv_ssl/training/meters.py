"""What a training loop measures between two log lines, without waiting for the device."""

from __future__ import annotations

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ffcv_ssl.errors import NonFiniteLoss


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

    def add_losses(self, loss, terms, weight):
        """Add a loss and its named terms; weight: a scalar tensor, 0 where another rank counts."""
        counts = weight > 0
        for name, value in {"": loss, **{f"/{name}": term for name, term in terms.items()}}.items():
            self.add(f"train/loss{name}", torch.where(counts, value.detach(), 0.0), weight)

    def over_ranks(self, world):
        """The sums over all ranks, by name; every rank must have the same names or none."""
        names = sorted(self.sums)
        if world.size == 1 or not names:
            return dict(self.sums)
        return dict(zip(names, world.sum_(torch.stack([self.sums[name] for name in names]))))

    def load(self, sums, world):
        """Go on from the sums that `over_ranks` returned: the first rank takes them all."""
        self.sums = {k: pair.to(world.device) * world.is_first for k, pair in sums.items()}

    def take(self, world):
        """The means over all ranks as floats by name; starts anew. A mean of nothing is left
        out."""
        pairs = {name: pair.tolist() for name, pair in self.over_ranks(world).items()}
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


class Counters:
    """What a run has done so far: steps, updates of the weights (fewer where fp16 skipped one),
    images, views, floating-point operations, and seconds."""

    NAMES = ("step", "updates", "images", "views", "flops")

    def __init__(self, steps_per_epoch):
        self.steps_per_epoch = steps_per_epoch
        self.step = self.updates = self.images = self.views = self.flops = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def state_dict(self):
        """All of them by name, as plain numbers."""
        seconds = round(self.seconds_before + time.perf_counter() - self.started, 3)
        return {**{name: getattr(self, name) for name in self.NAMES}, "seconds": seconds}

    def load_state_dict(self, state):
        """Go on counting from `state`, which may hold other things too."""
        for name in self.NAMES:
            setattr(self, name, state[name])
        self.seconds_before, self.started = state["seconds"], time.perf_counter()

    def record(self):
        """What a line of metrics says of them."""
        return {"epoch": round(self.step / self.steps_per_epoch, 6), **self.state_dict()}


class FiniteWatch:
    """Notices the first loss that is NaN or infinite without waiting for the device."""

    def __init__(self, device):
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, loss, step):
        """Look at the loss of a step."""
        is_bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(is_bad, step, self.first_bad_step)

    def check(self, parameters, step, path, settings, kept):
        """Raise NonFiniteLoss if a loss so far or a weight, after `step`, is not finite; waits for
        the device. path, settings, kept: texts of the error."""
        first = int(self.first_bad_step)
        norms = torch.stack(torch._foreach_norm(list(parameters)))
        if first < 0 and bool(torch.isfinite(norms).all()):
            return
        what = f"the loss of step {first}" if first >= 0 else f"a weight, by step {step},"
        remedy = "lower optim.lr or raise the precision"
        raise NonFiniteLoss(f"{path}: {what} is not finite ({settings}); {kept}; {remedy}")


def flops_per_image(model, sides_px, *arguments, backward=True):
    """Floating-point operations of a training step, forward and, unless `backward` is False,
    backward, an image with all its views.

    `model` takes a list of views (B, 3, px, px), then `arguments`, and returns a list of dicts of
    features. Counted on a twin without data (meta device): it computes nothing and draws no random
    numbers.
    """
    twin = copy.deepcopy(model).to("meta").train()
    views = [torch.empty(2, 3, px, px, device="meta") for px in sides_px]
    with FlopCounterMode(display=False) as counter:
        outputs = twin(views, *arguments)
        if backward:
            sum(z.sum() for features in outputs for z in features.values()).backward()
    return counter.get_total_flops() // 2


def step_flops(learner, sides_px, num_own, twice):
    """Operations an image of a training step; `twice`: with one more pass without gradients."""
    flops = flops_per_image(learner, sides_px, num_own)
    return flops + (flops_per_image(learner, sides_px, num_own, backward=False) if twice else 0)
