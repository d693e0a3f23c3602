"""LARS, and which parameters an optimiser decays and adapts."""

from __future__ import annotations

import torch
from torch import nn

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(model, weight_decay):
    """Weights, and the rest (biases, norm layers) without decay and adaptation.

    By type of module and number of dimensions, never by name: names miss norms in shortcuts.
    """
    weights, rest = [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            is_rest = isinstance(module, NORM_LAYERS) or parameter.ndim <= 1
            (rest if is_rest else weights).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), without a host sync.

    u = g + wd p, in groups with `adapt` times trust |p| / (|u| + 1e-8), or 1 where a norm is 0.
    `lr_inside`: buf = m buf + lr u, p -= buf; else buf = m buf + u, p -= lr buf.
    `joint_norm=False` divides by |g| + wd |p| instead of |u|.
    """

    def __init__(self, groups, lr, momentum=0.9, trust=0.001, lr_inside=True, joint_norm=True):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "adapt": True})
        self.momentum, self.trust = momentum, trust
        self.lr_inside, self.joint_norm = lr_inside, joint_norm

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
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
        torch._foreach_mul_(buffers, self.momentum)
        torch._foreach_add_(buffers, updates, alpha=lr if self.lr_inside else 1.0)
        torch._foreach_add_(parameters, buffers, alpha=-1.0 if self.lr_inside else -lr)

    def _trust_ratios(self, parameters, gradients, updates, decay):
        p_norm = torch.stack(torch._foreach_norm(parameters))
        if self.joint_norm:
            u_norm = torch.stack(torch._foreach_norm(updates))
        else:
            u_norm = torch.stack(torch._foreach_norm(gradients)) + decay * p_norm
        ratios = self.trust * p_norm / (u_norm + 1e-8)
        return torch.where((p_norm > 0) & (u_norm > 0), ratios, torch.ones_like(ratios))
