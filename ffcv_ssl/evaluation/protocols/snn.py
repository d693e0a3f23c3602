"""`snn`: SuNCEt's non-parametric inference (NPI), a softmax over all labelled training images.

Source: Assran et al. 2020, eq. 3 and appendix G.
"""

# Q queries, M images of a part of the bank, D features, K classes

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.evaluation.similarity_bank import BankConfig, Scores, classify, query_slices
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class NPIConfig(BankConfig):
    """Settings of non-parametric inference (NPI)."""

    num_views: NonNegativeInt = 1
    """Random crops and flips of each training image in the bank; 0: its centre crop."""

    def state_size(self, num_classes: int) -> int:
        return 2 * num_classes * len(self.temperatures)  # a maximum and a sum for each class


def run(config: NPIConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Classify by NPI; returns the record. Raises UserError."""
    return classify("snn", config, world, stop, partial(NPIScorer, config))


class NPIScorer:
    """Non-parametric inference, for every temperature of an NPIConfig."""

    def __init__(self, config: NPIConfig, queries: torch.Tensor, num_classes: int) -> None:
        self.num_columns = num_classes
        self.by_temperature = {
            t: ClassSimilarity(queries, num_classes, t) for t in config.temperatures
        }

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        for similarity in self.by_temperature.values():
            similarity.add(bank, labels)

    def scores(self, chosen: slice) -> Iterator[Scores]:
        """Yield log probabilities of all classes, by the name `t0.1`."""
        for t, similarity in self.by_temperature.items():
            values = similarity.log_probabilities(chosen)
            classes = torch.arange(self.num_columns, device=values.device).expand_as(values)
            yield Scores(f"t{t:g}", values, classes)


class ClassSimilarity:
    """Non-parametric inference over a bank that is shown part by part.

    p(c | z) = sum_{i of class c} exp(sim(z, z_i) / t) / sum_i exp(sim(z, z_i) / t) (eq. 3).
    queries: (Q, D) unit rows. A maximum is kept for each class, so that no sum under- or overflows.
    """

    def __init__(self, queries: torch.Tensor, num_classes: int, temperature: float) -> None:
        self.queries, self.temperature = queries, temperature
        shape = (len(queries), num_classes)
        self.largest = queries.new_full(shape, -math.inf)
        self.sums = queries.new_zeros(shape)  # of exp(sim/t - largest)

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        for chosen in query_slices(len(self.queries), max(len(bank), self.sums.shape[1])):
            logits = self.queries[chosen] @ bank.T / self.temperature  # (Q, M)
            columns = labels.expand(len(logits), -1)
            before = self.largest[chosen]
            largest = before.scatter_reduce(1, columns, logits, "amax")
            scale = torch.exp(before - largest).nan_to_num(0.0)  # 0 for a class not seen yet
            sums = self.sums[chosen] * scale
            sums.scatter_add_(1, columns, torch.exp(logits - largest.gather(1, columns)))
            self.largest[chosen], self.sums[chosen] = largest, sums

    def log_probabilities(self, chosen: slice = slice(None)) -> torch.Tensor:
        """log p (Q, K) float64 of some queries; -inf only for a class that the bank lacks; p itself
        would underflow at low temperatures."""
        return torch.log_softmax(self.largest[chosen] + self.sums[chosen].log(), dim=1)


COMMAND = Command(NPIConfig, run, "SuNCEt's non-parametric inference (NPI)", open_frozen_data)
