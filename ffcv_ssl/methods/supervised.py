"""The supervised baseline: cross-entropy of a linear classifier on the last depth.

python train.py --method supervised --views.recipe supervised --data.train A.beton
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval
from torch import nn

from ffcv_ssl.methods.base import Features, Loss, Method
from ffcv_ssl.methods.numeric import cross_entropy
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised baseline."""

    label_smoothing: ClosedUnitInterval = 0.0
    """Share of the target that is spread over all classes."""


class Supervised(Method):
    """The baseline: a linear classifier on the last depth, trained on the file's labels."""

    group, Settings = "supervised", SupervisedConfig
    min_views, max_views = 1, 12
    needs_labels = True

    def __init__(self, config: Any, model: Model, num_classes: int, world: World) -> None:
        super().__init__(config, model, num_classes, world)
        self.classifier = nn.Linear(model.widths[model.last], num_classes)

    def add_heads(self, outputs: list[Features]) -> None:
        for features in outputs:
            features["class"] = self.classifier(features["embedding"])

    def loss(self, outputs: list[Features], labels: torch.Tensor | None) -> Loss:
        assert labels is not None, "needs_labels"
        logits = self.all_gather(outputs, "class")  # (V, B, K)
        labels = self.world.gather(labels).repeat(len(logits))
        return cross_entropy(logits.flatten(0, 1), labels, self.settings.label_smoothing), {}
