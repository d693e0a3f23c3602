"""`mlp`: probes with hidden layers on frozen features, a grid of settings at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.probe_training import GridConfig, run_probes
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class MLPConfig(GridConfig):
    """Settings of the MLP probe (Bordes et al. 2023: 2048-2048-classes)."""

    hidden: list[PositiveInt] = field(default_factory=lambda: [2048, 2048])
    """Widths of the probe's hidden layers, each with batch-norm and ReLU."""
    epochs: PositiveInt = 30
    """Passes over the training samples."""
    lrs: list[PositiveFloat] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    """Learning rates to try, for features of variance 1; a cosine takes each to 0."""


def run(config: MLPConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Train and measure the probes; returns the record. Raises UserError."""
    return run_probes("mlp", config, world, stop)


COMMAND = Command(MLPConfig, run, "probes with hidden layers: 2048-2048-classes", open_frozen_data)
