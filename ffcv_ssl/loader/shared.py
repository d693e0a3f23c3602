"""What threads and iterators see of a loader. It does not keep the loader itself alive."""

import logging
import threading

from ffcv_ssl.errors import BetonError

_log = logging.getLogger(__name__)
_MAX_REPLACED = 0.01  # share of an epoch's samples


class Shared:
    """Settings and counts of one loader; `pool` and `cache` are set once it is complete."""

    def __init__(
        self, reader, order, indices, seed, batch_size, num_workers, batches_ahead, on_error
    ):
        self.reader, self.order, self.indices, self.seed = reader, order, indices, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.batches_ahead, self.on_error = batches_ahead, on_error
        self.pool = self.cache = None
        self.images, self.iterating_s, self.waited_s, self.replaced = 0, 0.0, 0.0, 0
        self._replaced_in_epoch, self._epoch = 0, None
        self._lock = threading.Lock()

    def count_replaced(self, epoch, error):
        """Count a replaced sample, say so once, and refuse to go on when there are too many."""
        with self._lock:
            if epoch != self._epoch:
                self._epoch, self._replaced_in_epoch = epoch, 0
            self.replaced += 1
            self._replaced_in_epoch += 1
            first, count = self.replaced == 1, self._replaced_in_epoch
        if first:
            _log.warning("%s (replaced; further ones are only counted, see loader.stats)", error)
        if count > max(1, _MAX_REPLACED * len(self.indices)):
            raise BetonError(
                f"{self.reader.path}: {count} of {len(self.indices)} samples of epoch {epoch} are "
                f"bad, more than 1 %: re-write the file; the last one: {error}"
            )
