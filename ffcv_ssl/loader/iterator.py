"""One pass over an epoch: prepares a few batches in advance and hands them out in order.

Several threads may call `next()`: each batch goes to one of them. `close()` may come from any
thread at any time; a thread that waits for a batch then gets StopIteration.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from typing import Any

import torch

from ffcv_ssl.errors import LoaderError, NotCopyable
from ffcv_ssl.loader.device import Delivery
from ffcv_ssl.loader.epoch_program import EpochProgram
from ffcv_ssl.loader.job import BatchJob
from ffcv_ssl.loader.schedule import EpochSchedule
from ffcv_ssl.loader.shared import Shared
from ffcv_ssl.loader.slots import SlotPool

# Samples that a worker takes at once. Its scratch holds all their encoded bytes; each chunk costs
# 0.1 ms of Python's lock, so with chunks of 2, 128 threads were slower than 16.
_MIN_CHUNK, _MAX_CHUNK = 8, 128
_MIN_CHUNKS = 8  # of a batch that is too small for chunks of _MIN_CHUNK


class EpochIterator:
    """Yields the batches of a schedule. It ends after the last batch, by an error, by `close()`, or
    by the loader's next `iter()`."""

    def __init__(
        self,
        loader: Any,
        shared: Shared,
        program: EpochProgram,
        schedule: EpochSchedule,
        epoch: int,
        slots: SlotPool,
        batch_type: Any,
    ) -> None:
        self._loader, self._shared = loader, shared
        self._program, self._schedule, self._epoch = program, schedule, epoch
        self._slots, self._batch_type = slots, batch_type
        self._delivery = Delivery(program, shared)
        self._jobs: collections.deque[BatchJob] = collections.deque()
        self._next_to_submit = self._handed = 0
        self._process = os.getpid()
        # `_turn`: of the thread that takes a batch, while it waits and runs users' code.
        # `_lock`: for a moment, when jobs are started and ended; no user's code runs under it, so
        # that `close()` never waits for any. A thread takes them in this order.
        self._turn, self._lock = threading.RLock(), threading.RLock()
        self._closed = False
        self._clock = time.perf_counter()
        self._chunk_size = chunk_size(shared.batch_size, shared.num_workers)

    def start(self) -> None:
        """Start the first batches; called once."""
        with self._turn:
            try:
                self._fill()
            except BaseException:
                self.close()
                raise

    def __iter__(self) -> EpochIterator:
        return self

    def __len__(self) -> int:
        return self._schedule.num_batches

    def _fill(self) -> None:
        """Start batches until `batches_ahead` are in preparation."""
        total, ahead = self._schedule.num_batches, self._shared.batches_ahead
        while not self._closed and self._next_to_submit < total and len(self._jobs) < ahead:
            job = self._make_job(self._next_to_submit)
            with self._lock:
                if self._closed:  # the file may be closed, and its descriptor another file's
                    return
                self._shared.cache.prefetch(job.indices)
                job.start(self._chunk_size)
                self._jobs.append(job)
                self._next_to_submit += 1

    def _make_job(self, number: int) -> BatchJob:
        indices, occurrences, valid = self._schedule.batch(number)
        memory = self._slots.lend(len(indices))
        return BatchJob(
            self._program, self._shared, self._epoch, indices, occurrences, valid, memory
        )

    def __next__(self) -> Any:
        if os.getpid() != self._process:
            raise forked(self._program.reader.path)
        with self._turn:
            try:
                return self._take()
            finally:
                if self._closed:  # perhaps by another thread, which left this to the last one
                    self._delivery.close()

    def _take(self) -> Any:
        job = self._await_batch()
        try:
            with self._lock:
                if self._closed:
                    raise StopIteration
                self._jobs.popleft()
            self._delivery.start(job)
            self._fill()
            self._deliver_ahead()
            batch = self._make_batch(job)
            self._account(job)
        except BaseException:  # the batch is lost, so those behind it must not be handed out
            self.close()
            raise
        return batch

    def _await_batch(self) -> BatchJob:
        """The next batch, once it is finished; it stays in the queue. Raises its error."""
        with self._lock:
            if self._closed or not self._jobs:
                self._finish()
                raise StopIteration
            job = self._jobs[0]
        started = time.perf_counter()
        job.done.wait()
        self._shared.waited_s += time.perf_counter() - started
        if job.error is not None and not self._closed:
            self.close()
            raise job.error
        return job

    def _deliver_ahead(self) -> None:
        """Start the copies of the batches that are ready; they run while this batch is used."""
        with self._lock:
            jobs = tuple(self._jobs)
        for job in jobs:
            if self._closed or not job.done.is_set():
                return
            try:
                self._delivery.start(job)
            except Exception as error:  # of that batch: raised in its turn
                job.error = error

    def _account(self, job: BatchJob) -> None:
        with self._lock:
            if not self._closed:  # or the file may be closed, and its descriptor another file's
                self._shared.cache.drop(job.indices)
        self._handed += 1
        self._count(len(job.indices))
        self._loader._note_progress(self, self._epoch, self._handed, self._schedule)

    def _count(self, num_images: int) -> None:
        """Wall-clock statistics: from `iter()` to the first batch, then from batch to batch."""
        now = time.perf_counter()
        self._shared.images += num_images
        self._shared.iterating_s += now - self._clock
        self._clock = now

    def _make_batch(self, job: BatchJob) -> Any:
        values = self._delivery.finish(job)
        batch = self._batch_type(*(values[name] for name in self._program.names))
        batch.indices = torch.from_numpy(job.indices)
        batch.valid = torch.from_numpy(job.valid)
        batch.replaced = torch.from_numpy(job.replaced)
        batch.params = job.params
        return batch

    def _finish(self) -> None:
        if not self._closed:
            self._loader._note_progress(self, self._epoch, self._handed, self._schedule)
            self.close()

    def close(self) -> None:
        """Cancel the batches in preparation; `next()` then stops. Safe to call twice, and from any
        thread."""
        if os.getpid() != self._process:
            self._closed = True  # a fork may have inherited locks that nobody will ever release
            self._jobs.clear()
            return
        with self._lock:
            self._closed = True
            for job in self._jobs:
                job.cancel()
            self._jobs.clear()
        if self._turn.acquire(blocking=False):
            self._delivery.close()
            self._turn.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotCopyable(
            f"{self._program.reader.path}: an epoch's iterator cannot be copied or pickled, as "
            "batches are in preparation for it; copy the loader's state_dict instead"
        )

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


def chunk_size(batch_size: int, num_workers: int) -> int:
    """Samples of a batch that a worker takes at once.

    Two chunks per worker: with four, 32 px images take 3 to 9 % more Python time; with one, a
    worker is idle whenever another is late. But not so many that their Python time counts.
    """
    least = min(_MIN_CHUNK, -(-batch_size // _MIN_CHUNKS))
    return min(max(-(-batch_size // (2 * num_workers)), least), _MAX_CHUNK)


def forked(path: str) -> LoaderError:
    """The error of a loader that a forked process has inherited."""
    return LoaderError(
        f"{path}: this loader was made in another process, and a fork has no threads of its "
        "parent; make a Loader in this process"
    )
