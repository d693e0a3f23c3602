"""Threads: many short-lived loaders, and delays where they hurt most."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import gc
import os
import pickle
import shutil
import tempfile
import threading
import time
from unittest import mock

from support.loading import make_loader, samples_of
from support.small_files import write_small

from ffcv_ssl.errors import LoaderError, NotCopyable
from ffcv_ssl.loader.decoding import PayloadReader
from ffcv_ssl.loader.device import Delivery
from ffcv_ssl.loader.iterator import EpochIterator
from ffcv_ssl.loader.job import BatchJob
from ffcv_ssl.loader.slots import SlotPool
from ffcv_ssl.loader.workers import WorkerPool
from ffcv_ssl.reader import Reader
from torture.frame import fault
from torture.usage import census

STAGES = [
    (EpochIterator, "_make_job"),
    (WorkerPool, "submit"),
    (SlotPool, "lend"),
    (PayloadReader, "read"),
    (BatchJob, "run_chunk"),
    (BatchJob, "_process_rows"),
    (BatchJob, "_end_stage"),
    (BatchJob, "_finish"),
    (Delivery, "finish"),
]
"""What is delayed: everything that one thread hands to another."""


@functools.cache
def small_file():
    """(path, the samples of epoch 0 as `samples_of` gives them); kept while the process lives."""
    folder = tempfile.mkdtemp(prefix="torture.threads.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = write_small(os.path.join(folder, "small.beton"), 40, mode="proportion")
    with make_loader(path, 8) as loader:
        return path, samples_of(loader)


@contextlib.contextmanager
def delays(random, most_s=0.004):
    """Random delays before and after every stage, from a table that threads share."""
    table = random.uniform(0, most_s, 1000) * (random.random(1000) < 0.3)
    turn = iter(range(10**9))

    def delayed(plain):
        def call(*arguments):
            time.sleep(table[next(turn) % 1000])
            value = plain(*arguments)
            time.sleep(table[next(turn) % 1000])
            return value

        return call

    with contextlib.ExitStack() as patched:
        for owner, name in STAGES:
            plain = getattr(owner, name)
            patched.enter_context(mock.patch.object(owner, name, delayed(plain)))
        yield


def expect_census(before, seconds=10):
    """Wait until as many threads and descriptors are left as before."""
    until = time.monotonic() + seconds
    while census() != before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert census() == before, f"(threads, descriptors): got {census()}, expected {before}"


@fault("random delays between all stages", quick=3, full=200, limit_s=60)
def random_delays(trial):
    """A loader gives the same pixels in the same order, wherever its threads are late."""
    path, expected = small_file()
    workers, ahead = (int(n) for n in trial.random.integers(1, 7, 2))
    with (
        delays(trial.random),
        make_loader(path, 8, num_workers=workers, batches_ahead=ahead) as loader,
    ):
        assert samples_of(loader) == expected


def leave_by_break(loader, random):
    """The consumer stops in the middle of an epoch."""
    for number, _ in enumerate(loader):
        if number == random.integers(5):
            break


def leave_by_exception(loader, random):
    """Code behind the loader fails."""
    with contextlib.suppress(ZeroDivisionError):
        for number, _ in enumerate(loader):
            1 / int(number != random.integers(5))


def leave_by_close(loader, random):
    """`close()` from another thread, at any moment of the epoch."""
    timer = threading.Timer(float(random.uniform(0, 0.02)), loader.close)
    timer.start()
    with contextlib.suppress(ValueError):  # closed before `iter`
        for _ in loader:
            pass
    timer.join()


def leave_by_new_iter(loader, random):
    """Epochs are begun and left behind."""
    for _ in range(int(random.integers(1, 4))):
        next(iter(loader))


@fault("short-lived loaders", quick=40, full=1000, limit_s=60)
def short_lived(trial):
    """A loader that is left by break, exception, close or garbage collection, at any moment, ends
    without a deadlock and leaves no thread and no descriptor."""
    path, _ = small_file()
    gc.collect()
    before = census()
    ways = leave_by_break, leave_by_exception, leave_by_close, leave_by_new_iter
    way = ways[trial.random.integers(len(ways))]
    loader = make_loader(path, 8, num_workers=int(trial.random.integers(1, 5)))
    way(loader, trial.random)
    is_closed = bool(trial.random.integers(2))
    if is_closed:
        loader.close()
    del loader
    expect_census(before)
    return way.__name__.replace("_", " ") + (", then close" if is_closed else ", then collected")


@fault("one iterator in several threads", quick=2, full=100, limit_s=60)
def shared_iterator(trial):
    """Each batch of an epoch reaches exactly one of the threads that share its iterator."""
    path, expected = small_file()
    found = []
    with delays(trial.random, 0.002), make_loader(path, 4) as loader:
        iterator = iter(loader)
        threads = [threading.Thread(target=lambda: found.extend(iterator)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(samples_of(found)) == sorted(expected)


@fault("a fork in the middle of an epoch", quick=3, full=100, limit_s=60)
def forked(trial):
    """A fork gets one line for whatever it asks of the loader, and ends; the parent's epoch goes
    on."""
    path, expected = small_file()
    with make_loader(path, 8) as loader:
        iterator = iter(loader)
        found = [next(iterator) for _ in range(int(trial.random.integers(5)))]
        child = os.fork()
        if child == 0:
            code = 9
            try:
                use_in_child(loader, iterator)
                code = 0
            finally:
                os._exit(code)
        found += iterator
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert samples_of(found) == expected


def use_in_child(loader, iterator):
    """Everything a fork may try with its parent's loader."""
    for action in (lambda: next(iterator), lambda: iter(loader), lambda: loader.stats):
        try:
            action()
        except LoaderError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError("the fork got no error")
    loader.close()


@fault("copies at random moments", quick=3, full=200, limit_s=60)
def copied(trial):
    """A loader refuses to be copied, a copied reader opens the file again, and the original goes
    on."""
    path, expected = small_file()
    before = census()
    found = []
    with make_loader(path, 4) as loader:
        for batch in loader:
            found += samples_of([batch])
            duplicate = (copy.copy, copy.deepcopy, pickle.dumps)[trial.random.integers(3)]
            with contextlib.suppress(NotCopyable):
                duplicate(loader)
                raise AssertionError("a loader was copied")
            again = pickle.loads(pickle.dumps(batch))
            assert again._fields == batch._fields and again.indices.equal(batch.indices)
            other = pickle.loads(pickle.dumps(loader.reader))
            assert isinstance(other, Reader) and other.read(0, "image")
            del other
    assert found == expected
    expect_census(before)


@fault("hundreds of threads with loaders of their own", quick=1, full=1, limit_s=600)
def many_threads(trial):
    """512 threads (quick: 64), each with a loader of its own on one file, all get the same
    pixels."""
    path, expected = small_file()
    before = census()
    wrong: list[object] = []

    def consume():
        try:
            with make_loader(path, 8, num_workers=1, batches_ahead=1) as loader:
                if samples_of(loader) != expected:
                    wrong.append("other pixels")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=consume) for _ in range(64 if trial.quick else 512)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    expect_census(before)
    return {"threads": len(threads)}
