"""LARS, decay and clipping, moving averages, and the schedules of rate and resolution."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.host_sync import NoHostSync
from torch import nn

import train
from ffcv_ssl.config import settings
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import runtime
from ffcv_ssl.training.optimizers import (
    LARS,
    lr_at,
    make_optimizer,
    move_average_,
    parameter_groups,
    resolution_at,
    set_lr,
)


def lars_by_hand(p, g, buf, lr, decay, adapt, lr_inside, joint_norm):
    """One step for one parameter, in NumPy float64, momentum 0.9, trust 0.001."""
    u = g + decay * p
    p_norm = np.linalg.norm(p)
    norm = np.linalg.norm(u) if joint_norm else np.linalg.norm(g) + decay * p_norm
    if adapt and p_norm > 0 and norm > 0:
        u = u * 0.001 * p_norm / (norm + 1e-8)
    if lr_inside:
        buf = 0.9 * buf + lr * u
        return p - buf, buf
    buf = 0.9 * buf + u
    return p - lr * buf, buf


@pytest.mark.parametrize("lr_inside", [True, False])
@pytest.mark.parametrize("joint_norm", [True, False])
def test_lars_follows_its_equation_in_each_variant(lr_inside, joint_norm):
    rng = np.random.default_rng(0)
    shapes = {True: [(3, 4), (2, 3, 3, 3)], False: [(5,)]}
    values = {adapt: [rng.normal(size=s) for s in group] for adapt, group in shapes.items()}
    values[True].append(np.zeros((2, 2)))  # a norm of 0: no adaptation, no division by it
    parameters = {
        adapt: [torch.nn.Parameter(torch.tensor(v)) for v in group]
        for adapt, group in values.items()
    }
    groups = [
        {"params": group, "weight_decay": 0.1 if adapt else 0.0, "adapt": adapt}
        for adapt, group in parameters.items()
    ]
    optimizer = LARS(groups, lr=1.0, lr_inside=lr_inside, joint_norm=joint_norm)
    buffers = {adapt: [np.zeros_like(v) for v in group] for adapt, group in values.items()}
    for lr in (0.5, 2.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for adapt, group in parameters.items():
            decay = 0.1 if adapt else 0.0
            for n, parameter in enumerate(group):
                gradient = rng.normal(size=parameter.shape)
                parameter.grad = torch.tensor(gradient)
                values[adapt][n], buffers[adapt][n] = lars_by_hand(
                    values[adapt][n], gradient, buffers[adapt][n], lr, decay, adapt, lr_inside,
                    joint_norm,
                )  # fmt: skip
        optimizer.step()
    for adapt, group in parameters.items():
        for parameter, value in zip(group, values[adapt]):
            np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-10, atol=1e-12)


def test_norm_layers_and_biases_are_neither_decayed_nor_adapted_wherever_they_are():
    model = train.Model(settings.ModelConfig(backbone="resnet18", projector="32-16"))
    weights, rest = parameter_groups(model, 0.1)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert {id(p) for p in weights["params"]} == {id(m.weight) for m in convolutions}
    assert id(model.backbone.layer2[0].downsample[1].weight) in {id(p) for p in rest["params"]}
    assert len(weights["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (weights["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert weights["adapt"] and not rest["adapt"]


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def with_gradients(network, size=1.0):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("rate", ["inside", "outside"])
@pytest.mark.parametrize("norm", ["joint", "separate"])
def test_lars_never_waits_for_the_device(rate, norm):
    network = with_gradients(small_network())
    before = copy.deepcopy(network)
    config = settings.OptimConfig(lars_lr=rate, lars_norm=norm, weight_decay=0.1)
    optimizer = make_optimizer(config, network)
    for _ in range(2):
        with NoHostSync():
            optimizer.step()
    for old, new in zip(before.parameters(), network.parameters()):
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], torch.nonzero]
)
def test_what_waits_for_the_device_is_noticed(waits):
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(3))


def test_moving_average_is_that_of_each_parameter_and_leaves_buffers_alone():
    average, network = small_network(), small_network()
    network[1].running_mean += 3
    before = copy.deepcopy(average.state_dict())
    move_average_(average, network, 0.9)
    parameters = dict(network.named_parameters())
    for name, value in average.state_dict().items():
        if name in parameters:
            expected = 0.9 * before[name].double() + 0.1 * parameters[name].detach().double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, before[name]), name
    move_average_(average, network, 1.0)
    assert not torch.equal(average[0].weight, network[0].weight)
    move_average_(average, network, 0.0)
    for name, parameter in average.named_parameters():
        assert torch.equal(parameter, parameters[name])


def update_once(network, clip_norm):
    """The trainer's update with gradients as they are, by SGD of rate 1; how the weights moved."""
    before = [parameter.detach().clone() for parameter in network.parameters()]
    config = SimpleNamespace(optim=settings.OptimConfig(clip_norm=clip_norm))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler, done = torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(updates=0)
    parts = {"config": config, "optimizer": optimizer, "scaler": scaler, "done": done}
    train.Trainer._update(SimpleNamespace(learner=network, **parts))
    assert done.updates == 1 and all(p.grad is None for p in network.parameters())
    return torch.cat([(b - p).flatten() for b, p in zip(before, network.parameters())]).detach()


