"""Batch-norm over two ranks against torch's batch-norm on the whole batch."""

import copy

import pytest
import torch
from support.method_cases import run_ranks
from torch import nn

from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.methods import EMATeacher
from ffcv_ssl.training.data_parallel import is_batchnorm_synced, share_learning
from ffcv_ssl.training.gradient_cache import frozen_statistics
from ffcv_ssl.training.sync_batchnorm import SyncBatchNorm, convert
from ffcv_ssl.training.world import World

SHAPES = {"rows": (12, 5), "images": (8, 5, 3, 4), "channels last": (8, 5, 3, 4)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_norm(shape, dtype, affine=True):
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.double() if dtype == torch.float64 else norm


def make_rows(name, dtype):
    """Rows far from zero, which ranks see with different means, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(SHAPES[name], generator=generator).to(dtype) for _ in range(2))
    x = x * 2 + 5
    x[len(x) // 2 :] += 3
    if name == "channels last":
        x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    return x, gradient


def two_steps(norm, x, gradient):
    """Outputs, gradients and buffers after two steps in training and a pass in evaluation mode."""
    for _ in range(2):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(gradient)
    weights = {name: p.grad for name, p in norm.named_parameters()}
    buffers = {name: b.clone() for name, b in norm.named_buffers()}
    norm.eval()
    return {"y": y, "x": x.grad, "clean": norm(x), "dtype": y.dtype}, weights, buffers


CASES = [
    (name, dtype, affine) for name in SHAPES for dtype in TOLERANCES for affine in (True, False)
]


def of_a_rank(world):
    results = []
    for name, dtype, affine in CASES:
        holder = nn.Sequential(make_norm(SHAPES[name], dtype, affine))
        convert(holder, world)
        assert isinstance(holder[0], SyncBatchNorm)
        parts = [t.tensor_split(world.size)[world.rank] for t in make_rows(name, dtype)]
        found, weights, buffers = two_steps(holder[0], *parts)
        for gradient in weights.values():
            world.sum_(gradient)
        found["layout kept"] = found["y"].stride() == parts[0].stride()
        results.append((found, weights, buffers))
    return results


@pytest.mark.whole
def test_two_ranks_are_one_batch(tmp_path):
    ranks = run_ranks(of_a_rank, tmp_path)
    for number, (name, dtype, affine) in enumerate(CASES):
        norm = make_norm(SHAPES[name], dtype, affine)
        expected, weights, buffers = two_steps(norm, *make_rows(name, dtype))
        tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        for key in ("y", "x", "clean"):
            found = torch.cat([rank[number][0][key] for rank in ranks])
            torch.testing.assert_close(found, expected[key], **tolerance)
        assert all(rank[number][0]["layout kept"] for rank in ranks)
        for found, expected_parts in ((1, weights), (2, buffers)):
            for key, value in expected_parts.items():
                scale = 20 if dtype == torch.bfloat16 else 10  # sums over all rows
                torch.testing.assert_close(
                    ranks[0][number][found][key], value, rtol=tolerance["rtol"],
                    atol=scale * tolerance["atol"],
                )  # fmt: skip


def test_parameters_buffers_and_their_names_stay():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    before = dict(model.state_dict(keep_vars=True))
    convert(model, World())
    after = dict(model.state_dict(keep_vars=True))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert type(model[1][0]) is SyncBatchNorm
    x = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(x), twin(x))


def test_norms_without_running_statistics_are_refused():
    for norm in (nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match="expected running statistics with a momentum"):
            convert(nn.Sequential(norm), World())


def test_the_setting_decides_and_one_rank_has_nothing_to_share():
    several, one = World(rank=0, size=2), World()
    on_gpu = World(rank=0, size=2, device="cuda:0")
    assert [is_batchnorm_synced(s, several) for s in ("auto", "on", "off")] == [False, True, False]
    assert [is_batchnorm_synced(s, on_gpu) for s in ("auto", "on", "off")] == [True, True, False]
    assert not any(is_batchnorm_synced(s, one) for s in ("auto", "on", "off"))


class LearnerWithTeacher(nn.Module):
    """A small learner with batch-norm and a teacher, as methods have it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.method = nn.Module()
        self.method.teacher = EMATeacher(nn.Linear(2, 2), 0.9)

    def forward(self, x):
        return self.net(x)


def frozen_and_wrapped(world):
    torch.manual_seed(0)
    learner = LearnerWithTeacher()
    network = share_learning(learner, world, SystemConfig(sync_batchnorm="on"))
    norm = learner.net[1]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with torch.no_grad(), frozen_statistics(learner):
        kept_flag = norm.track_running_stats
        learner(torch.randn(4, 3, 5, 5))
    same = all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    network(torch.randn(4, 3, 5, 5)).sum().backward()
    return {
        "flag": kept_flag, "same": same, "synced": isinstance(norm, SyncBatchNorm),
        "broadcasts": network.broadcast_buffers, "views": network.gradient_as_bucket_view,
        "mean": norm.running_mean,
    }  # fmt: skip


@pytest.mark.whole
def test_wrapped_learners_share_statistics_and_broadcast_none(tmp_path):
    ranks = run_ranks(frozen_and_wrapped, tmp_path)
    for rank in ranks:
        assert rank["flag"] and rank["same"] and rank["synced"] and rank["views"]
        assert not rank["broadcasts"]
    assert torch.equal(ranks[0]["mean"], ranks[1]["mean"])
