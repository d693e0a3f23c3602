"""Numeric parts that losses share; all of them compute in float32 or more.

Shapes: B images per batch, D features, N rows, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ffcv_ssl.training.world import ALONE, World


def full_precision(z: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 as float32; losses are never computed in less."""
    return z if z.dtype == torch.float64 else z.float()


def unit_rows(z: torch.Tensor) -> torch.Tensor:
    """Rows (..., D) of length 1, in at least float32. A row of zeros stays, without a gradient."""
    z = full_precision(z)
    largest = z.detach().abs().amax(dim=-1, keepdim=True)  # rows of any size keep their direction
    return F.normalize(z / largest.masked_fill(largest == 0, math.inf), dim=-1)


def center(z: torch.Tensor, world: World = ALONE) -> torch.Tensor:
    """Features (B of this rank, D) minus their means over the batch of all ranks, in at least
    float32."""
    z = full_precision(z)
    # a row is subtracted first: the differences of nearly equal rows stay exact
    z = z - world.mean(z[0].detach())
    return z - world.mean(z.mean(dim=0), partial=True)


def mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of values (N,) where chosen (N,) bool is true; 0 where it never is."""
    return values.masked_fill(~chosen, 0).sum() / chosen.sum().clamp(min=1)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean of -log softmax(logits)[label] over rows with a label; logits (N, K), labels (N,), -1:
    none. Smoothing s: the target is 1 - s at the label, plus s / K everywhere."""
    logits, index = full_precision(logits), labels.clamp(min=0)[:, None]
    logits = logits - logits.detach().amax(dim=1, keepdim=True)
    of_label = logits.gather(1, index)[:, 0]
    others = logits.scatter(1, index, -math.inf).logsumexp(dim=1)
    losses = F.softplus(others - of_label)  # exact where it is small, too
    return mean_over(losses + label_smoothing * (of_label - logits.mean(dim=1)), labels >= 0)
