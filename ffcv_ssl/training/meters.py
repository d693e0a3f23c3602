"""Measurements of a training loop between two log lines, without waiting for the device."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffcv_ssl.errors import NonFiniteLoss
from ffcv_ssl.loader import Loader
from ffcv_ssl.training.clock import Clock
from ffcv_ssl.training.memory import forget_peak, peak_memory_mib
from ffcv_ssl.training.optimizers import resolution_at
from ffcv_ssl.training.world import ALONE, World

T = TypeVar("T")


class Averages:
    """Means kept on the device. Each step adds to them; only `take` waits for the device.

    `sums` maps a name to a float64 tensor (sum, weight); a checkpoint can hold it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a sum and its weight, scalar tensors, to the mean called `name`."""
        pair = torch.stack([value.detach().double(), weight.double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_losses(
        self, loss: torch.Tensor, terms: dict[str, torch.Tensor], weight: torch.Tensor
    ) -> None:
        """Add a loss and its named terms; weight: a scalar tensor, 0 if another rank counts it."""
        counts = weight > 0
        for name, value in {"": loss, **{f"/{name}": term for name, term in terms.items()}}.items():
            self.add(f"train/loss{name}", torch.where(counts, value.detach(), 0.0), weight)

    def over_ranks(self, world: World) -> dict[str, torch.Tensor]:
        """The sums over all ranks, by name. Every rank must have the same names, or none."""
        names = sorted(self.sums)
        if world.size == 1 or not names:
            return dict(self.sums)
        return dict(zip(names, world.sum_(torch.stack([self.sums[name] for name in names]))))

    def load(self, sums: dict[str, torch.Tensor], world: World) -> None:
        """Continue from the sums that `over_ranks` returned. The first rank takes all of them.
        Raises ValueError for what are no sums."""
        if not all(pair.shape == (2,) for pair in sums.values()):
            raise ValueError("averages: got other tensors than pairs of a sum and its weight")
        self.sums = {k: pair.to(world.device) * world.is_first for k, pair in sums.items()}

    def take(self, world: World) -> dict[str, float]:
        """The means over all ranks as floats by name, without those of weight 0. Resets them."""
        pairs = {name: pair.tolist() for name, pair in self.over_ranks(world).items()}
        self.sums = {}
        return {name: total / weight for name, (total, weight) in pairs.items() if weight}


class Interval:
    """The speed of training since the last log line, and what a step waited for.

    device: where steps run. loaders: whose copies to the device are waited for.
    """

    def __init__(self, device: torch.device | str = "cpu", loaders: Sequence[Loader] = ()) -> None:
        self.clock, self.loaders = Clock(device), loaders
        self.start()

    def start(self) -> None:
        """Begin to measure."""
        forget_peak(self.clock.device)
        self.images, self.since = 0, time.perf_counter()
        self._waited_s, self._copied_before_s = 0.0, self._copy_wait_s()
        # the end of a step and the beginning of the next, as long as they may not have passed
        self._pauses: deque[tuple[Any, Any]] = deque()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and measure how long the device has nothing to do before each."""
        remaining = iter(batches)
        while True:
            end = self.clock.now()
            batch = next(remaining, None)
            self._pauses.append((end, self.clock.now()))
            self.seconds()
            if batch is None:
                return
            yield batch

    def seconds(self) -> tuple[float, float]:
        """(seconds since the start, those of them without a batch); of pauses that have passed."""
        while self._pauses and self.clock.has_passed(self._pauses[0][1]):
            self._waited_s += self.clock.seconds(*self._pauses.popleft())
        return max(time.perf_counter() - self.since, 1e-9), self._waited_s

    def take(self, world: World = ALONE) -> dict[str, float]:
        """What metrics hold of this interval, a call on all ranks; the next one begins.

        train/images_per_s; shares of time: train/data_wait for images, on average over ranks,
        train/rank_wait by how much more the slowest rank waited for its images, train/copy_wait
        for copies to a CUDA device; train/peak_memory_mib: of a CUDA device in this interval, or of
        the process since its start on a CPU, where that is known.
        """
        seconds, waited_s = self.seconds()
        copied_s = min(waited_s, self._copy_wait_s() - self._copied_before_s)
        shares = torch.tensor([[waited_s - copied_s, copied_s]], dtype=torch.float64) / seconds
        shares = world.gather(shares.clamp(max=1))  # (ranks, 2)
        data_wait, copy_wait = shares.mean(dim=0).tolist()
        found = {"images_per_s": round(self.images / seconds, 1), "data_wait": round(data_wait, 4)}
        if world.size > 1:
            found["rank_wait"] = round(shares[:, 0].max().item() - data_wait, 4)
        if self.clock.is_cuda:
            found["copy_wait"] = round(copy_wait, 4)
        if (peak := peak_memory_mib(self.clock.device)) is not None:
            found["peak_memory_mib"] = peak
        self.start()
        return {f"train/{name}": value for name, value in found.items()}

    def _copy_wait_s(self) -> float:
        return sum(loader.stats["copy_wait_s"] for loader in self.loaders)


