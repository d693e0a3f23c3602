"""Batch-norm over the rows of all ranks, without waiting for the device.

torch's SyncBatchNorm allows ranks with different numbers of rows. It filters empty ranks with
boolean masks, whose size the host must know, so it waits for the device three times per layer. Here
all ranks have equal shapes, as the trainer gives them, and nothing has to be masked. On CUDA the
work is done by torch's own kernels for this layer; on a CPU by plain torch operations.

Shapes: x (N, C, ...), C channels, M rows of a rank: all numbers of a channel, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ffcv_ssl.training.world import World


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch-norm with the statistics of all ranks in training mode; x has one shape on all ranks.

    Its parameters, buffers and their names are those of nn.BatchNorm1d and nn.BatchNorm2d.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, world: World) -> None:
        if norm.momentum is None or not norm.track_running_stats:
            raise ValueError("SyncBatchNorm: expected running statistics with a momentum")
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training
        self.num_ranks, self.gathers_into_tensor = world.size, world.gathers_into_tensor

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"SyncBatchNorm: got {x.dim()} dimensions, expected 2 or more")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) -> the same shape and dtype."""
        if not self.training or self.num_ranks == 1:
            return super().forward(x)
        self._check_input_dim(x)
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr,operator]
        running = (self.running_mean, self.running_var, self.momentum)
        ranks = (self.num_ranks, self.gathers_into_tensor)
        return _Normalize.apply(x, self.weight, self.bias, *running, self.eps, *ranks)


def convert(module: nn.Module, world: World) -> None:
    """Replace each nn.BatchNorm below `module` by a SyncBatchNorm with the same parameters."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, SyncBatchNorm(child, world))
        else:
            convert(child, world)


class _Normalize(torch.autograd.Function):
    """y = weight (x - mean) / sqrt(var + eps) + bias, with the biased variance over all ranks.

    Gradient (Ioffe and Szegedy 2015): with x^ the normalised x, g = dL/dy, and means over the rows
    of all ranks, dL/dx = weight / sqrt(var + eps) (g - mean(g) - x^ mean(g x^)). The gradients of
    weight and bias are this rank's: ranks average them later, like all others.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, num_ranks, joined):
        kernels = _CudaKernels if x.is_cuda else _PlainKernels
        x = _dense(x)
        num_rows = x.numel() // x.shape[1]
        gathered = _all_gather(torch.cat(kernels.statistics(x, eps)), num_ranks, joined)
        running = (running_mean, running_var, momentum)
        mean, inverse = kernels.combine(x, *gathered.chunk(2, dim=1), running, eps, num_rows)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.kernels, ctx.num_ranks = kernels, num_ranks
        return kernels.normalize(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = _dense(gradient)
        sum_g, sum_g_x, *gradients = ctx.kernels.reduce(gradient, x, weight, mean, inverse)
        sums = torch.cat([sum_g, sum_g_x])
        dist.all_reduce(sums)
        counts = (ctx.num_ranks, x.numel() // x.shape[1])
        x_gradient = ctx.kernels.input_gradient(
            gradient, x, weight, mean, inverse, *sums.chunk(2), counts
        )
        return x_gradient, *gradients, None, None, None, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x without gaps, in the channels-last format if it has that one."""
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()


def _all_gather(tensor: torch.Tensor, num_ranks: int, joined: bool) -> torch.Tensor:
    """(D,) of each rank -> (R, D). joined: the backend can gather into one tensor."""
    if joined:
        gathered = tensor.new_empty(num_ranks * len(tensor))
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(num_ranks, -1)
    parts = [torch.empty_like(tensor) for _ in range(num_ranks)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


class _CudaKernels:
    """torch's CUDA kernels for synchronised batch-norm; statistics are float32."""

    @staticmethod
    def statistics(x, eps):
        """Mean (C,) and 1 / sqrt(var + eps) (C,) of this rank."""
        return torch.batch_norm_stats(x, eps)

    @staticmethod
    def combine(x, means, inverses, running, eps, num_rows):
        """The same two of all ranks; updates the running statistics."""
        counts = torch.full((len(means),), num_rows, dtype=means.dtype, device=means.device)
        means, inverses = means.contiguous(), inverses.contiguous()
        return torch.batch_norm_gather_stats_with_counts(x, means, inverses, *running, eps, counts)

    @staticmethod
    def normalize(x, weight, bias, mean, inverse, eps):
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def reduce(gradient, x, weight, mean, inverse):
        """Sums of g and of g (x - mean), and the gradients of weight and bias."""
        needed = (True, weight is not None, weight is not None)
        return torch.batch_norm_backward_reduce(gradient, x, mean, inverse, weight, *needed)

    @staticmethod
    def input_gradient(gradient, x, weight, mean, inverse, sum_g, sum_g_x, counts):
        num_ranks, num_rows = counts
        of_ranks = torch.full((num_ranks,), num_rows, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse, weight, sum_g, sum_g_x, of_ranks
        )


class _PlainKernels:
    """The same in plain torch operations; statistics are float32, or float64 for float64."""

    @staticmethod
    def statistics(x, eps):
        """Mean (C,) and biased variance (C,) of this rank."""
        rows = _as_rows(x)
        mean = rows.mean(dim=1)
        return mean, (rows - mean[:, None]).square().mean(dim=1)

    @staticmethod
    def combine(x, means, variances, running, eps, num_rows):
        running_mean, running_var, momentum = running
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        total = len(means) * num_rows
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = variance * (total / max(1, total - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def normalize(x, weight, bias, mean, inverse, eps):
        scale = inverse if weight is None else inverse * weight
        y = (x.to(scale.dtype) - _over(x, mean)) * _over(x, scale)
        return (y if bias is None else y + _over(x, bias)).to(x.dtype)

    @staticmethod
    def reduce(gradient, x, weight, mean, inverse):
        rows, g = _as_rows(x), _as_rows(gradient)
        sum_g, sum_g_x = g.sum(dim=1), (g * (rows - mean[:, None])).sum(dim=1)
        if weight is None:
            return sum_g, sum_g_x, None, None
        gradients = (sum_g_x * inverse).to(weight.dtype), sum_g.to(weight.dtype)
        return sum_g, sum_g_x, *gradients

    @staticmethod
    def input_gradient(gradient, x, weight, mean, inverse, sum_g, sum_g_x, counts):
        num_ranks, num_rows = counts
        sum_g, sum_g_x = sum_g / (num_ranks * num_rows), sum_g_x / (num_ranks * num_rows)
        scale = inverse if weight is None else inverse * weight
        centered = x.to(scale.dtype) - _over(x, mean)
        slope = inverse.square() * sum_g_x
        g = gradient.to(scale.dtype) - _over(x, sum_g) - centered * _over(x, slope)
        return (g * _over(x, scale)).to(x.dtype)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (C, M), at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(0, 1).flatten(1).to(wide)


def _over(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(C,) in a shape that broadcasts over x."""
    return values.view(-1, *(1,) * (x.dim() - 2))
