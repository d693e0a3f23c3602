"""A batch in preparation: tasks for the workers, replacement of bad samples, and the finished
arrays or the error.

Stages: all rows are read, decoded and rendered in chunks. Where a view has whole-batch code, the
thread that finishes the last chunk runs it and starts the next stage. B samples per batch.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ffcv_ssl.errors import BetonError
from ffcv_ssl.kernels.random import random_word
from ffcv_ssl.loader.epoch_program import EpochProgram
from ffcv_ssl.loader.shared import Shared
from ffcv_ssl.loader.workers import Scratch
from ffcv_ssl.pipeline.plan import ViewPlan
from ffcv_ssl.reader import Reader
from ffcv_ssl.seeding import derive_key

_REPLACEMENT_TRIES = 32
# Occurrence numbers of replacements begin here; a sample's regular turns in an epoch are below.
_REPLACED_TURN = 0x8000


class BatchJob:
    """A batch of samples `indices` (B,), at their `occurrences`, on the arrays `memory` of a slot.

    shared: the `Shared` of the loader. Once `done` is set, there is an `error`, or the outputs are
    in `values` and `output()`.
    """

    def __init__(
        self,
        program: EpochProgram,
        shared: Shared,
        epoch: int,
        indices: np.ndarray,
        occurrences: np.ndarray,
        valid: np.ndarray,
        memory: dict[Any, np.ndarray],
    ) -> None:
        self.program, self.shared, self.epoch = program, shared, epoch
        self.indices, self.occurrences, self.valid = indices, occurrences, valid
        self.replaced = np.zeros(len(indices), bool)
        self.error: BaseException | None = None
        self.cancelled = False
        self._error_row = len(indices)
        self.done = threading.Event()
        # view -> the batch between two segments, or after the last one
        self.between: dict[str, np.ndarray] = {}
        self.params: dict[str, np.ndarray] = {}
        self._memory, self._lock = memory, threading.Lock()
        self.raws = {n: np.zeros((len(indices), p.num_columns)) for n, p in program.plans.items()}
        self.values = {v.name: v.allocate(len(indices)) for v in program.values}

    def output(self, plan: ViewPlan, number: int) -> np.ndarray:
        """The slot's array (B, H, W, 3) for segment `number` of a view."""
        return self._memory[plan.name, number]

    def start(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self._start_stage(0)

    def cancel(self) -> None:
        """Wake the thread that waits for this batch; nothing more is done for it."""
        self.cancelled = True
        self.done.set()

    def _start_stage(self, stage: int) -> None:
        count = len(self.indices)
        begins = range(0, count, self._chunk_size)
        self._left = len(begins)
        for begin in begins:
            stop = min(begin + self._chunk_size, count)
            self.shared.pool.submit(_Chunk(self, stage, begin, stop))

    def run_chunk(self, stage: int, begin: int, stop: int, scratch: Scratch) -> None:
        """A worker's entry: never raises, always counts the chunk as finished."""
        try:
            if not self.cancelled and begin < self._error_row:
                if stage == 0:
                    self._process_rows(begin, stop, scratch)
                else:
                    for source in self.program.images:
                        source.process_later(self, stage, begin, stop, scratch)
        except BaseException as error:
            self._fail(error, begin)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._end_stage(stage, scratch)

    def _process_rows(self, begin: int, stop: int, scratch: Scratch) -> None:
        bad: dict[int, BetonError] = {}
        for source in self.program.checked_sources:
            bad.update(source.process(self, begin, stop, scratch))
        for row in sorted(bad):
            if self.shared.on_error == "raise":
                self._fail(bad[row], row)
                return
            self._replace(row, bad[row], scratch)

    def _replace(self, row: int, error: BetonError, scratch: Scratch) -> None:
        """Another sample fills the row, in all fields. The choice depends only on (seed, epoch,
        id)."""
        shared, original = self.shared, int(self.indices[row])
        candidates = shared.order.replacements(original)
        candidates = shared.indices if candidates is None else candidates
        key = derive_key(shared.seed, "replacement")
        for attempt in range(_REPLACEMENT_TRIES):
            word = int(random_word(key, self.epoch, original, attempt))
            chosen = int(candidates[word % len(candidates)])
            if chosen == original:
                continue
            self.indices[row] = chosen
            self.occurrences[row] = _REPLACED_TURN | (original & 0x7FFF)
            sources = self.program.checked_sources
            if not any(s.process(self, row, row + 1, scratch) for s in sources):
                self.replaced[row] = True
                shared.count_replaced(self.epoch, error)
                return
        raise BetonError(
            f"{error} (no valid sample to replace it was found in {_REPLACEMENT_TRIES} tries)"
        )

    def _end_stage(self, stage: int, scratch: Scratch) -> None:
        try:
            if not (self.cancelled or self.error):
                for plan in self.program.plans.values():
                    if stage < len(plan.segments):
                        self.between[plan.name] = self._run_between(plan, stage)
                if stage + 1 < self.program.num_stages:
                    self._start_stage(stage + 1)
                    return
                self._finish(scratch)
        except BaseException as error:
            self._fail(error, 0)
        self.done.set()

    def _run_between(self, plan: ViewPlan, stage: int) -> np.ndarray:
        """Run the whole-batch code after a segment; returns the resulting batch."""
        batch = self.output(plan, stage)
        for call in plan.between[stage]:
            try:
                batch = call.run(batch, self.indices)
            except Exception as error:
                what = getattr(call, "operation", None) or getattr(call, "call", call)
                raise _at_op(self.program.reader, plan.name, what, error) from error
        if stage + 1 < len(plan.segments):
            height, width = plan.segments[stage + 1].input_shape or (0, 0)
            expected = (len(self.indices), height, width, 3)
            if batch.shape != expected or batch.dtype != np.uint8:
                raise ValueError(
                    f"view '{plan.name}': {plan.between[stage]} returned {batch.dtype} "
                    f"{batch.shape}, expected uint8 {expected} for the image ops after it"
                )
            batch = np.ascontiguousarray(batch)
        return batch

    def _finish(self, scratch: Scratch) -> None:
        for source in self.program.plain_sources:
            source.process(self, 0, len(self.indices), scratch)
        for name, plan in self.program.plans.items():
            self.params[name] = plan.params_of(self.raws[name])

    def _fail(self, error: BaseException, row: int) -> None:
        """Keep the error of the first bad row. Chunks before it still run, so that the error that
        the user sees does not depend on the threads."""
        with self._lock:
            if row < self._error_row:
                self.error, self._error_row = error, row

    def outputs(self) -> dict[str, Any]:
        """Arrays by name: views (B, H, W, 3) uint8, values as their decoders declare."""
        return {name: self.between.get(name, self.values.get(name)) for name in self.program.names}


def _at_op(reader: Reader, name: str, op: Any, error: Exception) -> RuntimeError:
    """An error in the user's code; the message names the file, the pipeline and the op."""
    what = f"{type(error).__name__}: {error}".replace("\n", " ")
    return RuntimeError(f"{reader.path}: pipeline '{name}', op {op!r}: {what}")


def run_tail(reader: Reader, name: str, ops: list, value: Any, context: Any) -> Any:
    """Run whole-batch ops in the consumer's thread. A callable with a parameter `context` gets
    (seed, epoch, indices)."""
    for op in ops:
        try:
            if hasattr(op, "run") and hasattr(op, "operation"):
                value = op.run(value, context.indices)
            elif _wants_context(op):
                value = op(value, context=context)
            else:
                value = op(value)
        except Exception as error:
            raise _at_op(reader, name, getattr(op, "operation", op), error) from error
    return value


def _wants_context(op: Any) -> bool:
    code = getattr(op, "forward", op)
    code = getattr(code, "__code__", None) or getattr(type(op).__call__, "__code__", None)
    return (
        code is not None
        and "context" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    )


class _Chunk:
    """Rows of a batch as a task for a worker."""

    def __init__(self, job: BatchJob, stage: int, begin: int, stop: int) -> None:
        self.job, self.stage, self.begin, self.stop = job, stage, begin, stop

    def __call__(self, scratch: Scratch) -> None:
        self.job.run_chunk(self.stage, self.begin, self.stop, scratch)
