"""LARS, parameter groups (weight decay, adaptation), moving averages of weights, and the schedules
of learning rate and resolution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ffcv_ssl.config.settings import OptimConfig, ResolutionConfig

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float, without: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Two parameter groups: weights, and biases and norm layers (without decay and adaptation).

    The module's type and the number of dimensions decide. Names would miss norms in shortcuts.
    without: modules inside the model whose parameters are left out.
    """
    left_out = {id(parameter) for module in without for parameter in module.parameters()}
    weights: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in left_out:
                continue
            is_rest = isinstance(module, NORM_LAYERS) or parameter.ndim <= 1
            (rest if is_rest else weights).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "adapt": False},
    ]


@torch.no_grad()
def move_average_(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * module, for all parameters at once.

    Buffers do not change: a network in training mode computes its own batch statistics.
    """
    parameters: list[torch.Tensor] = list(module.parameters())
    torch._foreach_lerp_(list(average.parameters()), parameters, 1.0 - momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), without a host sync.

    u = g + wd p. In groups with `adapt`, u is multiplied by the trust ratio |p| / (|u| + 1e-8), or
    by 1 where a norm is 0.
    `lr_inside`: buf = m buf + lr u, p -= buf; else buf = m buf + u, p -= lr buf.
    `joint_norm=False` divides by |g| + wd |p| instead of |u|.
    """

    # GradScaler then hands `found_inf` to `step` instead of waiting for the device to read it
    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        lr_inside: bool = True,
        joint_norm: bool = True,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "adapt": True})
        self.momentum, self.trust = momentum, trust
        self.lr_inside, self.joint_norm = lr_inside, joint_norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; nothing changes where a GradScaler
        found one that is not finite. Gradients must be unscaled."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(parameters, group["lr"], group["weight_decay"], group["adapt"])

    def _step_group(self, parameters, lr, decay, adapt):
        gradients = [p.grad for p in parameters]
        updates = torch._foreach_add(gradients, parameters, alpha=decay)
        if adapt:
            ratios = self._trust_ratios(parameters, gradients, updates, decay)
            updates = torch._foreach_mul(updates, list(ratios.unbind()))
        for p in parameters:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        tensors = [*parameters, *buffers]
        overflow = getattr(self, "found_inf", None)
        before = [] if overflow is None else [tensor.clone() for tensor in tensors]
        torch._foreach_mul_(buffers, self.momentum)
        torch._foreach_add_(buffers, updates, alpha=lr if self.lr_inside else 1.0)
        torch._foreach_add_(parameters, buffers, alpha=-1.0 if self.lr_inside else -lr)
        for tensor, old in zip(tensors, before):
            tensor.copy_(torch.where(overflow != 0, old, tensor))

    def _trust_ratios(self, parameters, gradients, updates, decay):
        p_norm = torch.stack(torch._foreach_norm(parameters))
        if self.joint_norm:
            u_norm = torch.stack(torch._foreach_norm(updates))
        else:
            u_norm = torch.stack(torch._foreach_norm(gradients)) + decay * p_norm
        ratios = self.trust * p_norm / (u_norm + 1e-8)
        return torch.where((p_norm > 0) & (u_norm > 0), ratios, torch.ones_like(ratios))


def make_optimizer(
    config: OptimConfig,
    model: nn.Module,
    constant: dict[nn.Module, float] | None = None,
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer that an OptimConfig names, for a model's parameters; `set_lr` sets its rates.

    constant: {module in the model: its constant rate, as a multiple of the peak rate}. scaled:
    gradients are scaled (fp16). On CUDA, SGD and AdamW then use torch's fused kernels, which skip
    an overflow without waiting for the device.
    """
    fused = config.fused
    if fused is None and scaled and next(model.parameters()).is_cuda:
        fused = True
    constant = constant or {}
    groups = parameter_groups(model, config.weight_decay, without=constant)
    for module, multiple in constant.items():
        of_module = parameter_groups(module, config.weight_decay)
        groups += [{**group, "constant_lr": multiple} for group in of_module]
    if config.name == "lars":
        inside, joint = config.lars_lr == "inside", config.lars_norm == "joint"
        return LARS(groups, config.lr, config.momentum, lr_inside=inside, joint_norm=joint)
    if config.name == "sgd":
        nesterov = config.nesterov
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=nesterov, fused=fused)
    return torch.optim.AdamW(groups, config.lr, config.betas, fused=fused)


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the weight decay of all weights, but not of biases and norm layers."""
    for group in optimizer.param_groups:
        if group["adapt"]:
            group["weight_decay"] = weight_decay


def peak_lr(config: OptimConfig, batch_size: int) -> float:
    """The learning rate at the end of the warm-up, scaled by the batch size."""
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def set_lr(
    optimizer: torch.optim.Optimizer,
    step: int,
    config: OptimConfig,
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
) -> None:
    """Set each group's rate for update `step`: `lr_at`, or a constant multiple of the peak."""
    lr, peak = lr_at(step, config, batch_size, epochs, steps_per_epoch), peak_lr(config, batch_size)
    for group in optimizer.param_groups:
        group["lr"] = peak * group["constant_lr"] if "constant_lr" in group else lr


def lr_at(
    step: int, config: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int
) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then cosine, both by step."""
    peak = peak_lr(config, batch_size)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        start = config.warmup_start
        return peak * (start + (1 - start) * (step + 1) / warmup)
    progress = (step - warmup) / max(1, epochs * steps_per_epoch - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.end_ratio + (1 - config.end_ratio) * cosine)


def resolution_at(epoch: int, config: ResolutionConfig) -> int:
    """Side of the views in pixels in `epoch` (from 0): min, a linear ramp in steps of 32, max."""
    if epoch < config.start_ramp:
        return config.min
    if epoch >= config.end_ramp or config.min == config.max:
        return config.max
    share = (epoch - config.start_ramp) / (config.end_ramp - config.start_ramp)
    px = 32 * round((config.min + share * (config.max - config.min)) / 32)
    return min(max(px, config.min), config.max)
