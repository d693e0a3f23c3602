"""What a training loop waited for, on a device whose time line a test writes."""

from types import SimpleNamespace

import pytest
import torch

from ffcv_ssl.training import meters
from ffcv_ssl.training.clock import Clock
from ffcv_ssl.training.meters import Interval
from ffcv_ssl.training.world import World


class Device(Clock):
    """A device that a test keeps busy: the host queues moments, and time passes on `finish`."""

    def __init__(self):
        self.is_cuda, self.device = True, torch.device("cpu")
        self.time = 0.0
        self.queued = []

    def now(self):
        moment = SimpleNamespace(time=None)
        self.queued.append(moment)
        return moment

    def has_passed(self, moment):
        return moment.time is not None

    def seconds(self, start, end):
        return end.time - start.time

    def finish(self, *seconds):
        """Let the queued moments pass, so many seconds after each other."""
        for moment, pause in zip(self.queued, seconds, strict=True):
            self.time += pause
            moment.time = self.time
        self.queued = []


@pytest.fixture
def interval(monkeypatch):
    monkeypatch.setattr(meters.time, "perf_counter", lambda: interval.clock.time)
    interval = Interval.__new__(Interval)
    interval.clock, interval.loaders = Device(), []
    interval.start()
    return interval


def test_only_the_devices_pauses_before_a_batch_count_as_waiting(interval):
    batches = interval.timed([1, 2])
    next(batches)
    interval.clock.finish(0, 3)  # 3 s without a batch
    next(batches)
    interval.clock.finish(6, 1)  # a step of 6 s, then 1 s without a batch
    assert interval.seconds() == (10, 4)


def test_moments_that_have_not_passed_are_not_asked_for(interval):
    batches = interval.timed([1, 2, 3])
    next(batches)
    next(batches)  # the host is a step ahead of the device
    assert interval.seconds()[1] == 0
    interval.clock.finish(0, 2, 5, 1)
    assert interval.seconds() == (8, 3)


def test_copies_are_told_from_waiting_for_images(interval):
    loader = SimpleNamespace(stats={"copy_wait_s": 10.0})  # of before
    interval.loaders = [loader]
    interval.start()
    batches = interval.timed([1])
    next(batches)
    interval.clock.finish(0, 4)
    loader.stats["copy_wait_s"] = 11.0
    interval.clock.time, interval.images = 8.0, 16
    found = interval.take()
    assert found["train/data_wait"] == 3 / 8 and found["train/copy_wait"] == 1 / 8
    assert found["train/images_per_s"] == 2 and "train/rank_wait" not in found
    assert interval.seconds()[1] == 0  # the next one has begun


def test_the_rank_whose_images_come_last_is_waited_for(interval):
    batches = interval.timed([1])
    next(batches)
    interval.clock.finish(0, 1)
    interval.clock.time = 10.0
    world = World(0, 2)
    others = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    world.gather = lambda shares: torch.cat([shares, others])
    found = interval.take(world)
    assert found["train/data_wait"] == pytest.approx(0.3)  # of 0.1 and 0.5
    assert found["train/rank_wait"] == pytest.approx(0.2)


def test_on_a_cpu_the_clock_of_the_host_counts():
    interval = Interval()
    for _ in interval.timed(range(3)):
        interval.images += 5
    found = interval.take()
    assert found["train/images_per_s"] > 0 and 0 <= found["train/data_wait"] <= 1
    assert "train/copy_wait" not in found and found["train/peak_memory_mib"] > 10
