"""Ranks that cannot meet, or cannot tell one another, say so and end."""

import datetime
import threading

import pytest
import torch.distributed as dist

from ffcv_ssl.errors import LostRank
from ffcv_ssl.training import command, lost_ranks, meeting, world


class StoppedStore:
    """As a store in a process that is stopped: calls do not return."""

    def set(self, *_):
        threading.Event().wait()

    add = check = set


@pytest.fixture
def stores(monkeypatch):
    """This process' connection, with a store that is asked in vain."""
    monkeypatch.setattr(lost_ranks, "STORE_PATIENCE_S", 0.1)
    monkeypatch.setattr(world, "_stores", {"launch": StoppedStore(), "start": StoppedStore()})


@pytest.mark.parametrize("is_mistake", [False, True])
def test_a_rank_says_why_it_ends_where_the_store_does_not_answer(stores, is_mistake):
    assert world.tell_first("a line", is_mistake)


def test_of_all_ranks_one_says_a_line(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(world, "_stores", {"launch": store, "start": store})
    assert [world.tell_first("a line", False) for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("code, is_kept", [(1, False), (command.EXIT_USER_ERROR, True)])
def test_only_a_mistake_keeps_torchrun_from_starting_again(code, is_kept, monkeypatch, capsys):
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    assert command._say_and_end("rank 0 of 2 did not come to the start", code) == code
    assert capsys.readouterr().err == "rank 0 of 2 did not come to the start\n"
    assert store.check([world._MISTAKE]) == is_kept


def test_ranks_that_the_first_one_waits_for_in_vain_are_one_line(monkeypatch):
    # the first rank under Slurm keeps the store itself, and waits in it for all others
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(LostRank, match=r"^ranks did not meet at 127.0.0.1:0 within 0.3 s .*; see"):
        meeting.reach_launcher(datetime.timedelta(seconds=0.3))


def test_an_error_after_the_meeting_is_explained_until_the_ranks_part(monkeypatch):
    monkeypatch.setattr(world, "_stores", {"explain": lambda error: "rank 1 of 2 did not answer"})
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(world.signal, "signal", lambda *_: None)  # a rank that leaves ignores one
    timed_out = RuntimeError("gloo: timed out")
    assert world.explain_loss(timed_out) == "rank 1 of 2 did not answer"
    world.World(size=2).leave()
    assert world.explain_loss(timed_out) is None and world.was_connected()


WORDS = {
    "CUDA error: the launch timed out and was terminated": False,
    "my method: the server's connection was reset by restore()": False,
    "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711": True,
    "wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1": False,
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)": True,
}


@pytest.mark.parametrize("text", WORDS)
def test_only_errors_between_ranks_blame_a_rank(text):
    assert lost_ranks.is_loss(RuntimeError(text)) == WORDS[text]


def test_the_errors_of_torch_itself_need_no_words_for_it():
    assert lost_ranks.is_loss(dist.DistStoreError("wait timeout after 300000ms, keys: /0/1"))


def test_of_several_silent_ranks_one_has_ended(monkeypatch):
    monkeypatch.setattr(lost_ranks, "ENDED_GRACE_S", 0.2)
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    line = lost_ranks.explain(closed, dist.HashStore(), rank=0, size=3, patience_s=1)
    assert line.startswith("at least one of ranks 1, 2 of 3 ended before the others; ")
