"""A rank's place on its machine: its CUDA device and its share of the cores."""

import os

import pytest
import torch
from support.method_cases import run_ranks

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.run_data import MAX_WORKERS, num_loader_threads
from ffcv_ssl.training.world import World, _share_of_cores, choose_rank_device


@pytest.mark.parametrize(
    ("num_devices", "local_rank", "local_size", "expected"),
    [(4, 3, 4, "cuda:3"), (8, 2, 4, "cuda:2"), (1, 0, 1, "cuda:0"), (1, 3, 4, "cuda:0")],
)
def test_a_rank_takes_the_device_of_its_number_or_the_only_one_it_sees(
    monkeypatch, num_devices, local_rank, local_size, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    assert choose_rank_device(local_rank, local_size) == torch.device(expected)


def test_more_ranks_than_devices_are_refused_on_all_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in range(4):
        with pytest.raises(UserError, match="got 4 ranks on a machine with 2 CUDA devices"):
            choose_rank_device(local_rank, 4)


def cores_of(world):
    return torch.tensor([world.cores, torch.get_num_threads()])


@pytest.mark.whole
@pytest.mark.parametrize("bound", [False, True])
def test_cores_are_divided_unless_each_rank_is_bound_to_its_own(bound, tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("one core cannot be divided")
    found = run_ranks(bound_cores if bound else cores_of, tmp_path)
    expected = [1, 1] if bound else [len(mine) // 2] * 2
    assert [int(rank[0]) for rank in found] == expected


def bound_cores(world):
    """The share of a rank that a launcher has bound to one core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world.rank]})
    return torch.tensor([_share_of_cores(torch.device("cpu")), 0])


def test_loader_threads_are_those_asked_for_or_the_ranks_share_of_the_cores():
    on_cpu, on_gpu = World(cores=8), World(device="cuda:0", cores=6)
    assert num_loader_threads(-1, on_cpu) == 4 and num_loader_threads(-1, World(cores=1)) == 1
    assert num_loader_threads(-1, on_gpu) == 6
    assert num_loader_threads(-1, World(device="cuda:0", cores=256)) == MAX_WORKERS
    assert num_loader_threads(3, on_gpu) == 3 and num_loader_threads(99, on_cpu) == 99


@pytest.mark.whole
def test_ranks_that_share_a_device_divide_the_cores_and_are_not_refused(tmp_path):
    found = run_ranks(share_of_one_device, tmp_path)
    assert [int(rank) for rank in found] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def share_of_one_device(world):
    return torch.tensor(_share_of_cores(torch.device("cuda:0"), shared=True))


def test_a_numbered_device_for_several_ranks_is_refused_unless_it_is_shared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: 1 / 0)  # goes no further
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", {})
    chosen = []
    with pytest.raises(UserError, match="got cuda:0 for 2 ranks, expected cuda"):
        World.join("cuda:0", launcher=launcher)
    for name in ("cuda:0", "cuda"):
        with pytest.raises(ZeroDivisionError):
            World.join(name, launcher=launcher, shared=True)
    assert chosen == [torch.device("cuda:0")] * 2
