"""The tasks of a Slurm job as the ranks of a run: who they are, and where they meet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.training.world import World


def join(system: SystemConfig) -> World:
    """Connect to the other ranks of the job or of torchrun, if there are any: `World.join`."""
    options = (system.device, system.torch_threads, task_environment(), system.tf32)
    return World.join(*options, system.share_device, system.patience_minutes)


def task_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """torchrun's variables for this task of a Slurm job step, or None outside one.

    Returns {RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT}, all str. A batch script that
    calls python without srun is no step, and under torchrun its own variables hold.
    """
    if "SLURM_STEP_ID" not in environment or "RANK" in environment:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]  # node[003-005,7],other: rank 0 is on the first
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": "127.0.0.1" if environment["SLURM_STEP_NUM_NODES"] == "1" else first,
        "MASTER_PORT": str(_port(environment)),
    }


def _port(environment: Mapping[str, str]) -> int:
    """A port of this start of this step alone, below the ports that Linux gives out by itself."""
    keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, start = (int(environment.get(key, 0)) for key in keys)
    return 20000 + (job + 997 * step + 4999 * start) % 12000
