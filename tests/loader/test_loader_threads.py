"""Loaders in several threads, in forked processes, copied and pickled: one line, or it works."""

import contextlib
import copy
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from support.loading import make_loader, samples_of, two_views

import ffcv_ssl.loader.loader as loader_module
from ffcv_ssl import Loader, OrderOption
from ffcv_ssl.errors import LoaderError, NotCopyable, UserError
from ffcv_ssl.loader.device import Delivery
from ffcv_ssl.loader.iterator import chunk_size
from ffcv_ssl.loader.job import BatchJob
from ffcv_ssl.transforms import RandomResizedCrop, ToTensor
from ffcv_ssl.traversal_order import Sequential


def exit_code_of_fork(action, limit_s=20):
    """The exit code of a forked child that runs `action`; 99 if it hangs."""
    child = os.fork()
    if child == 0:
        code = 98
        try:
            code = action()
        finally:
            os._exit(code)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 99


def is_refused(action):
    """7 if `action` raises the one line about forks, else 8."""
    try:
        action()
    except LoaderError as error:
        return 7 if "fork" in str(error) and "\n" not in str(error) else 8
    return 9


@pytest.mark.parametrize("is_used", [False, True])
def test_a_fork_is_refused_by_iter_next_and_stats(raw_beton, is_used):
    with make_loader(raw_beton) as loader:
        iterator = iter(loader)
        if is_used:
            next(iterator)
        for action in (lambda: list(loader), lambda: next(iterator), lambda: loader.stats):
            assert exit_code_of_fork(lambda action=action: is_refused(action)) == 7


def test_a_fork_that_closes_the_loader_leaves_the_parents_alone(raw_beton):
    with make_loader(raw_beton) as loader:
        expected = samples_of(loader)
        loader.set_epoch(0)
        iterator = iter(loader)
        found = samples_of([next(iterator)])

        def close():
            loader.close()
            iterator.close()
            loader.reader.close()
            return 5

        with loader._lock, iterator._lock:  # as another thread may hold them during the fork
            assert exit_code_of_fork(close) == 5
        assert found + samples_of(iterator) == expected


def test_a_fork_may_make_a_loader_of_its_own(raw_beton):
    with make_loader(raw_beton) as loader:
        next(iter(loader))

        def load():
            with Loader(raw_beton, 100, num_workers=2) as own:
                return len(list(own))

        assert exit_code_of_fork(load) == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_loaders_and_their_iterators_refuse_to_be_copied(raw_beton, duplicate):
    with make_loader(raw_beton) as loader:
        expected = samples_of(loader)
        loader.set_epoch(0)
        iterator = iter(loader)
        found = samples_of([next(iterator)])
        for original in (loader, iterator):
            with pytest.raises(NotCopyable, match="cannot be copied or pickled") as error:
                duplicate(original)
            assert "\n" not in str(error.value)
        assert found + samples_of(iterator) == expected


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("fails", ["check_indices", "SystemCache", "WorkerPool"])
def test_a_loader_that_fails_half_made_keeps_no_file_open(raw_beton, monkeypatch, fails):
    def fail(*_):
        raise OSError("no more")

    monkeypatch.setattr(loader_module, fails, fail)
    before = open_files()
    with pytest.raises(OSError, match="no more"):
        Loader(raw_beton, 4)
    assert open_files() == before


def test_threads_that_were_started_end_when_the_next_one_cannot_start(raw_beton, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="new thread"):
        Loader(raw_beton, 4, num_workers=3)
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)


# -- several threads


