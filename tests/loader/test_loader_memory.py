"""Slots: kept batches stay valid, memory is reused, the pool grows and shrinks, nothing grows over
epochs."""

import gc
import os
import signal
import threading

import torch
from support.loading import make_loader

from ffcv_ssl import Loader
from ffcv_ssl.loader.slots import SlotPool
from ffcv_ssl.transforms import RandomResizedCrop


def test_kept_batches_stay_as_they_were(small_beton):
    with make_loader(small_beton, 8, batches_ahead=2) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(batch.view_0.clone())
        assert loader.stats["slots_grown"] > 0
    assert all(batch.view_0.equal(copy) for batch, copy in zip(kept, copies))


def test_a_slice_of_a_batch_keeps_its_memory_too(small_beton):
    with make_loader(small_beton, 8, batches_ahead=1) as loader:
        iterator = iter(loader)
        row = next(iterator).view_1[3]
        copy = row.clone()
        for _ in iterator:
            pass
        for _ in loader:
            pass
    assert row.equal(copy)


def test_a_numpy_slice_keeps_its_memory_too(small_beton):
    pipelines = {"view_0": ("image", [RandomResizedCrop(8)])}
    with Loader(small_beton, 8, batches_ahead=1, pipelines=pipelines) as loader:
        iterator = iter(loader)
        row = next(iterator).view_0[2:3, 1:]
        copy = row.copy()
        for _ in iterator:
            pass
    assert (row == copy).all()


def test_memory_is_reused_when_batches_are_dropped(small_beton):
    with make_loader(small_beton, 8, batches_ahead=2) as loader:
        addresses = set()
        for _ in range(3):
            for batch in loader:
                addresses.add(batch.view_0.data_ptr())
        assert (
            len(addresses) <= 5
        )  # batches_ahead + 2 slots, and one while `batch` is still held at iter()
        assert loader.stats["slots"] <= 5


def test_the_pool_shrinks_back(small_beton):
    with make_loader(small_beton, 8, batches_ahead=2) as loader:
        kept = list(loader)
        assert loader.stats["slots"] >= len(kept)
        del kept
        gc.collect()
        for _ in loader:
            pass
        assert loader.stats["slots"] <= 5


def test_a_slot_returns_only_when_its_last_array_is_gone():
    pool = SlotPool({"a": ((3,), "float32"), "b": ((2, 2), "uint8")}, 4, base_slots=1)
    arrays = pool.lend(4)
    tensor = torch.from_numpy(arrays["a"])[1]
    del arrays
    first = pool.lend(2)["b"]
    assert pool.num_slots == 2 and pool.grown == 1
    del tensor, first
    pool.shrink()
    assert pool.num_slots == 1
    assert {k: v.shape for k, v in pool.lend(3).items()} == {"a": (3, 3), "b": (3, 2, 2)}


def test_an_interrupt_is_raised_also_where_it_comes_as_a_slot_returns():
    """Ctrl-C in a loop over batches. Python drops what is raised in a weak reference's callback."""
    pool = SlotPool({"a": ((3,), "float32")}, 4, base_slots=1)
    armed, handled, caught = False, 0, 0

    def interrupt(*_):
        nonlocal armed, handled
        if armed:
            armed, handled = False, handled + 1
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while handled < 200:
            try:
                armed = True
                while armed:
                    pool.lend(1)
            except KeyboardInterrupt:
                caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert caught == handled


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_many_epochs_grow_neither_memory_nor_threads_nor_files(raw_beton):
    with make_loader(raw_beton, 32) as loader:
        for _ in range(20):
            for _ in loader:
                pass
        gc.collect()
        before = resident_mib(), threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(150):
            for _ in loader:
                pass
        gc.collect()
        after = resident_mib(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 8
