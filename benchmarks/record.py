"""Where a benchmark's numbers go, and where they come from."""

from __future__ import annotations

import json
import platform


def write_record(record: dict, path: str | None) -> None:
    """Write a record as indented JSON, whose changes read well as a diff. None writes nothing."""
    if path is not None:
        with open(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


def cpu_name() -> str:
    """The processor's name, if the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