def in_threads(count, action):
    threads = [threading.Thread(target=action, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_that_share_an_iterator_get_each_batch_once(raw_beton):
    with make_loader(raw_beton, 4) as loader:
        expected = samples_of(loader)
        for _ in range(3):
            loader.set_epoch(0)
            iterator, batches, errors = iter(loader), [], []

            def take(iterator=iterator, batches=batches, errors=errors):
                try:
                    for batch in iterator:
                        batches.append(batch)
                except Exception as error:
                    errors.append(error)

            in_threads(6, take)
            assert errors == [] and sorted(samples_of(batches)) == sorted(expected)
            assert loader.state_dict()["epoch"] == 1


def test_a_close_from_another_thread_ends_the_iterator(raw_beton, monkeypatch):
    plain, release = BatchJob._process_rows, threading.Event()

    def slow(job, *arguments):
        release.wait(5)
        plain(job, *arguments)

    monkeypatch.setattr(BatchJob, "_process_rows", slow)
    loader = make_loader(raw_beton)
    iterator, ends = iter(loader), []
    consumer = threading.Thread(target=lambda: ends.append(list(iterator)))
    consumer.start()
    closer = threading.Thread(target=loader.close)
    closer.start()
    consumer.join(4)  # it need not wait for the batch
    release.set()
    closer.join(20)
    assert ends == [[]] and not closer.is_alive() and loader.reader.fd == -1


class Blocks:
    """User's code that stops in the middle until the test is over; `entered` is set by then."""

    def __init__(self):
        self.entered, self.release, self.is_on = threading.Event(), threading.Event(), False

    def __call__(self, value):
        if self.is_on:
            self.entered.set()
            self.release.wait(20)
        return value


class BlockedOrder(Sequential):
    def __init__(self, name, blocks):
        self.blocked, self.blocks = name, blocks

    def sequence(self, reader, indices, seed, epoch):
        return self.blocks(indices) if self.blocked == "sequence" else indices

    def split(self, reader, samples, world_size):
        parts = super().split(reader, samples, world_size)
        return self.blocks(parts) if self.blocked == "split" else parts


@pytest.mark.parametrize("where", ["op", "split", "sequence"])
def test_a_close_does_not_wait_for_users_code(raw_beton, where):
    blocks = Blocks()
    views = {"view_0": ("image", [RandomResizedCrop(8), blocks])} if where == "op" else two_views()
    loader = make_loader(raw_beton, order=BlockedOrder(where, blocks), pipelines=views)
    blocks.is_on, ends = True, []

    def consume():
        with contextlib.suppress(ValueError):  # a loader that is closed gives no new iterator
            ends.extend(loader)
        ends.append("end")

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert blocks.entered.wait(20)
    closer = threading.Thread(target=loader.close, daemon=True)
    closer.start()
    closer.join(10)
    is_closed, fd = not closer.is_alive(), loader.reader.fd
    blocks.release.set()
    consumer.join(20)
    assert is_closed and fd == -1 and ends[-1] == "end" and len(ends) <= 2


def test_an_error_after_a_batch_is_taken_ends_the_iterator_and_keeps_its_place(raw_beton):
    fails = []

    def op(value):
        if fails:
            raise fails.pop()
        return value

    pipelines = {"view_0": ("image", [RandomResizedCrop(8), ToTensor(), op])}
    with make_loader(raw_beton, pipelines=pipelines) as loader:
        expected = ids(loader)
        loader.set_epoch(0)
        for error in (KeyError("op"), KeyboardInterrupt()):
            iterator = iter(loader)
            found = next(iterator).indices.tolist()
            fails.append(error)
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                next(iterator)
            assert list(iterator) == []
            loader.load_state_dict(loader.state_dict())
            assert found + ids(loader) == expected
            loader.set_epoch(0)


def test_an_order_that_fails_ahead_ends_the_iterator_and_keeps_its_place(raw_beton):
    class Fails(Sequential):
        calls = 0

        def split(self, reader, samples, world_size):
            self.calls += 1
            if self.calls == 5:
                raise KeyError("split")
            return super().split(reader, samples, world_size)

    with make_loader(raw_beton, order=Fails()) as loader:
        iterator = iter(loader)
        found = next(iterator).indices.tolist()
        with pytest.raises(KeyError, match="split"):
            next(iterator)
        assert list(iterator) == []
        loader.load_state_dict(loader.state_dict())
        assert found + ids(loader) == list(range(192))


def test_a_batch_ahead_that_cannot_be_delivered_fails_in_its_turn(raw_beton, monkeypatch):
    failed = []

    def start(delivery, job):
        if job.indices[0] == 16 and not failed:
            failed.append(job)
            raise RuntimeError("no memory on the device")

    monkeypatch.setattr(Delivery, "start", start)
    with make_loader(raw_beton, order=OrderOption.SEQUENTIAL) as loader:
        iterator = iter(loader)
        while not all(job.done.is_set() for job in iterator._jobs):
            time.sleep(0.01)
        assert next(iterator).indices[0] == 0
        assert len(failed) == 1
        with pytest.raises(RuntimeError, match="no memory on the device"):
            next(iterator)
        assert list(iterator) == []


# -- batches


def test_a_pickled_batch_keeps_its_names_and_attributes(raw_beton):
    with make_loader(raw_beton) as loader:
        batch = next(iter(loader))
    for again in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), copy.copy(batch)):
        assert type(again) is type(batch) and again._fields == batch._fields
        assert all(torch.equal(a, b) for a, b in zip(again, batch))
        for name in ("indices", "valid", "replaced"):
            assert torch.equal(getattr(again, name), getattr(batch, name))
        assert (again.params["view_1"] == batch.params["view_1"]).all()


