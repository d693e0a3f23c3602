"""`Loader`: one `.beton` file as an endless supply of epochs of augmented batches.

Guarantees: for given (file, seed, epoch, pipelines), every view of every sample is byte-identical
for any num_workers, batches_ahead, batch_size, world size and resume point. Errors reach the
consumer; nothing hangs.

    loader = Loader("train.beton", 256, order=OrderOption.RANDOM, seed=0, pipelines={
        "view_0": ("image", [RandomResizedCrop(224), ToTensor(), ToTorchImage()]),
        "view_1": ("image", [RandomResizedCrop(224), GaussianBlur(), ToTensor(), ToTorchImage()]),
        "label": [IntDecoder(), ToTensor(), Squeeze()]})
    for batch in loader:
        batch.view_0, batch.label, batch.indices, batch.params["view_0"]["crop"]
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from ffcv_ssl.errors import BetonError, NotCopyable
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.loader.arguments import (
    OrderOption,
    check_indices,
    check_positive,
    count_workers,
    find_rank,
    make_order,
)
from ffcv_ssl.loader.batch import make_batch_type
from ffcv_ssl.loader.cache import SystemCache
from ffcv_ssl.loader.device import needs_cuda
from ffcv_ssl.loader.epoch_program import EpochProgram
from ffcv_ssl.loader.iterator import EpochIterator, forked
from ffcv_ssl.loader.schedule import EpochSchedule, checked_sequence
from ffcv_ssl.loader.shared import Shared
from ffcv_ssl.loader.slots import SlotPool
from ffcv_ssl.loader.view_specs import default_pipeline, resolve_pipelines
from ffcv_ssl.loader.workers import WorkerPool
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import RandomResizedCrop

_log = logging.getLogger(__name__)
STATE_VERSION = 1


class Loader:
    """An iterable of batches; the arguments up to custom_field_mapper are FFCV's.

    path: the file. batch_size: per rank. num_workers: threads; -1: one per core.
    os_cache: False for files larger than memory.
    order: an OrderOption or a TraversalOrder. seed: of all random draws; None: a random seed.
    distributed: take rank and world size from torch.distributed; or give rank, world_size.
    indices: the samples to load: ids, or a mask (default: all). pipelines: see `resolve_pipelines`.
    custom_fields: name -> Field class. custom_field_mapper: {output: field}.
    drop_last: leave out the last, smaller global batch. batches_ahead: batches in preparation.
    recompile: accepted for FFCV's sake, without effect: nothing is compiled per pipeline.
    on_error: "raise", or "replace" a bad sample by another sample.
    scaled_decode: decode JPEGs at 1/2, 1/4 or 1/8 of their size where all views are smaller still.
    Faster, but the pixels differ (photographs to 64 px: mean 1.3 levels, at most 54).
    decoder: of JPEGs: "auto", ours for plain baseline ones and simplejpeg for others; "simplejpeg".
    The pixels are the same.
    Raises ValueError for arguments out of range, BetonError for a bad file. A forked process
    cannot use its parent's loader: LoaderError.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        num_workers: int = -1,
        os_cache: bool = True,
        order: Any = OrderOption.SEQUENTIAL,
        distributed: bool = False,
        seed: int | None = None,
        indices: Any = None,
        pipelines: dict[str, Any] = {},
        custom_fields: dict[str, Any] = {},
        drop_last: bool = True,
        batches_ahead: int = 3,
        recompile: bool = False,
        custom_field_mapper: dict[str, str] | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        on_error: str = "raise",
        scaled_decode: bool = False,
        decoder: str = "auto",
    ) -> None:
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_positive("batch_size", batch_size)
        check_positive("batches_ahead", batches_ahead)
        if on_error not in ("raise", "replace"):
            raise ValueError(f"Loader: on_error is {on_error!r}, must be 'raise' or 'replace'")
        if decoder not in ("auto", "simplejpeg"):
            raise ValueError(f"Loader: decoder is {decoder!r}, must be 'auto' or 'simplejpeg'")
        self.rank, self.world_size = find_rank(distributed, rank, world_size)
        num_workers = count_workers(num_workers)
        self.batch_size, self.drop_last = int(batch_size), bool(drop_last)
        self._decoding = bool(scaled_decode), decoder
        self._slots: SlotPool | None = None
        self._next, self._position = (0, 0), (0, 0)  # (epoch, global samples handed out)
        self._iterator: Callable[[], EpochIterator | None] = lambda: None
        self._length_cache: dict[int, int] = {}
        self._sequence: tuple[int, np.ndarray] | None = None  # (epoch, its samples) ahead of `iter`
        # `_turn`: of the thread in `iter`, while it runs users' code (orders). `_lock`: of `iter`
        # and `close`, for a moment. A thread takes them in this order.
        self._turn, self._lock = threading.RLock(), threading.RLock()
        self.reader = Reader(path, custom_fields=custom_fields)
        try:
            self.indices = check_indices(self.reader, indices)
            self._shared = Shared(
                self.reader,
                make_order(order),
                self.indices,
                self._choose_seed(seed),
                self.batch_size,
                num_workers,
                batches_ahead,
                on_error,
            )
            self._resolved = resolve_pipelines(self.reader, pipelines, custom_field_mapper)
            self._start(num_workers, os_cache)
        except BaseException:
            self.reader.close()
            raise

    def _start(self, num_workers: int, os_cache: bool) -> None:
        """Check the pipelines and start the threads, last of all: what fails here has none."""
        self._batch_type = make_batch_type([name for name, _, _ in self._resolved])
        fields = {field_name for _, field_name, _ in self._resolved}
        self._shared.cache = SystemCache(self.reader, sorted(fields), os_cache)
        program = self._program()
        needs_cuda(program.tails)  # wrong pipelines fail here, not later
        if not self.reader.verified:
            _log.warning(
                "%s: unverified: the file has no checksums (written by FFCV?), so damage may go "
                "unnoticed; write it anew to add them",
                self.reader.path,
            )
        name = f"ffcv_ssl-{os.path.basename(self.reader.path)}"
        self._shared.pool = WorkerPool(num_workers, name)
        self._finalizer = weakref.finalize(self, _shut_down, self._shared.pool, self.reader)

    def _program(self) -> EpochProgram:
        return EpochProgram(self.reader, self._resolved, self.seed, *self._decoding)

    # -- iterating

    def __iter__(self) -> EpochIterator:
        """The next epoch, or the rest of the epoch that `load_state_dict` restored. Ends an older
        iterator."""
        self._refuse_forks()
        with self._turn:
            return self._next_epoch()

    def _next_epoch(self) -> EpochIterator:
        self._refuse_closed()
        self._end_iterator()
        epoch, start = self._next
        program = self._program()
        schedule = self._schedule(epoch, start)
        self._sequence = None  # the schedule has it now
        iterator = EpochIterator(
            self, self._shared, program, schedule, epoch, self._slots_for(program), self._batch_type
        )
        with self._lock:
            self._refuse_closed()
            self._iterator = weakref.ref(iterator)  # from here on `close` ends it
        iterator.start()
        self._next, self._position = (epoch + 1, 0), (epoch, start)
        return iterator

    def _refuse_closed(self) -> None:
        if not self._finalizer.alive:
            raise ValueError(f"{self.reader.path}: this loader is closed; make a new one")

    def __len__(self) -> int:
        """Batches per epoch of this rank."""
        epoch = self._next[0]
        if epoch not in self._length_cache:
            self._length_cache = {epoch: self._schedule(epoch, 0).num_batches}
        return self._length_cache[epoch]

    def _schedule(self, epoch: int, start: int) -> EpochSchedule:
        order = self._shared.order
        known = self._sequence
        if known is None or known[0] != epoch:
            sequence = checked_sequence(order, self.reader, self.indices, self.seed, epoch)
            self._sequence = known = epoch, sequence
        return EpochSchedule(
            order,
            self.reader,
            known[1],
            start,
            self.batch_size,
            self.rank,
            self.world_size,
            self.drop_last,
        )

    def _refuse_forks(self) -> None:
        if os.getpid() != self._shared.pool.process:
            raise forked(self.reader.path)

    def _slots_for(self, program: EpochProgram) -> SlotPool:
        """The slot pool; a new pool only when shapes changed."""
        if self._slots is None or self._slots.specs != program.specs:
            pinned = needs_cuda(program.tails)
            base = self._shared.batches_ahead + 2
            self._slots = SlotPool(program.specs, self.batch_size, base, pinned)
        self._slots.shrink()
        return self._slots

    def _note_progress(
        self, iterator: EpochIterator, epoch: int, num_batches: int, schedule: EpochSchedule
    ) -> None:
        if iterator is self._iterator():
            ended = num_batches >= schedule.num_batches
            self._position = (epoch + 1, 0) if ended else (epoch, schedule.handed_out(num_batches))

    def _end_iterator(self) -> None:
        iterator = self._iterator()
        if iterator is not None:
            iterator.close()

    # -- state

    @property
    def seed(self) -> int:
        return self._shared.seed

    @property
    def next_epoch(self) -> int:
        """The epoch that the next `iter()` yields."""
        return self._next[0]

    def set_epoch(self, epoch: int) -> None:
        """The next `iter()` starts this epoch from its beginning."""
        if epoch != int(epoch) or not 0 <= epoch < 2**32:
            raise ValueError(
                f"Loader.set_epoch: got {epoch!r}, expected a whole number from 0 to 2**32 - 1"
            )
        self._next = self._position = (int(epoch), 0)

    def state_dict(self) -> dict[str, Any]:
        """The consumer's position, as plain JSON types, of constant size. After the last batch of
        an epoch it is the start of the next epoch."""
        epoch, samples = self._position
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": epoch,
            "samples": samples,
            "order": self._shared.order.name,
            "fingerprint": self.fingerprint,
            "num_samples": len(self.indices),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after `state`, with any number of workers, ranks and any batch size.
        BetonError, naming both sides, for another dataset or order."""
        if state.get("version") != STATE_VERSION:
            raise BetonError(
                f"{self.reader.path}: got a loader state of version {state.get('version')}, "
                f"expected {STATE_VERSION}; begin the epoch anew"
            )
        if state["fingerprint"] != self.fingerprint:
            raise BetonError(
                f"{self.reader.path}: the loader state was made from "
                f"{_in_words(state['fingerprint'], state['num_samples'])}, but this is "
                f"{_in_words(self.fingerprint, len(self.indices))}; "
                "resume with the same file and the same indices"
            )
        if state["order"] != self._shared.order.name:
            raise BetonError(
                f"{self.reader.path}: the loader state was made with order {state['order']}, "
                f"but this loader has order {self._shared.order.name}; use the same order"
            )
        self._end_iterator()
        self._shared.seed = int(state["seed"])
        self._next = self._position = (int(state["epoch"]), int(state["samples"]))
        self._length_cache, self._sequence = {}, None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the file's content and of `indices`; hexadecimal."""
        return self.reader.fingerprint + self._indices_digest

    @cached_property
    def _indices_digest(self) -> str:
        if np.array_equal(self.indices, np.arange(self.reader.num_samples)):
            return ""
        return f"-{xxh3_64(self.indices):016x}"

    def _choose_seed(self, seed: int | None) -> int:
        if seed is None:
            if self.world_size > 1:
                raise ValueError(
                    "Loader: seed is None with several ranks; give all of them the same seed"
                )
            seed = int.from_bytes(os.urandom(7), "little")
        if seed != int(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"Loader: seed is {seed!r}, must be an integer from 0 to 2**63 - 1")
        return int(seed)

    # -- changes and inspection

    def set_resolution(self, px: Any, pipeline: str | None = None) -> None:
        """Set the size of random crops to px x px, or (height, width), from the next `iter()` on;
        in the view `pipeline`, or in all views."""
        found = False
        for name, _, ops in self._resolved:
            if pipeline in (None, name):
                for op in ops:
                    if isinstance(op, RandomResizedCrop):
                        op.output_size = RandomResizedCrop(px).output_size
                        found = True
        if not found:
            which = "in any view" if pipeline is None else f"in a pipeline '{pipeline}'"
            raise ValueError(f"Loader.set_resolution: found no RandomResizedCrop {which}")

    def filter(self, field: str, condition: Callable) -> Loader:
        """A loader of the samples for which `condition(values)` holds. values: the field's default
        output for a batch, a (B, ...) tensor. condition returns booleans (B,)."""
        ops = default_pipeline(self.reader, field)
        off = {name: None for name in self.reader.fields if name != field}
        arguments = dict(
            self._arguments, order=OrderOption.SEQUENTIAL, drop_last=False, distributed=False
        )
        arguments.update(pipelines={**off, field: ops}, rank=0, world_size=1, seed=0)
        arguments.update(custom_field_mapper=None)
        kept = []
        with Loader(**arguments) as loader:
            for batch in loader:
                keep = np.asarray(condition(batch[0])).reshape(-1).astype(bool)
                kept.append(batch.indices.numpy()[keep])
        indices = np.concatenate(kept) if kept else self.indices[:0]
        return Loader(**dict(self._arguments, indices=indices, seed=self.seed))

    @property
    def stats(self) -> dict[str, float]:
        """Statistics since the loader was made: images handed out, and images_per_s during
        iteration; seconds in read, decode and render (sum over threads), seconds that the consumer
        waited, and that its CUDA stream waited for copies; JPEGs decoded by this library's
        decoder and by simplejpeg; replaced samples; slots, and how often the pool had to grow.
        LoaderError in a forked process.
        """
        self._refuse_forks()
        shared = self._shared
        return {
            "images": shared.images,
            "images_per_s": shared.images / shared.iterating_s if shared.iterating_s else 0.0,
            **shared.pool.stats(),
            "waiting_s": shared.waited_s,
            "copy_wait_s": shared.copy_wait_s(),
            "replaced": shared.replaced,
            "slots": self._slots.num_slots if self._slots else 0,
            "slots_grown": self._slots.grown if self._slots else 0,
        }

    def close(self) -> None:
        """End the threads and close the file, also while another thread waits for a batch. Batches
        already handed out stay valid. In a forked process, only its own descriptor is closed."""
        if os.getpid() != self._shared.pool.process:
            self._finalizer()
            return
        with self._lock:
            self._end_iterator()
            self._finalizer()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotCopyable(
            f"{self.reader.path}: a Loader cannot be copied or pickled, as it has threads and an "
            "open file; make another Loader, and give it this one's state_dict"
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _shut_down(pool: WorkerPool, reader: Reader) -> None:
    pool.stop()
    reader.close()


def _in_words(fingerprint: str, num_samples: int) -> str:
    content, _, choice = fingerprint.partition("-")
    of = f", choice {choice[:8]}.." if choice else ""
    return f"dataset {content[:8]}.. ({num_samples} samples{of})"
