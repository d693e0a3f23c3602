"""SimSiam (Chen and He 2021): a predictor and a stop-gradient, without negatives or a teacher.

python train.py --method simsiam --model.projector 2048-2048-2048 --model.projector_norm all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import nn

from ffcv_ssl.methods.base import Features, Loss, Method, apply_head
from ffcv_ssl.methods.numeric import unit_rows
from ffcv_ssl.training.models import Model, make_mlp
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class SimSiamConfig:
    """SimSiam's settings. The paper's projector is 2048-2048-2048 with batch-norm at its end."""

    predictor: PositiveInt = 512
    """Width of the predictor's hidden layer: a quarter of the embedding's in the paper."""
    constant_predictor_lr: bool = True
    """Keep the predictor's learning rate at the peak of the others', without warm-up (4.2)."""


def simsiam(predictions: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Negative cosine of one view's prediction and another's embedding (Chen and He 2021, eq. 2).

    L = 1/2 D(p1, stop(z2)) + 1/2 D(p2, stop(z1)), D(p, z) = -cos(p, z), the mean over images. More
    views than two average over all ordered pairs. (V, B, D) each, V >= 2.
    """
    p, z = unit_rows(predictions), unit_rows(embeddings.detach())
    num_views = len(p)
    pairs = [(v, w) for v in range(num_views) for w in range(num_views) if v != w]
    return -torch.stack([(p[v] * z[w]).sum(-1).mean() for v, w in pairs]).mean()


class SimSiam(Method):
    """A predictor predicts one view's embedding from the other; the target gets no gradient."""

    group, Settings = "simsiam", SimSiamConfig
    max_views = 12

    def __init__(self, config: Any, model: Model, num_classes: int, world: World) -> None:
        super().__init__(config, model, num_classes, world)
        width = model.widths[model.last]
        norm = "none" if config.model.projector_norm == "none" else "hidden"
        self.predictor = nn.Sequential(*make_mlp(f"{self.settings.predictor}-{width}", width, norm))

    def add_heads(self, outputs: list[Features]) -> None:
        apply_head(self.predictor, outputs, "prediction")

    def constant_lr(self) -> dict[nn.Module, float]:
        return {self.predictor: 1.0} if self.settings.constant_predictor_lr else {}

    def loss(self, outputs: list[Features], labels: torch.Tensor | None) -> Loss:
        return simsiam(self.all_gather(outputs, "prediction"), self.all_gather(outputs)), {}