def test_gradients_longer_than_clip_norm_over_all_parameters_are_scaled_to_it():
    network = small_network()
    whole = update_once(with_gradients(copy.deepcopy(network)), 0.0)
    assert whole.norm() > 2
    clipped = update_once(with_gradients(copy.deepcopy(network)), 2.0)
    torch.testing.assert_close(clipped, whole * 2 / whole.norm(), rtol=1e-4, atol=1e-5)
    shorter = update_once(with_gradients(copy.deepcopy(network)), whole.norm().item() * 1.1)
    assert torch.equal(shorter, whole)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_computes_the_same_up_to_rounding(name):
    config = settings.OptimConfig(name=name, lr=0.05, weight_decay=0.1)
    plain = small_network()
    fused = copy.deepcopy(plain)
    optimizers = [make_optimizer(config, plain), make_optimizer(replace(config, fused=True), fused)]
    assert [group["fused"] for optimizer in optimizers for group in optimizer.param_groups] == [
        None, None, True, True,
    ]  # fmt: skip
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    for step in range(5):
        for network, optimizer in zip((plain, fused), optimizers):
            with_gradients(network, 1.0 + step)
            optimizer.step()
    for ours, expected, before in zip(fused.parameters(), plain.parameters(), start):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(expected, before)


def test_lars_has_no_fused_form():
    with pytest.raises(UserError, match=r"got true with optim\.name lars"):
        settings.OptimConfig(fused=True)


def rate_at(step, batch_size=512, steps_per_epoch=5, **optim):
    return lr_at(step, settings.OptimConfig(**optim), batch_size, 100, steps_per_epoch)


def test_learning_rate_warms_up_by_step_then_follows_the_cosine_to_its_end():
    rates = [rate_at(step, lr=0.4, warmup_epochs=10, end_ratio=0.01) for step in range(500)]
    peak = 0.4 * 512 / 256
    assert rates[0] == pytest.approx(peak / 50)
    assert max(rates) == rates[49] == pytest.approx(peak)
    middle = 0.5 * (1 + 0.01) * peak
    assert rates[50 + 225] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(0.01 * peak, rel=0.01)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_warm_up_can_start_above_zero():
    first, last = (rate_at(s, lr=0.4, warmup_epochs=10, warmup_start=0.125) for s in (0, 49))
    assert first == pytest.approx(last * (0.125 + 0.875 / 50))


def test_learning_rate_scales_with_the_batch_as_asked():
    rates = {
        scaling: rate_at(0, lr=0.1, lr_scaling=scaling, warmup_epochs=0.0)
        for scaling in ("linear", "sqrt", "none")
    }
    assert rates == pytest.approx({"linear": 0.2, "sqrt": 0.1 * math.sqrt(512), "none": 0.1})


def test_resolution_ramps_from_min_to_max_in_steps_of_32():
    config = settings.ResolutionConfig(min=160, max=256, start_ramp=10, end_ramp=20)
    sizes = [resolution_at(epoch, config) for epoch in range(25)]
    assert sizes[:11] == [160] * 11 and sizes[20:] == [256] * 5
    assert set(sizes) == {160, 192, 224, 256} and sizes == sorted(sizes)
    fixed = settings.ResolutionConfig(min=40, max=40, start_ramp=0, end_ramp=9)
    assert {resolution_at(epoch, fixed) for epoch in range(10)} == {40}


def test_a_constant_rate_is_a_multiple_of_the_scaled_peak_and_the_others_follow_the_schedule():
    network = nn.ModuleDict({"encoder": small_network(), "predictor": small_network()})
    config = settings.OptimConfig(name="sgd", lr=0.1, warmup_epochs=2, weight_decay=0.1)
    optimizer = make_optimizer(config, network, {network["predictor"]: 10.0})
    constant = [group for group in optimizer.param_groups if "constant_lr" in group]
    others = [group for group in optimizer.param_groups if "constant_lr" not in group]
    ids = [{id(p) for group in part for p in group["params"]} for part in (constant, others)]
    assert ids == [{id(p) for p in network[n].parameters()} for n in ("predictor", "encoder")]
    for part in (constant, others):  # norm layers and biases are no different in either
        assert [group["weight_decay"] for group in part] == [0.1, 0.0]
        assert [group["adapt"] for group in part] == [True, False]
    for step in (0, 15, 20, 60, 99):
        set_lr(optimizer, step, config, 512, 10, 10)
        assert {group["lr"] for group in constant} == {10 * 0.1 * 2}
        assert {group["lr"] for group in others} == {lr_at(step, config, 512, 10, 10)}


@pytest.mark.parametrize("lr_inside", [True, False])
def test_lars_and_the_scaler_skip_an_overflow_without_reading_it(lr_inside):
    """As torch's scaler does with SGD, which reads the overflow on the host."""
    networks = [small_network()]
    networks.append(copy.deepcopy(networks[0]))
    lars = LARS(parameter_groups(networks[0], 0.1), lr=0.5, lr_inside=lr_inside)
    twin = LARS(parameter_groups(networks[1], 0.1), lr=0.5, lr_inside=lr_inside)
    scaler = runtime.LossScaler(torch.device("cpu"), enabled=True)
    skipped = []
    for step, overflows in enumerate([True, False, True, True, False]):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(networks[0].parameters(), networks[1].parameters()):
            other.grad = torch.randn(mine.shape, generator=generator)
            mine.grad = other.grad * scaler.get_scale()
        if overflows:
            next(networks[0].parameters()).grad.view(-1)[0] = float("inf")
        scaler.scale(torch.zeros(()))  # as in a step: it makes the scale
        with NoHostSync():
            scaler.unscale_(lars)
            scaler.step(lars)
            scaler.update()
        if not overflows:
            twin.step()
        skipped.append(scaler.take_skipped())
        for mine, other in zip(networks[0].parameters(), networks[1].parameters()):
            torch.testing.assert_close(mine, other)
    assert skipped == [1, 0, 1, 1, 0]


def test_a_disabled_scaler_skips_nothing():
    scaler, network = runtime.LossScaler(torch.device("cpu"), enabled=False), small_network()
    optimizer = torch.optim.SGD(with_gradients(network).parameters(), lr=1.0)
    scaler.step(optimizer)
    assert scaler.take_skipped() == 0
