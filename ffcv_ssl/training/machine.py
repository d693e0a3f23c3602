"""What the processor can do, and how much of it is free."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

from ffcv_ssl.cores import usable_cores

MOST_THREADS = 8  # more do not make a batch of small images faster


def has_bf16() -> bool:
    """Whether the processor computes in bf16. Elsewhere torch emulates it, slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def is_bf16_fast(timed: bool = True) -> bool:
    """Whether bf16 is the faster precision here. timed: also time a convolution in both (0.1 s),
    because a processor may have the instructions and gain nothing by them."""
    if not has_bf16() or not timed:
        return has_bf16()
    import torch

    conv = torch.nn.Conv2d(64, 64, 3, padding=1)
    images = torch.randn(16, 64, 32, 32)

    def seconds(dtype: torch.dtype) -> float:
        layer, x = conv.to(dtype), images.to(dtype)
        times = []
        with torch.no_grad():
            for _ in range(6):
                began = time.perf_counter()
                layer(x)
                times.append(time.perf_counter() - began)
        return min(times[1:])  # the first one chooses torch's kernels

    return seconds(torch.bfloat16) < seconds(torch.float32)


def idle_cores(seconds: float = 1.0) -> float:
    """How many of this process's cores other programs leave idle, seen over some seconds."""
    cores = usable_cores()
    try:
        before, began = idle_seconds(cores), time.perf_counter()
        time.sleep(seconds)
        idle = (idle_seconds(cores) - before) / (time.perf_counter() - began)
    except (OSError, ValueError):  # no /proc
        idle = max(1.0, len(cores) - os.getloadavg()[0])
    return min(idle, len(cores), cgroup_cores())


def idle_seconds(cores: Collection[int], stat: str = "/proc/stat") -> float:
    """Seconds since the start that these cores had nothing to do."""
    wanted, ticks = {f"cpu{core}" for core in cores}, 0
    for line in Path(stat).read_text(encoding="utf-8").splitlines():
        name, *fields = line.split()
        if name in wanted:
            ticks += int(fields[3]) + int(fields[4])  # idle, and waiting for a disk
    return ticks / os.sysconf("SC_CLK_TCK")


def cgroup_cores(file: str = "/sys/fs/cgroup/cpu.max") -> float:
    """Cores' worth of time that a container may use; infinite where nothing limits it."""
    try:
        quota, period = Path(file).read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")


def thread_counts(idle: float) -> list[int]:
    """Numbers of torch threads to try: half of the free cores, which leaves room for the loader and
    for other programs, then all of them. A thread that has to wait for its core holds up the others
    at every layer: two of them beside another busy program fall to a tenth of the speed of one."""
    free = max(1, min(round(idle), MOST_THREADS))
    return sorted({max(1, free // 2), free})
