"""What `auto` means for a setting of a training run: a choice by the machine and by the data.

With a GPU, `auto` stands for what the files below say (`base`), with a batch that the images fill.
Without a GPU it is a small network on small views, which shows within minutes what it learns.
A run keeps what was chosen when it began: its `config.yaml` has the values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ffcv_ssl.training.machine import is_bf16_fast

SMALL_RUN: dict[str, Any] = {
    "views.recipe": "simclr", "views.small_images": True,
    "resolution.min": 64, "resolution.max": 64, "evaluation.resolution": None,
    "model.backbone": "resnet18", "model.projector": "512-128", "simclr.temperature": 0.2,
    "optim.name": "sgd", "optim.lr": 0.3, "optim.weight_decay": 1e-4, "probes.lr": 1e-3,
    "evaluation.knn_bank": 4096, "checkpoint.keep_every": 0, "log.every_steps": 10,
}  # fmt: skip
"""Settings without a GPU: those of configs/imagenette/cpu_simclr.yaml."""
COMPUTED = (
    "precision", "channels_last", "epochs", "optim.warmup_epochs", "data.batch_size",
)  # fmt: skip
"""Settings that depend on the processor and on the number of images, too."""
CHOOSABLE = frozenset({*SMALL_RUN, *COMPUTED})
LARGEST_BATCH, LEAST_SHARE = 256, 2
SMALL_RUN_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1000, 10, 100
WARMUP_SHARE, MOST_WARMUP_EPOCHS = 0.1, 10.0


class Machine(NamedTuple):
    """Where a run is going to train."""

    has_gpu: bool
    ranks: int
    bf16: bool
    """Whether bf16 is the faster precision."""

    @classmethod
    def of_this_process(cls, device: str) -> Machine:
        """The machine of this process. device: system.device. Ranks on several machines count as
        without bf16 on CPUs, because all ranks must choose the same."""
        environment = os.environ
        ranks = int(environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1)
        has_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        local = int(environment.get("LOCAL_WORLD_SIZE", 0)) or (1 if ranks == 1 else 0)
        return cls(has_gpu, ranks, has_gpu or (ranks == local and is_bf16_fast(ranks == 1)))

    @classmethod
    def of_job(cls, gpus_per_node: int, nodes: int, tasks_per_node: int) -> Machine:
        """The machines of a Slurm job, as far as its settings tell: a job's CPUs count as without
        bf16."""
        return cls(gpus_per_node > 0, nodes * (gpus_per_node or tasks_per_node), gpus_per_node > 0)


def choose(
    names: list[str], below: Mapping[str, Any], machine: Machine, num_images: int | None
) -> dict[str, Any]:
    """{dotted name: value} of the settings `names`, which are all in CHOOSABLE.

    below: settings by dotted name as they are without these. Names that are not in the result stay
    as they are there. num_images: of the training file; None: not known.
    """
    chosen = {} if machine.has_gpu else {n: SMALL_RUN[n] for n in names if n in SMALL_RUN}
    sides = {"resolution.min", "resolution.max"}
    if len(sides & chosen.keys()) == 1:  # the other one was given: this one is the same
        (name,), (given,) = sides & chosen.keys(), sides - chosen.keys()
        chosen[name] = below[given]
    settings = {**below, **chosen}
    if "data.batch_size" in names:
        most = settings["data.batch_size"] if machine.has_gpu else LARGEST_BATCH
        chosen["data.batch_size"] = fitting_batch(most, num_images, machine.ranks)
    if machine.has_gpu:
        return chosen
    batch = chosen.get("data.batch_size", settings["data.batch_size"])
    if "epochs" in names:
        chosen["epochs"] = num_epochs(num_images, batch)
    if "optim.warmup_epochs" in names:
        chosen["optim.warmup_epochs"] = fitting_warmup(chosen.get("epochs", settings["epochs"]))
    if "precision" in names:
        chosen["precision"] = "bf16" if machine.bf16 else "fp32"
    if "channels_last" in names:  # slower for small views in fp32 (demo.is_channels_last)
        chosen["channels_last"] = chosen.get("precision", settings["precision"]) != "fp32"
    return chosen


def fitting_batch(most: int, num_images: int | None, ranks: int) -> int:
    """Images per step: `most`, or fewer where an epoch would have fewer than two steps, or where
    the ranks do not divide it; then a power of two for each rank. At least LEAST_SHARE per rank,
    which may be more than there are images."""
    limit = most if num_images is None else min(most, num_images // 2)
    if limit == most and most % ranks == 0:
        return most
    share = LEAST_SHARE
    while 2 * share * ranks <= limit:
        share *= 2
    return share * ranks


def num_epochs(num_images: int | None, batch: int) -> int:
    """Epochs of a small run: as many as have SMALL_RUN_STEPS steps, within reason."""
    steps = max(1, (num_images or 0) // batch)
    return max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(SMALL_RUN_STEPS / steps)))


def fitting_warmup(epochs: float) -> float:
    """Epochs of warm-up for a run of so many epochs."""
    return min(MOST_WARMUP_EPOCHS, round(WARMUP_SHARE * epochs, 6))
