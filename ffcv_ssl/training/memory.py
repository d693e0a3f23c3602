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

# What torch, cuBLAS, cuDNN and NCCL say besides raising torch.cuda.OutOfMemoryError.
_OF_CUDA = re.compile(r"CUDA error: out of memory|_STATUS_ALLOC_FAILED|Cuda failure.*out of memory")
_OF_CPU = "can't allocate memory"


def what_ran_out(error: BaseException) -> tuple[str, str] | None:
    """(device, what was asked for in words, perhaps "") of an error that says that memory ran out;
    None of any other error."""
    text = str(error)
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    amount = f" (asked for {tried[1]})" if tried else ""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OF_CPU in text):
        return "cpu", amount
    is_cuda = isinstance(error, torch.cuda.OutOfMemoryError)
    if is_cuda or (isinstance(error, RuntimeError) and _OF_CUDA.search(text)):
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
            except (RuntimeError, MemoryError) as error:
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
) -> int | None:
    """Call backward(), a forward and backward pass of `learner`, twice, and throw its results away;
    returns the peak memory of the second pass in MiB, None where it is not known.

    In the first pass cuDNN tries algorithms, some of which take much more memory. Nothing changes:
    gradients are dropped; buffers and the state of random generators are restored. Memory that the
    optimizer's state will take is taken meanwhile.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # numbers for each weight
    new = [p for p in parameters if p not in optimizer.state]
    held = [torch.empty_like(p) for p in new for _ in range(states)]
    device, peak = parameters[0].device, None
    buffers = [(buffer, buffer.clone()) for buffer in learner.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            forget_peak(device)
            backward()
            peak = peak_memory_mib(device)
            optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    del held
    forget_peak(device)
    return peak


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
