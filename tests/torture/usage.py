"""What this process takes: memory, threads, descriptors, seconds."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MB = 1e6


def memory_bytes() -> int:
    """Resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def peak_bytes() -> int:
    """The most resident memory since `reset_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def reset_peak() -> int:
    """Begin to measure anew; returns the memory of now."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_bytes()


def census() -> tuple[int, int]:
    """(threads, open descriptors)."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@contextmanager
def timed(figures: dict[str, float], what: str) -> Iterator[None]:
    """Keep the seconds that `with` takes, of the CPU and of the clock. Limits are for those of the
    CPU: other processes may be at work."""
    began, cpu = time.perf_counter(), time.process_time()
    yield
    figures[f"CPU seconds {what}"] = round(time.process_time() - cpu, 2)
    figures[f"seconds {what}"] = round(time.perf_counter() - began, 2)
