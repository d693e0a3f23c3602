"""`linear`: linear probes on frozen features at any depth, a grid of settings at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.probe_training import GridConfig, run_probes
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class LinearConfig(GridConfig):
    """Settings of a linear probe."""


def run(config: LinearConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Train and measure the probes; returns the record. Raises UserError."""
    return run_probes("linear", config, world, stop)


COMMAND = Command(LinearConfig, run, "linear probes on frozen features", open_frozen_data)
