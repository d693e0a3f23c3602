"""The part of a loader that threads and iterators use. It does not keep the loader itself alive."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import numpy as np

from ffcv_ssl.errors import BetonError
from ffcv_ssl.loader.cache import SystemCache
from ffcv_ssl.loader.workers import WorkerPool
from ffcv_ssl.reader import Reader
from ffcv_ssl.traversal_order import TraversalOrder

_log = logging.getLogger(__name__)
_MAX_REPLACED = 0.01  # fraction of an epoch's samples


class Shared:
    """Settings and counts of one loader; `pool` and `cache` are set once it is complete."""

    def __init__(
        self,
        reader: Reader,
        order: TraversalOrder,
        indices: np.ndarray,
        seed: int,
        batch_size: int,
        num_workers: int,
        batches_ahead: int,
        on_error: str,
    ) -> None:
        self.reader, self.order, self.indices, self.seed = reader, order, indices, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.batches_ahead, self.on_error = batches_ahead, on_error
        self.pool: WorkerPool
        self.cache: SystemCache
        self.copy_stream: Any = None  # torch.cuda.Stream, from the first copy to a device on
        self.copy_waits: deque = deque()  # (torch.cuda.Event, its end), not counted yet
        self._copy_wait_s = 0.0
        self.images, self.iterating_s, self.waited_s, self.replaced = 0, 0.0, 0.0, 0
        self._replaced_in_epoch = 0
        self._epoch: int | None = None
        self._lock = threading.Lock()

    def copy_wait_s(self) -> float:
        """Seconds that the consumer's stream has waited for copies, of those that are over."""
        with self._lock:
            while self.copy_waits and self.copy_waits[0][1].query():
                before, after = self.copy_waits.popleft()
                self._copy_wait_s += before.elapsed_time(after) / 1e3
            return self._copy_wait_s

    def count_replaced(self, epoch: int, error: BetonError) -> None:
        """Count a replaced sample, print a note once, and raise when there are too many."""
        with self._lock:
            if epoch != self._epoch:
                self._epoch, self._replaced_in_epoch = epoch, 0
            self.replaced += 1
            self._replaced_in_epoch += 1
            first, count = self.replaced == 1, self._replaced_in_epoch
        if first:
            _log.warning(
                "%s (replaced by another sample; later ones are only counted, in loader.stats)",
                error,
            )
        if count > max(1, _MAX_REPLACED * len(self.indices)):
            raise BetonError(
                f"{self.reader.path}: {count} of {len(self.indices)} samples of epoch {epoch} are "
                f"bad, more than 1 %; re-write the file; the last bad sample: {error}"
            )
