"""Instance-wise SimCLR (Bordes et al. 2023, section 3.4).

python train.py --method instance_simclr --views.recipe instance --data.train A.beton
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ffcv_ssl.config.settings import SimCLRConfig
from ffcv_ssl.methods.base import Features, Loss, Method
from ffcv_ssl.methods.numeric import unit_rows


def instance_nt_xent(
    anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, temperature: float
) -> torch.Tensor:
    """A softmax over one positive and one negative (Bordes et al. 2023, section 3.4).

    l = -log(exp(sim(a, p)/t) / (exp(sim(a, p)/t) + exp(sim(a, n)/t))), mean over images. All
    (B, D): a crop, the same crop with noise, a small patch of the same image.
    """
    a, p, n = unit_rows(anchor), unit_rows(positive), unit_rows(negative)
    return F.softplus(((a * n).sum(-1) - (a * p).sum(-1)) / temperature).mean()


class InstanceSimCLR(Method):
    """A crop attracts itself with noise and repels a small patch of its own image."""

    group, Settings = "simclr", SimCLRConfig
    min_views = max_views = 3

    def loss(self, outputs: list[Features], labels: torch.Tensor | None) -> Loss:
        anchor, positive, negative = self.all_gather(outputs)
        return instance_nt_xent(anchor, positive, negative, self.settings.temperature), {}
