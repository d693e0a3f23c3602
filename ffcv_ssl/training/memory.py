"""Memory of the device: how much is used, whether the largest step fits, and one line where it does
not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.gradient_cache import frozen_statistics


def what_ran_out(error: BaseException) -> tuple[str, str] | None:
    """(device, what was asked for in words, perhaps "") of an error that says that memory ran out;
    None of any other error."""
    text = str(error)
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    amount = f" (asked for {tried[1]})" if tried else ""
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:  # torch's words
        return "cpu", amount
    if isinstance(error, torch.cuda.OutOfMemoryError):
        number = re.search(r"GPU (\d+)", text)
        return f"cuda:{number[1]}" if number else "cuda", amount
    return None


def names_out_of_memory(settings: str) -> Callable[[Callable], Callable]:
    """Decorator of a method that trains: running out of the device's memory is a UserError, with
    the device, the position of `self.saver` and the `settings` to lower."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any) -> Any:
            try:
                return method(self, *args)
            except RuntimeError as error:
                found = what_ran_out(error)
                if found is None:
                    raise
                device, amount = found
                raise UserError(
                    f"{device}: out of memory after {self.saver.position()}{amount}; "
                    f"lower {settings}"
                ) from None

        return wrapper

    return decorate


def try_step(
    backward: Callable[[], Any], learner: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Call backward(), a forward and backward pass of `learner`, and throw its results away.

    Nothing changes: gradients are dropped, running statistics and the state of random generators
    are restored. Memory that the optimizer's state will take is taken meanwhile.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # numbers for each weight
    new = [p for p in parameters if p not in optimizer.state]
    kept = [torch.empty_like(p) for p in new for _ in range(states)]
    devices = {p.device for p in parameters if p.is_cuda}
    with torch.random.fork_rng(devices), frozen_statistics(learner):
        backward()
    del kept
    optimizer.zero_grad(set_to_none=True)


def peak_memory_mib(device: torch.device) -> int | None:
    """Largest memory in use, in MiB: torch's on a CUDA device since `forget_peak`, or that of this
    process since its start. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) >> 10
    except (OSError, IndexError, ValueError):
        return None


def forget_peak(device: torch.device) -> None:
    """Begin to measure a CUDA device's peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def spare_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that may be filled with data: half of those that are free. 0 for a
    CPU, whose memory holds the data already."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
