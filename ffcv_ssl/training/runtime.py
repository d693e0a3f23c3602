"""What all training commands (pretraining, fine-tuning, transfer) share while they run.

    with hold(config.out, world):
        folder, saved = open_folder(config.out, config_dict(config), datasets, world)
        saver = Saver(folder, state, position, minutes=10, world=world, stop=stop)
        for step, batch in enumerate(batches, 1):
            with autocast(config.precision, world.device):
                ...
            saver.save_if_due(step)

Guarantees: all ranks save the same step. If one rank receives a stop signal, all ranks stop at the
same step and leave a checkpoint from which the run resumes exactly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ffcv_ssl.config.renamed import Table
from ffcv_ssl.errors import Interrupted
from ffcv_ssl.files import explained, hold_folder
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.run_folder import CHECKPOINT, RunFolder
from ffcv_ssl.training.world import World

T = TypeVar("T")

AGREE_EVERY = 8
"""Every so many steps, the ranks agree on whether to save or to stop."""

# A resumed run may change these settings, because they do not change the weights. (For data files
# the content is compared, not the path.) Each command adds its own settings.
FREE_KEYS = ("out", "data.train", "data.val", "data.num_workers", "data.os_cache")
FREE_GROUPS = ("log.", "system.", "slurm.")

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of a forward pass: torch's autocast for `bf16` and `fp16`, nothing for `fp32`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler; `take_skipped` tells how many updates it has skipped.

    An optimizer with `_step_supports_amp_scaling` (LARS, torch's fused ones) is told by a tensor
    whether a gradient has overflowed, and no step waits for the device.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        super().__init__(device.type, enabled=enabled)
        self._skipped = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step, unless a gradient has overflowed."""
        result = super().step(optimizer, *args, **kwargs)
        if self.is_enabled():
            self._skipped += sum(self._found_inf_per_device(optimizer).values())
        return result

    def take_skipped(self) -> int:
        """Number of skipped updates since the last call; waits for the device."""
        skipped = int(self._skipped)
        self._skipped.zero_()
        return skipped


class Tracer:
    """Traces steps of a run with torch's profiler, once in a process, into a file per rank.

    num_steps: how many (0: none), after the first WARM_STEPS; where a pass over the data ends
    before, fewer.
    """

    WARM_STEPS = 5

    def __init__(self, folder: Path, num_steps: int, world: World) -> None:
        self.path = folder / f"trace_rank_{world.rank}.json.gz"
        self.num_steps, self.world, self.seen = num_steps, world, 0
        self._profile: Any = None

    def around(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; trace what happens between them."""
        try:
            for batch in batches:
                if self.num_steps and self.seen == self.WARM_STEPS:
                    self._profile = torch.profiler.profile()
                    self._profile.start()
                yield batch
                self.seen += 1
                if self.seen == self.WARM_STEPS + self.num_steps:
                    self._write()
        finally:
            self._write()

    def close(self) -> None:
        """Say so if there was no step to trace."""
        if self.num_steps and 0 < self.seen <= self.WARM_STEPS:
            self.world.say(
                f"system.profile: no trace: the first {self.WARM_STEPS} steps are not traced, and "
                f"this start made {self.seen}"
            )

    def _write(self):
        if self._profile is None:
            return
        self._profile.stop()
        with explained(self.path):
            self._profile.export_chrome_trace(str(self.path))
        self._profile = None
        self.world.say(f"trace of {self.seen - self.WARM_STEPS} steps: {self.path}")


def hold(path: str | Path, world: World) -> contextlib.AbstractContextManager:
    """A context in which no other process can train in the folder `path`. Raises UserError where
    another process does."""
    return hold_folder(path) if world.is_first else contextlib.nullcontext()


def open_folder(
    path: str | Path,
    config: dict,
    datasets: Mapping[str, Any],
    world: World,
    free_keys: tuple[str, ...] = FREE_KEYS,
    free_groups: tuple[str, ...] = FREE_GROUPS,
    renamed: Table | None = None,
    complete: Callable[[dict], dict] | None = None,
) -> tuple[RunFolder, dict | None]:
    """A run's folder, and the state of its checkpoint or None.

    The arguments are those of RunFolder. Raises UserError where the checkpoint belongs to another
    run, and CheckpointError where it cannot be read.
    """
    options = (free_keys, free_groups, world.is_first, renamed, complete)
    folder = RunFolder(path, config, datasets, *options)
    saved = folder.read_checkpoint()
    world.barrier()  # the first rank may write a checkpoint as soon as all ranks have read this one
    return folder, saved


def log_line(step: int, total_steps: int, record: Mapping[str, float]) -> str:
    """One log line; `record`: the entry of these steps in the metrics file."""
    return (
        f"step {step}/{total_steps}  loss {record['train/loss']:.4f}  lr {record['lr']:.4g}  "
        f"{record['train/images_per_s']:.0f} images/s  data wait {record['train/data_wait']:.0%}"
    )


class Saver:
    """Saves a run at intervals. When a signal asks the run to stop, saves it and ends it.

    state: returns the checkpoint's content; all ranks call it, so it may sum over ranks. The state
    of the random generators is added under "rng". position: returns the position in words ("step
    12"). minutes: time between two checkpoints. stop: the StopSignal, or None.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: Callable[[], dict],
        position: Callable[[], str],
        minutes: float,
        world: World,
        stop: StopSignal | None,
    ) -> None:
        self.folder, self.state, self.position = folder, state, position
        self.minutes, self.world, self.stop = minutes, world, stop
        self.saved_at, self.saved_position = time.perf_counter(), "no step"

    def save(self) -> None:
        """Write the checkpoint."""
        self.folder.save({**self.state(), "rng": checkpoint.rng_state()})
        self.mark_saved()

    def mark_saved(self) -> None:
        """Note that the checkpoint on disk holds the present state (just written, or resumed)."""
        self.saved_at, self.saved_position = time.perf_counter(), self.position()

    def save_if_due(self, step: int) -> None:
        """Save if the time has come. All ranks call this after each step; several ranks agree every
        AGREE_EVERY steps. If a rank was asked to stop, save and raise Interrupted."""
        if self.world.size > 1 and step % AGREE_EVERY:
            return
        is_due = time.perf_counter() - self.saved_at >= 60 * self.minutes
        is_asked, is_due = self.world.any(self._is_asked, is_due)
        if is_asked or is_due:
            self.save()
        if is_asked:
            self._interrupt()

    def save_and_exit_if_asked(self) -> None:
        """If a rank was asked to stop, save and raise Interrupted."""
        if self.world.any(self._is_asked)[0]:
            self.save()
            self._interrupt()

    def exit_if_asked(self) -> None:
        """If a rank was asked to stop, raise Interrupted without saving: all is saved already."""
        if self.world.any(self._is_asked)[0]:
            self._interrupt()

    @property
    def _is_asked(self) -> bool:
        return self.stop is not None and self.stop.asked

    def _interrupt(self) -> None:
        raise Interrupted(
            f"{self.folder.path}: interrupted; {CHECKPOINT} holds {self.saved_position}; "
            "run the same command again to continue"
        )
