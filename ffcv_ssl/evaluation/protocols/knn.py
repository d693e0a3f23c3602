"""`knn`: votes of the nearest training images in feature space, nothing trained."""

# Q queries, M images of a part of the bank, D features, K classes, k neighbours

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.evaluation.similarity_bank import BankConfig, classify, query_slices
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class KNNConfig(BankConfig):
    """Settings of k-nearest neighbours (Wu et al. 2018)."""

    ks: list[PositiveInt] = field(default_factory=lambda: [20])
    """Numbers of neighbours that vote; the first one's accuracy is `top1`."""
    weights: Literal["exp", "uniform"] = "exp"
    """exp: a vote weighs exp(similarity / temperature); uniform: all votes weigh the same."""

    @property
    def max_k(self) -> int:
        return max(self.ks)


def run(config: KNNConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Classify by k-NN; returns the record. Raises UserError."""
    return classify("knn", config, world, stop, partial(KNNScorer, config))


class KNNScorer:
    """Votes of the nearest neighbours, for every k and temperature of a KNNConfig."""

    def __init__(self, config: KNNConfig, queries: torch.Tensor, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes
        self.neighbours = NearestNeighbours(queries, config.max_k)
        self.add = self.neighbours.add

    def scores(self) -> dict[str, torch.Tensor]:
        """{`k20_t0.1`: log votes (Q, K)}, `k20` where all votes weigh the same."""
        weighed = self.config.weights == "exp"
        temperatures = self.config.temperatures if weighed else [None]
        similarities, labels = self.neighbours.nearest()
        return {
            f"k{k}" if t is None else f"k{k}_t{t:g}": vote(
                similarities, labels, self.num_classes, k, t
            )
            for k in self.config.ks
            for t in temperatures
        }


class NearestNeighbours:
    """The k most similar images of a bank that is shown part by part. queries: (Q, D) unit rows."""

    def __init__(self, queries: torch.Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.similarities = queries.new_empty(len(queries), 0)
        self.labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        similarities, kept = [], []
        for chosen in query_slices(len(self.queries), len(bank) + self.k):
            before = self.similarities[chosen], self.labels[chosen]
            now = self.queries[chosen] @ bank.T  # (Q, M)
            both = torch.cat([before[0], now], dim=1)
            both_labels = torch.cat([before[1], labels.expand(len(now), -1)], dim=1)
            columns = first_largest(both, self.k)
            similarities.append(both.gather(1, columns))
            kept.append(both_labels.gather(1, columns))
        self.similarities, self.labels = torch.cat(similarities), torch.cat(kept)

    def nearest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(similarities, labels), (Q, k) each, the most similar first; fewer in a smaller bank."""
        return self.similarities, self.labels


def first_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Columns (Q, k) of each row's k largest values (Q, M), largest first; all M where there are
    fewer. Of equal values the first ones count, where torch.topk takes any."""
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    order = values.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


def vote(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    k: int,
    temperature: float | None = None,
) -> torch.Tensor:
    """Logarithms (Q, K) float64 of the votes of the first k neighbours; -inf for a class without
    votes. A vote weighs exp(similarity / temperature), or 1 without a temperature. similarities,
    labels: (Q, at least k, or the whole bank)."""
    similarities, labels = similarities[:, :k], labels[:, :k]
    if temperature is None:
        logits = torch.zeros_like(similarities)
    else:  # minus the largest: differences keep their precision
        logits = (similarities - similarities[:, :1]) / temperature
    largest = logits.new_full((len(labels), num_classes), -math.inf)
    largest.scatter_reduce_(1, labels, logits, "amax")
    sums = torch.zeros_like(largest)
    sums.scatter_add_(1, labels, torch.exp(logits - largest.gather(1, labels)))
    return largest + sums.log()


COMMAND = Command(KNNConfig, run, "votes of the nearest training images", open_frozen_data)
