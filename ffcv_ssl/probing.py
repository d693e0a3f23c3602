"""How good features are: linear probes and k-nearest neighbours, as pure functions of features.

Shapes: B images a batch, D features, N images of the bank, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Probes(nn.Module):
    """A linear classifier at every depth; they see detached features and never touch the model."""

    def __init__(self, widths, num_classes):
        super().__init__()
        layers = {name: nn.Linear(width, num_classes) for name, width in widths.items()}
        self.layers = nn.ModuleDict(layers)

    def forward(self, features):
        """Features by depth, (B, D) of any float type -> float32 logits by depth, (B, K)."""
        return {name: layer(features[name].detach().float()) for name, layer in self.layers.items()}


def probe_loss(logits, labels):
    """Cross-entropy summed over depths, mean over labelled images, of labels (B,), -1: none.

    It is 0 where no image is labelled, so a batch without labels trains nothing.
    """
    num_labelled = (labels >= 0).sum().clamp(min=1)
    losses = [F.cross_entropy(x, labels, ignore_index=-1, reduction="sum") for x in logits.values()]
    return sum(losses) / num_labelled


def hits(scores, labels, k):
    """Number of images whose label (B,) is among the k best scores (B, K); -1 never is."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).sum()


def knn_scores(queries, bank, bank_labels, num_classes, k, temperature):
    """Weighted k-nearest-neighbour votes: the k most similar images vote exp(sim/t) each.

    queries (B, D) and bank (N, D): float32 with unit rows; bank_labels (N,) in [0, K). Returns
    (B, K), scaled by exp(-1/t) so that no temperature overflows. Source: Wu et al. 2018, 3.4.
    """
    similarity, neighbours = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (B, k)
    votes = torch.exp((similarity - 1) / temperature)
    scores = torch.zeros(len(queries), num_classes, device=queries.device)
    return scores.scatter_add_(1, bank_labels[neighbours], votes)
