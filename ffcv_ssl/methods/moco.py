"""MoCo v2 (He et al. 2020; Chen et al. 2020c): contrast with the keys of many past batches.

    python train.py --method moco --model.projector 2048-128 --data.train A.beton

The keys are those of view 0; all other views are queries. The key and the query of an image must
not see the same batch-norm statistics, by which a network can recognise them (He et al. 2020, 3.3).
So, where batch-norm sees only a rank's own rows (ranks on CPUs), the images of all ranks are
shuffled among ranks for the teacher's pass. Nothing is shuffled on a single rank, nor with
synchronised batch-norm (ranks on GPUs), which sees the global batch in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from torch import nn

from ffcv_ssl.methods.base import Features, Loss, Method
from ffcv_ssl.methods.ema_teacher import EMATeacher
from ffcv_ssl.methods.feature_queue import FeatureQueue
from ffcv_ssl.methods.numeric import unit_rows
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.sync_batchnorm import SyncBatchNorm
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class MoCoConfig:
    """MoCo's settings."""

    temperature: PositiveFloat = 0.2
    """Temperature of the softmax over similarities."""
    momentum: ClosedUnitInterval = 0.999
    """The teacher's momentum; its half-life is log 2 / (1 - momentum) steps."""
    queue_size: PositiveInt = 65536
    """Keys of past batches to contrast with; fewer than the training file has images."""


def info_nce(
    queries: torch.Tensor, keys: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE with negatives from a queue (He et al. 2020, eq. 1).

    l = -log(exp(q.k+ / t) / (exp(q.k+ / t) + sum_n exp(q.n / t))), the mean over queries. queries
    (V, B, D), keys (B, D): made unit rows here; negatives (K, D): unit rows. Only queries get a
    gradient.
    """
    q, k = unit_rows(queries), unit_rows(keys.detach())
    positives = (q * k).sum(-1) / temperature  # (V, B)
    negatives = q @ negatives.to(q.dtype).T / temperature  # (V, B, K)
    return F.softplus(negatives.logsumexp(dim=-1) - positives).mean()  # exact where it is small


class MoCo(Method):
    """A query finds the teacher's key of its own image among the keys of past batches."""

    group, Settings = "moco", MoCoConfig
    max_views = 12
    target_views = (0,)

    def __init__(self, config: Any, model: Model, num_classes: int, world: World) -> None:
        super().__init__(config, model, num_classes, world)
        self.teacher = EMATeacher(model, self.settings.momentum)
        self.queue = FeatureQueue(self.settings.queue_size, model.widths[model.last])
        self.keys: torch.Tensor | None = None  # of this step, until they are in the queue

    @torch.no_grad()
    def targets(self, views: list[torch.Tensor]) -> list[Features]:
        (images,) = views
        norms = [
            m for m in self.teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        is_synchronized = all(isinstance(norm, SyncBatchNorm) for norm in norms)
        if self.world.size == 1 or is_synchronized:
            return [{"key": self.teacher([images])[0]}]
        everyone = self.world.gather(images)
        order = torch.randperm(len(everyone), device=images.device)
        self.world.broadcast_([order])
        share = order.chunk(self.world.size)[self.world.rank]
        shuffled = self.world.gather(self.teacher([everyone[share]])[0])
        start = self.world.rank * len(images)
        return [{"key": shuffled[order.argsort()[start : start + len(images)]]}]

    def loss(self, outputs: list[Features], labels: torch.Tensor | None) -> Loss:
        self.keys = unit_rows(self.all_gather(outputs[:1], "key")[0].detach())  # (B, D)
        queries = self.all_gather(outputs[1:])
        return info_nce(queries, self.keys, self.queue.rows, self.settings.temperature), {}

    def after_update(self, model: nn.Module, progress: float) -> None:
        self.teacher.move(model, progress)
        if self.keys is not None:
            self.queue.push(self.keys)
        self.keys = None

    def extra_flops(self, sides_px: list[int]) -> int:
        return self.teacher.flops(sides_px[:1])
