"""A learner on several ranks: they average gradients, and batch-norm may see the rows of all."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.training.sync_batchnorm import convert
from ffcv_ssl.training.world import World


def is_batchnorm_synced(setting: str, world: World) -> bool:
    """Whether batch-norm sees the rows of all ranks. setting: auto (on CUDA), on or off."""
    is_on = world.device.type == "cuda" if setting == "auto" else setting == "on"
    return is_on and world.size > 1


def share_learning(
    learner: nn.Module, world: World, system: SystemConfig, unreached: bool = False
) -> nn.Module:
    """Wrap the learner: ranks average gradients, and may share batch-norm statistics.

    system: says whether they do, and whether torch.compile is used, for the learner and for modules
    in it that run apart from it (`compiled_apart`). unreached: some parameters may get no gradient
    in some steps.
    """
    is_synced = is_batchnorm_synced(system.sync_batchnorm, world)
    if is_synced:
        convert(learner, world)
    if system.compile:  # a second resolution compiles once more, with fixed shapes too
        for module in learner.modules():
            if module is learner or getattr(module, "compiled_apart", False):
                module.compile(dynamic=False)
    if world.size == 1:
        return learner
    kept_equal = [
        f"{path}.{buffer}"
        for path, module in learner.named_modules()
        for buffer in getattr(module, "equal_on_all_ranks", ())
    ]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(learner, kept_equal)  # otherwise the first rank would broadcast them at each step
    network = DistributedDataParallel(
        learner,
        [world.device.index] if world.device.type == "cuda" else None,
        find_unused_parameters=unreached,
        gradient_as_bucket_view=True,  # the gradients are in memory once, not twice
    )
    if is_synced:  # buffers are equal on all ranks anyhow; as an argument it is deprecated in 2.15
        network.broadcast_buffers = False
    return network


def average_gradients(
    network: nn.Module, now: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """The context of a backward pass through the module that `share_learning` returned. The ranks
    average gradients at the end of this pass (`now`), or in a later pass."""
    if now or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()