class Counters:
    """What a run has done so far: steps, weight updates (fewer than steps where fp16 skips some),
    images, views, floating-point operations, and seconds."""

    NAMES = ("step", "updates", "images", "views", "flops")

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.step = self.updates = self.images = self.views = self.flops = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def add_step(self, *streams: tuple[int, int, int]) -> int:
        """Count a step; returns its images. streams: (images of all ranks, views of each,
        floating-point operations of each)."""
        images = sum(number for number, _, _ in streams)
        self.step += 1
        self.images += images
        self.views += sum(number * views for number, views, _ in streams)
        self.flops += sum(number * flops for number, _, flops in streams)
        return images

    def state_dict(self) -> dict[str, Any]:
        """All counters by name, as plain numbers."""
        seconds = round(self.seconds_before + time.perf_counter() - self.started, 3)
        return {**{name: getattr(self, name) for name in self.NAMES}, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from `state`; other keys in it are ignored."""
        for name in self.NAMES:
            setattr(self, name, state[name])
        self.seconds_before, self.started = state["seconds"], time.perf_counter()

    def record(self) -> dict[str, Any]:
        """The counters as a line of metrics has them."""
        return {"epoch": round(self.step / self.steps_per_epoch, 6), **self.state_dict()}


class FiniteWatch:
    """Notices the first loss that is NaN or infinite without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, loss: torch.Tensor, step: int) -> None:
        """Check the loss of a step."""
        is_bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(is_bad, step, self.first_bad_step)

    def check(
        self,
        parameters: Iterable[torch.Tensor],
        step: int,
        path: str | Path,
        settings: str,
        kept: str,
    ) -> None:
        """Raise NonFiniteLoss if any loss so far, or a weight after `step`, is not finite. Waits
        for the device. path, settings, kept (what is still sound): texts for the error message."""
        first = int(self.first_bad_step)
        norms = torch.stack(torch._foreach_norm(list(parameters)))
        if first < 0 and bool(torch.isfinite(norms).all()):
            return
        what = f"a weight is not finite after step {step}"
        if first >= 0:
            what = f"the loss of step {first} is not finite"
        # the folder refuses other settings, and its checkpoint holds the schedule of these
        raise NonFiniteLoss(
            f"{path}: {what} ({settings}); {kept}; lower optim.lr or raise the precision in a new "
            "run with another --out, because this folder goes on only with its own settings"
        )


def meta_twin(model: nn.Module) -> nn.Module:
    """A deep copy of a model on the meta device: it takes no memory, however large the model."""
    twins: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for weight in model.parameters():
        twins[id(weight)] = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
    return copy.deepcopy(model, twins).to("meta")


def flops_per_image(
    model: nn.Module, sides_px: list[int], *arguments: Any, backward: bool = True
) -> int:
    """Floating-point operations per image (all its views) of a forward pass and, unless `backward`
    is False, a backward pass.

    `model` takes a list of views (B, 3, px, px), then `arguments`, and returns a list of dicts of
    features. A twin of the model on the meta device is counted: nothing is computed, no random
    numbers are drawn, and no weight is copied.
    """
    twin = meta_twin(model).train()
    views = [torch.empty(2, 3, px, px, device="meta") for px in sides_px]
    with FlopCounterMode(display=False) as counter:
        outputs = twin(views, *arguments)
        if backward:
            sum(z.sum() for features in outputs for z in features.values()).backward()
    return counter.get_total_flops() // 2


def step_flops(learner: nn.Module, sides_px: list[int], num_unlabelled: int, twice: bool) -> int:
    """Floating-point operations per image of a training step. twice: with an additional forward
    pass without gradients. num_unlabelled: number of views of the unlabelled stream."""
    flops = flops_per_image(learner, sides_px, num_unlabelled)
    if twice:
        flops += flops_per_image(learner, sides_px, num_unlabelled, backward=False)
    return flops


def flops_by_px(
    learner: nn.Module, method: Any, views: Mapping[str, Any], config: Any
) -> dict[int, tuple[int, int]]:
    """{resolution: operations of a training step per unlabelled and per labelled image, all views}
    for the resolutions of a run. method: with `extra_flops`; config: the trainer's."""
    found, labels = {}, config.labelled
    twice = config.data.chunk_size > 0  # one more forward pass
    for px in {resolution_at(epoch, config.resolution) for epoch in range(config.epochs)}:
        sides, unlabelled, labelled = [view.size_px(px) for view in views.values()], 0, 0
        if config.unlabelled_batch_size:
            unlabelled = step_flops(learner, sides, len(sides), twice)
            unlabelled += method.extra_flops(sides)
        if labels.loss != "none":
            labelled = step_flops(learner, sides[: labels.num_views], 0, twice)
        found[px] = unlabelled, labelled
    return found
