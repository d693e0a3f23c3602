"""How long a run is going to take: measured steps and evaluations, a growing resolution."""

from types import SimpleNamespace

import pytest

import train
from ffcv_ssl.training import console
from ffcv_ssl.training.console import PlainConsole
from ffcv_ssl.training.pace import Pace
from ffcv_ssl.training.world import World


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets: clock[0]."""
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def make(*words, num_evaluated=100, steps_per_epoch=4):
    config = train.read_config(["--optim.warmup_epochs=0", *words])
    world, lines = World(), []
    world.console = PlainConsole(lines.append)
    evaluation = SimpleNamespace(num_images=num_evaluated) if num_evaluated else None
    return Pace(config, steps_per_epoch, evaluation, world), lines


def train_epoch(pace, clock, first, step_s):
    for step, data in enumerate(pace.steps(iter("abcd"), first), start=first + 1):
        assert data in "abcd"
        clock[0] += step_s
        yield step


def test_what_is_left_is_steps_and_evaluations_as_measured(clock):
    pace, _ = make("--epochs=5")
    with pace.evaluation(0):
        clock[0] += 10
    assert pace.left_s(0) is None and pace.describe(0) == ""
    for step in train_epoch(pace, clock, 0, 3.0):
        last = pace.describe(step)
    assert pace.left_s(4) == 16 * 3.0 + 5 * 10  # with the evaluation after this epoch
    assert last == "  epoch 1 of 5 in 12 s  98 s left"
    assert pace.left_s(20) == 10 and pace.left_s(18) == 2 * 3.0 + 10


def test_the_first_step_of_a_start_is_no_measure(clock):
    pace, _ = make("--epochs=2", num_evaluated=0)
    for step in train_epoch(pace, clock, 0, 1.0):
        clock[0] += 40 if step == 1 else 0  # kernels compile
    assert pace.left_s(4) == pytest.approx(4.0)


def test_larger_views_take_longer_in_proportion_to_their_pixels(clock):
    pace, _ = make(
        "--epochs=4", "--resolution.min=64", "--resolution.max=128",
        "--resolution.start_ramp=2", "--resolution.end_ramp=2", num_evaluated=0,
    )  # fmt: skip
    list(train_epoch(pace, clock, 0, 1.0))
    assert pace.left_s(4) == 4 * 1.0 + 8 * 4.0


def test_evaluations_that_are_left_are_those_of_every_so_many_epochs(clock):
    pace, _ = make("--epochs=10", "--evaluation.every_epochs=4")
    with pace.evaluation(0):
        clock[0] += 7
    list(train_epoch(pace, clock, 0, 0.0))
    assert [pace.left_s(4 * epoch) for epoch in (3, 4, 7, 9)] == [21, 21, 14, 7]


def test_a_start_says_what_it_does_first_and_an_epoch_in_the_middle_has_no_time(clock):
    pace, lines = make("--epochs=5")
    with pace.evaluation(8):
        clock[0] += 1
    list(train_epoch(pace, clock, 8, 1.0))
    list(train_epoch(pace, clock, 12, 1.0))
    assert lines == ["evaluating after epoch 2 of 5: 100 images", "epoch 3 of 5: 4 steps"]
    resumed, _ = make("--epochs=5")
    for step in resumed.steps(iter("cd"), 10):
        assert step in "cd"
    assert "epoch 3 of 5 in" not in resumed.describe(12)
