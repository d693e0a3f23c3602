"""The checks of the GPU proof: how one is run, told and kept."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_files import Files
from ffcv_ssl.config.messages import one_line


class LeftOut(Exception):
    """A check was not made, for the reason in its text."""


@dataclass
class Proof:
    """What the checks of a part share, and their results."""

    device: torch.device
    files: Files
    folder: Path
    """For runs and other files; removed at the end."""
    out: Path
    """Of the results."""
    log: Any
    """File for what programs print."""
    limit_s: float
    """What the part may take on a GPU."""
    began: float
    """When the part began, of time.perf_counter."""
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: {"right" (None: left out), "found" (in words), "seconds"}}."""
    found: dict[str, Any] = field(default_factory=dict)
    """What a part measures, for the record."""
    save: Callable[[], None] = lambda: None
    """Writes the record as it is so far."""

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU: only there do targets of speed count."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """Since the part began."""
        return time.perf_counter() - self.began

    def check(self, name: str, function: Callable[[], str | None]) -> None:
        """Run a check, print its line and keep it. function returns what it found, in words, and
        raises where that is wrong."""
        is_right: bool | None
        began = time.perf_counter()
        try:
            with contextlib.redirect_stdout(self.log), contextlib.redirect_stderr(self.log):
                said, is_right = function() or "", True
        except LeftOut as reason:
            said, is_right = str(reason), None
        except Exception as error:  # whatever it is, the other checks go on
            print(f"\n-- {name}\n{traceback.format_exc()}", file=self.log, flush=True)
            said, is_right = f"{type(error).__name__}: {one_line(error)[:200]}", False
        seconds = time.perf_counter() - began
        self.checks[name] = {"right": is_right, "found": said, "seconds": round(seconds, 1)}
        mark = {True: "ok  ", False: "FAIL", None: "left"}[is_right]
        print(f"{mark}  {name}: {said}  ({seconds:.1f} s)", flush=True)
        self.save()

    def expect(self, condition: bool, text: str) -> None:
        """Raise an AssertionError with the text unless the condition holds."""
        if not condition:
            raise AssertionError(text)

    def leave_out_if_late(self, seconds: float) -> None:
        """Raise LeftOut where a check of so many seconds would end after the part's limit."""
        if self.is_cuda and self.seconds + seconds > self.limit_s:
            raise LeftOut(f"{self.seconds:.0f} of {self.limit_s:.0f} s are over")

    def time_taken(self) -> str:
        """What the part took, a check of its limit."""
        self.expect(self.seconds <= self.limit_s, f"{self.seconds:.0f} s")
        return f"{self.seconds:.0f} s"
