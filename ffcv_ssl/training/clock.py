"""Moments on a device's time line, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Takes moments: CUDA events on the current stream, and the time of day on a CPU."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def now(self) -> Any:
        """The moment at which the device has done all that it was given so far."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, moment: Any) -> bool:
        """Whether a moment is over, so that `seconds` to it can be asked for."""
        return not self.is_cuda or moment.query()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds from one moment to a later one; both must have passed."""
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