@pytest.mark.parametrize(
    ("batch_size", "num_workers", "expected"),
    [(256, 2, 64), (256, 16, 8), (256, 128, 8), (64, 128, 8), (16, 2, 4), (8, 2, 2), (1, 8, 1)],
)
def test_chunks_have_eight_samples_or_an_eighth_of_the_batch(batch_size, num_workers, expected):
    assert chunk_size(batch_size, num_workers) == expected


# -- indices


def ids(loader):
    return [int(i) for batch in loader for i in batch.indices]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda mask: mask.tolist()])
def test_a_mask_chooses_the_samples_where_it_is_true(raw_beton, kind):
    mask = np.arange(200) % 7 == 3
    with Loader(raw_beton, 5, indices=kind(mask), drop_last=False) as loader:
        assert ids(loader) == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("kind", [list, range, np.array, torch.tensor, tuple])
def test_ids_of_any_kind_may_repeat(raw_beton, kind):
    indices = range(5, 9) if kind is range else kind([7, 3, 7, 199])
    with Loader(raw_beton, 3, indices=indices, drop_last=False) as loader:
        assert ids(loader) == [int(i) for i in indices]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.ones(199, bool), "a mask of 199 booleans, expected 200, one for every sample"),
        ([True, 5], "of type object .* whole numbers in one dimension, or a mask of booleans"),
        ([0.0, 1.0], "of type float64 and shape .2,., expected whole numbers"),
        (torch.tensor([1.5]), "of type float32 and shape"),
        ([[1, 2], [3, 4]], r"of type int64 and shape \(2, 2\), expected whole numbers"),
        (np.ones((1, 200), bool), r"of type bool and shape \(1, 200\)"),
        (5, r"of type int64 and shape \(\), expected whole numbers in one dimension"),
        ({1, 2}, "of type object"),
        (["1"], "of type <U1"),
        ([[1], [2, 3]], r"indices of type list, expected whole numbers in one dimension \("),
        (np.array([2**64 - 1], np.uint64), "expected 0 to 199"),
    ],
)
def test_indices_that_are_no_ids_are_refused_in_one_line(raw_beton, indices, message):
    with pytest.raises(ValueError, match=message) as error:
        Loader(raw_beton, 4, indices=indices)
    assert "\n" not in str(error.value)


# -- orders are worked out once


def test_len_and_iter_work_an_order_out_once_an_epoch(raw_beton, monkeypatch):
    calls = []
    with make_loader(raw_beton) as loader:
        sequence = type(loader._shared.order).sequence

        def counted(order, reader, indices, seed, epoch):
            calls.append(epoch)
            return sequence(order, reader, indices, seed, epoch)

        monkeypatch.setattr(type(loader._shared.order), "sequence", counted)
        for _ in range(2):
            assert len(loader) == sum(1 for _ in loader) == 12
        assert calls == [0, 1]
        loader.load_state_dict({**loader.state_dict(), "seed": 6, "epoch": 1})
        other = ids(loader)
    with make_loader(raw_beton, seed=6) as loader:
        loader.set_epoch(1)
        assert ids(loader) == other


def test_ids_of_an_order_that_the_file_does_not_have_are_refused(raw_beton):
    class Beyond(Sequential):
        def sequence(self, reader, indices, seed, epoch):
            return indices - 1

    with make_loader(raw_beton, order=Beyond()) as loader:
        with pytest.raises(ValueError, match="order Beyond gave samples from -1 to 198"):
            iter(loader)


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (lambda ids: ids + 0.9, r"float64 and shape \(200,\)"),
        (lambda ids: ids % 2 == 0, r"bool and shape \(200,\)"),
        (lambda ids: ids.reshape(2, 100), r"int64 and shape \(2, 100\)"),
        (lambda ids: ids[0], r"int64 and shape \(\)"),
    ],
)
def test_what_an_order_gives_must_be_ids(raw_beton, samples, what):
    class Odd(Sequential):
        def sequence(self, reader, indices, seed, epoch):
            return samples(indices)

    with make_loader(raw_beton, order=Odd()) as loader:
        with pytest.raises(UserError, match=f"order Odd gave samples of type {what}, expected"):
            iter(loader)
