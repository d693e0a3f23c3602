"""The cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> frozenset[int]:
    """Their numbers; where the system does not tell (macOS), those of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
