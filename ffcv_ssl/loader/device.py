"""From finished arrays to the consumer: tensors, copies to a CUDA device on a separate stream,
whole-batch ops.

Hand-over: the copy stream records an event after the copies of a batch. The consumer's current
stream waits for this event before it uses the copies. The slot is kept until the event has passed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ffcv_ssl.loader.epoch_program import EpochProgram
from ffcv_ssl.loader.job import BatchJob, run_tail
from ffcv_ssl.loader.shared import Shared
from ffcv_ssl.transforms import ToDevice


class BatchContext(NamedTuple):
    """Passed to whole-batch code: a callable with a parameter `context` gets this. indices: int64
    (B,)."""

    seed: int
    epoch: int
    indices: np.ndarray


def _is_cuda(op: Any) -> bool:
    return isinstance(op, ToDevice) and op.device.type == "cuda"


def needs_cuda(tails: dict[str, list]) -> bool:
    """True if any pipeline copies to a CUDA device; slots are then page-locked. ValueError where
    that device is missing, and for several devices: a batch is copied on one stream."""
    devices = {op.device for ops in tails.values() for op in ops if _is_cuda(op)}
    if devices and not torch.cuda.is_available():
        raise ValueError("Loader: got ToDevice('cuda'), but torch finds no CUDA device; use 'cpu'")
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"Loader: got ToDevice for {names}, expected one device; make a loader for each"
        )
    return bool(devices)


class Delivery:
    """Brings the finished jobs of one epoch to the consumer. `start(job)` may be called early;
    `finish(job)` returns the values."""

    def __init__(self, program: EpochProgram, shared: Shared) -> None:
        self.program, self.shared, self.seed = program, shared, shared.seed
        self.cuda = needs_cuda(program.tails)
        # (event, host tensors that copies may read until the event)
        self._in_flight: list[tuple] = []
        self._started: dict[int, tuple] = {}  # id of job -> (values, event, remaining ops)

    def start(self, job: BatchJob) -> None:
        """Start the copies of a finished batch, if it has any; does not wait for them."""
        if not self.cuda or id(job) in self._started or job.error:
            return
        values: dict[str, Any] = {}
        rest: dict[str, list] = {}
        sources: list[torch.Tensor] = []
        device: Any = None
        for name, value in job.outputs().items():
            ops = self.program.tails[name]
            place = next((i for i, op in enumerate(ops) if _is_cuda(op)), None)
            if place is None:
                values[name], rest[name] = value, ops
                continue
            host = torch.as_tensor(self._run(job, name, ops[:place], value))
            host = host if host.is_pinned() else host.pin_memory()
            device = ops[place].device
            with torch.cuda.stream(self._stream_on(device)):
                values[name] = host.to(device, non_blocking=ops[place].non_blocking)
            rest[name] = ops[place + 1 :]
            sources.append(host)
        event = torch.cuda.Event()
        event.record(self._stream_on(device))
        self._in_flight.append((event, sources))
        self._started[id(job)] = values, event, rest

    def finish(self, job: BatchJob) -> dict[str, Any]:
        """name -> value for the consumer, safe to use on the consumer's current stream."""
        if not self.cuda:
            tails = self.program.tails
            return {n: self._run(job, n, tails[n], v) for n, v in job.outputs().items()}
        self.start(job)
        values, event, rest = self._started.pop(id(job))
        current = torch.cuda.current_stream(self.shared.copy_stream.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(current)
        current.wait_event(event)
        after.record(current)
        self.shared.copy_waits.append((before, after))
        self.shared.copy_wait_s()  # forgets the events of copies that are over
        self._in_flight = [pair for pair in self._in_flight if not pair[0].query()]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)  # its memory belongs to the copy stream's pool
            values[name] = self._run(job, name, rest[name], value)
        return values

    def close(self) -> None:
        """Wait for running copies, so that their host memory may be reused."""
        for event, _ in self._in_flight:
            event.synchronize()
        self._in_flight, self._started = [], {}

    def _stream_on(self, device: torch.device) -> torch.cuda.Stream:
        # one for all epochs: torch caches freed memory by stream, so the copies' memory of each
        # new stream would be allocated anew and stay
        if self.shared.copy_stream is None:
            self.shared.copy_stream = torch.cuda.Stream(device)
        return self.shared.copy_stream

    def _run(self, job: BatchJob, name: str, ops: list, value: Any) -> Any:
        context = BatchContext(self.seed, job.epoch, job.indices)
        return run_tail(self.program.reader, name, ops, value, context)
