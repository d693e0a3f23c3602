"""The quality of features: linear probes and k-nearest neighbours, as pure functions of features.

Shapes: B images per batch, D features, N images of the bank, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ffcv_ssl.config.settings import ProbeConfig
from ffcv_ssl.training.meters import Averages
from ffcv_ssl.training.world import World


class Probes(nn.Module):
    """A linear classifier at every depth, on detached features: the model gets no gradients.

    widths, stage_widths: depth -> D. Those of stages come last, and draw their first weights apart:
    all that draws random numbers afterwards draws the same ones with them as without.
    """

    def __init__(
        self,
        widths: dict[str, int],
        num_classes: int,
        stage_widths: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        layers = {name: nn.Linear(width, num_classes) for name, width in widths.items()}
        with torch.random.fork_rng(devices=[]):
            layers |= {name: nn.Linear(width, num_classes) for name, width in stage_widths.items()}
        self.layers = nn.ModuleDict(layers)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features by depth, (B, D), any float type -> logits by depth, (B, K), float32."""
        return {name: layer(features[name].detach().float()) for name, layer in self.layers.items()}


def probe_loss(
    logits: dict[str, torch.Tensor], labels: torch.Tensor, num_labelled: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy, mean over labelled images, sum over depths. labels (B,), -1: unlabelled.

    A batch without labels has loss 0 and trains nothing. num_labelled: the number of labelled
    images of the whole batch, where this batch is only a part.
    """
    num_labelled = (labels >= 0).sum() if num_labelled is None else num_labelled
    losses = [F.cross_entropy(x, labels, ignore_index=-1, reduction="sum") for x in logits.values()]
    return sum(losses) / num_labelled.clamp(min=1)


class ProbeTrainer:
    """Trains probes with AdamW on the labelled images of all ranks. The state dict holds probes and
    optimizer."""

    def __init__(self, probes: Probes, config: ProbeConfig, world: World) -> None:
        self.probes, self.world = probes, world
        self.optimizer = torch.optim.AdamW(
            probes.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )

    def train_step(
        self, features: dict[str, torch.Tensor], labels: torch.Tensor, averages: Averages
    ) -> None:
        """One step on this rank's features by depth, (B, D), and labels (B,). Adds the top-1
        accuracy of each probe to the averages."""
        logits = self.probes(features)
        num_labelled = (labels >= 0).sum()
        total = self.world.sum_(num_labelled.clone())
        self.optimizer.zero_grad(set_to_none=True)
        probe_loss(logits, labels, total).backward()
        self.world.sum_gradients_(self.probes.parameters())
        self.optimizer.step()
        for name, scores in logits.items():
            correct = topk_correct(scores.detach(), labels, 1)
            averages.add(f"train/{name}/top1", correct, num_labelled)

    def state_dict(self) -> dict[str, Any]:
        """The state of the probes and of the optimizer."""
        return {"probes": self.probes.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.probes.load_state_dict(state["probes"])
        self.optimizer.load_state_dict(state["optimizer"])


def topk_correct(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Number of images with their label (B,) among the k best scores (B, K); -1 never counts."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).sum()


def knn_scores(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    num_classes: int,
    k: int,
    temperature: float,
) -> torch.Tensor:
    """Weighted k-nearest-neighbour votes: each of the k nearest images votes with exp(sim/t).

    queries (B, D) and bank (N, D): float32 with unit rows; bank_labels (N,) in [0, K). Returns
    scores (B, K), scaled by exp(-1/t) against overflow. Source: Wu et al. 2018, section 3.4.
    """
    similarity, neighbours = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (B, k)
    votes = torch.exp((similarity - 1) / temperature)
    scores = torch.zeros(len(queries), num_classes, device=queries.device)
    return scores.scatter_add_(1, bank_labels[neighbours], votes)
