"""Memory that runs out, and a step that is only tried."""

import copy
import json

import pytest
import torch
from torch import nn

from ffcv_ssl.training import command, memory
from ffcv_ssl.training.optimizers import LARS

ON_GPU = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has")
ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
    ],
)
def test_libraries_that_run_out_of_memory_say_it_in_their_own_words(error):
    assert memory.what_ran_out(error) == ("cuda", "")


def test_errors_that_say_that_memory_ran_out_are_told_from_others():
    assert memory.what_ran_out(MemoryError("Unable to allocate 3 GiB")) == ("cpu", "")
    assert memory.what_ran_out(RuntimeError("CUDA error: device-side assert triggered")) is None
    assert memory.what_ran_out(ON_GPU) == ("cuda:3", " (asked for 2.50 GiB)")
    assert memory.what_ran_out(ON_CPU) == ("cpu", " (asked for 7 bytes)")
    assert memory.what_ran_out(RuntimeError("mat1 and mat2")) is None
    assert memory.what_ran_out(ValueError("can't allocate memory")) is None


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU])
def test_a_command_that_runs_out_of_memory_says_so_in_one_line(error, capsys):
    def run(argv):
        raise error

    assert command.run_ranks(run, []) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "lower the batch size or the resolution" in said.err
    assert memory.what_ran_out(error)[0] in said.err and not said.out


class Counted(nn.Module):
    """A network with batch-norm and a buffer of its own, that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, x):
        self.centre.lerp_(x.mean(dim=0), 0.1)
        return self.layers(x)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_tried_step_changes_nothing(name, steps_before):
    torch.manual_seed(0)
    network, x = Counted(), torch.randn(16, 4)
    parameters = list(network.parameters())
    optimizer = {
        "lars": lambda: LARS([{"params": parameters, "weight_decay": 0.1, "adapt": True}], 0.1),
        "sgd": lambda: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(parameters, 0.1),
    }[name]()
    seen = []

    def backward():
        loss = network(x).square().sum()
        loss.backward()
        seen.append(loss.item())

    for _ in range(steps_before):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    state = torch.get_rng_state()
    memory.try_step(backward, network, optimizer)
    assert torch.equal(torch.get_rng_state(), state) and len(seen) == steps_before + 2
    torch.testing.assert_close(
        (network.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0
    )
    assert all(p.grad is None for p in parameters)


def test_a_tried_step_takes_the_memory_of_the_optimizers_state_meanwhile(monkeypatch):
    network, taken = nn.Linear(3, 2), []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda p: taken.append(p.numel()) or empty_like(p))
    memory.try_step(lambda: None, network, torch.optim.AdamW(network.parameters()))
    assert sum(taken) == 2 * 8
    taken.clear()
    memory.try_step(lambda: None, network, torch.optim.SGD(network.parameters(), 0.1, momentum=0.9))
    assert sum(taken) == 8


def test_memory_of_the_process_is_known_and_a_cpu_has_none_to_spare():
    before = memory.peak_memory_mib(torch.device("cpu"))
    held = torch.ones(64 << 18)  # 64 MiB
    assert memory.peak_memory_mib(torch.device("cpu")) >= before
    assert memory.spare_bytes(torch.device("cpu")) == 0 and held.sum() > 0
    assert json.dumps(before)
