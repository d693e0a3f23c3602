"""A rank that does not answer is named, by those that do, in one line."""

import threading
import time

import pytest
import torch.distributed as dist

from ffcv_ssl.errors import LostRank
from ffcv_ssl.training import lost_ranks
from ffcv_ssl.training.meeting import meet

TIMED_OUT = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 500ms for recv"
)
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(lost_ranks, "ENDED_GRACE_S", 0.3)
    monkeypatch.setattr(lost_ranks, "STORE_PATIENCE_S", 60.0)  # of a store that does answer


class MeetingStore:
    """A store that answers no rank before all ranks that are there have written: none of them is
    late, however busy the machine."""

    def __init__(self, number):
        self.store, self.all_there = dist.HashStore(), threading.Barrier(number)

    def set(self, key, value):
        self.store.set(key, value)
        self.all_there.wait(60)

    def check(self, keys):
        return self.store.check(keys)


def lines_of(alive, size, error, patience_s=0.3):
    """What each of the ranks `alive` says."""
    store, lines = MeetingStore(len(alive)), {}

    def explain(rank):
        lines[rank] = lost_ranks.explain(error, store, rank, size, patience_s)

    threads = [threading.Thread(target=explain, args=(rank,), daemon=True) for rank in alive]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return lines


def test_the_ranks_that_are_there_name_those_that_are_not():
    lines = lines_of([0, 2, 3], 5, TIMED_OUT)
    assert len(set(lines.values())) == 1 and len(lines) == 3
    assert lines[0].startswith("ranks 1, 4 of 5 did not answer for 0.3 s: ")
    assert "\n" not in lines[0]


def test_a_rank_whose_process_has_ended_is_named_too():
    (line,) = lines_of([0], 2, CLOSED).values()
    assert line.startswith("rank 1 of 2 ended before the others; ")


def test_no_rank_is_named_where_all_are_there():
    lines = lines_of([0, 1], 2, TIMED_OUT)
    assert all("though all are there" in line for line in lines.values())


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("timed out"), KeyError("timeout")]
)
def test_an_error_of_another_kind_is_no_lost_rank(error):
    assert lines_of([0], 2, error) == {0: None}


class DeadStore:
    """As a store in a process that is stopped: calls do not return."""

    def set(self, *_):
        time.sleep(3600)

    check = set


def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(lost_ranks, "STORE_PATIENCE_S", 0.1)
    line = lost_ranks.explain(TIMED_OUT, DeadStore(), 1, 2, 0.1)
    assert line.startswith("the machine that ranks meet on does not answer")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named_by_those_that_wait_for_it(rank):
    with pytest.raises(
        LostRank, match=f"rank {1 - rank} of 2 did not come to the start within 0.2"
    ):
        meet(dist.HashStore(), rank, 2, patience_s=0.2)


def test_a_rank_that_died_while_it_joined_does_not_hold_up_the_first_for_ever():
    store = dist.HashStore()
    store.set("token/1", "of a dead rank")
    with pytest.raises(LostRank, match="rank 1 of 2"):
        meet(store, 0, 2, patience_s=0.2)
