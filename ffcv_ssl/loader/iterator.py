"""One pass over an epoch: prepares a few batches in advance and hands them out in order."""

from __future__ import annotations

import collections
import os
import time
from typing import Any

import numpy as np
import torch

from ffcv_ssl.loader.device import Delivery
from ffcv_ssl.loader.epoch_program import EpochProgram
from ffcv_ssl.loader.job import BatchJob
from ffcv_ssl.loader.schedule import EpochSchedule
from ffcv_ssl.loader.shared import Shared
from ffcv_ssl.loader.slots import SlotPool

_MAX_CHUNK = 128  # samples that a worker takes at once; its scratch holds all their encoded bytes


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
        self._closed = False
        self._clock = time.perf_counter()
        # Two chunks per worker and batch. With four, 32 px images take 3 to 9 % more Python time;
        # with one, a worker is idle whenever another is late.
        workers = shared.num_workers
        self._chunk_size = int(np.clip(-(-shared.batch_size // (2 * workers)), 1, _MAX_CHUNK))
        self._fill()

    def __iter__(self) -> EpochIterator:
        return self

    def __len__(self) -> int:
        return self._schedule.num_batches

    def _fill(self) -> None:
        """Start batches until `batches_ahead` are in preparation."""
        total, ahead = self._schedule.num_batches, self._shared.batches_ahead
        while self._next_to_submit < total and len(self._jobs) < ahead:
            self._jobs.append(self._start_job(self._next_to_submit))
            self._next_to_submit += 1

    def _start_job(self, number: int) -> BatchJob:
        indices, occurrences, valid = self._schedule.batch(number)
        memory = self._slots.lend(len(indices))
        job = BatchJob(
            self._program, self._shared, self._epoch, indices, occurrences, valid, memory
        )
        self._shared.cache.prefetch(indices)
        job.start(self._chunk_size)
        return job

    def __next__(self) -> Any:
        if self._closed or not self._jobs:
            self._finish()
            raise StopIteration
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self._program.reader.path}: this loader was made in another process, and a fork "
                "has no threads of its parent; make a Loader in this process"
            )
        started = time.perf_counter()
        job = self._jobs[0]
        job.done.wait()
        self._shared.waited_s += time.perf_counter() - started
        if job.error is not None:
            self.close()
            raise job.error
        self._jobs.popleft()
        self._delivery.start(job)
        self._fill()
        for ahead in self._jobs:  # the copies of ready batches run while this batch is used
            if not ahead.done.is_set():
                break
            self._delivery.start(ahead)
        batch = self._make_batch(job)
        self._shared.cache.drop(job.indices)
        self._handed += 1
        self._count(len(job.indices))
        self._loader._note_progress(self, self._epoch, self._handed, self._schedule)
        return batch

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
        """Cancel the batches in preparation; `next()` then stops. Safe to call twice."""
        self._closed = True
        for job in self._jobs:
            job.cancelled = True
        self._jobs.clear()
        if os.getpid() == self._process:
            self._delivery.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
