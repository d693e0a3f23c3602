"""`snn`: SuNCEt's non-parametric inference (NPI), a softmax over all labelled training images.

Source: Assran et al. 2020, eq. 3 and appendix G.
"""

# Q queries, M images of a part of the bank, D features, K classes

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.evaluation.similarity_bank import BankConfig, classify, query_slices
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class NPIConfig(BankConfig):
    """Settings of non-parametric inference (NPI)."""

    num_views: NonNegativeInt = 1
    """Random crops and flips of each training image in the bank; 0: its centre crop."""


def run(config: NPIConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Classify by NPI; returns the record. Raises UserError."""
    return classify("snn", config, world, stop, partial(NPIScorer, config))


class NPIScorer:
    """Non-parametric inference, for every temperature of an NPIConfig."""

    def __init__(self, config: NPIConfig, queries: torch.Tensor, num_classes: int) -> None:
        self.by_temperature = {
            t: ClassSimilarity(queries, num_classes, t) for t in config.temperatures
        }

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        for similarity in self.by_temperature.values():
            similarity.add(bank, labels)

    def scores(self) -> dict[str, torch.Tensor]:
        """{`t0.1`: log probabilities (Q, K)}."""
        return {f"t{t:g}": s.log_probabilities() for t, s in self.by_temperature.items()}


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

    def log_probabilities(self) -> torch.Tensor:
        """log p (Q, K) float64; -inf only for a class that the bank lacks; p itself would
        underflow at low temperatures."""
        return torch.log_softmax(self.largest + self.sums.log(), dim=1)


COMMAND = Command(NPIConfig, run, "SuNCEt's non-parametric inference (NPI)", open_frozen_data)
