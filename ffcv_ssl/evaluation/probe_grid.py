"""Probes of one shape and many settings, trained at once: one batched network, one pass for all.

Guarantees: a member computes what it computes in a grid of one, up to the order of sums; a member
that diverges does not change the others and is never chosen.
"""

# G members of the grid, B images per batch, D features, H hidden units, K classes

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

BN_EPS, BN_MOMENTUM = 1e-5, 0.1

Scores = tuple[torch.Tensor, torch.Tensor]
"""(top-1, loss) of each member, (G,) float64 each; (-1, inf) for a member that is not finite."""


class GridProbe(nn.Module):
    """G classifiers (B, D) -> (G, B, K), linear or with hidden layers of batch-norm and ReLU.

    hidden: widths of the hidden layers. All members have the same initial weights: zero if linear,
    else as in torch's Linear, drawn from `generator`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_classes: int,
        num_members: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.hidden, self.num_classes, self.num_members = tuple(hidden), num_classes, num_members
        widths = [in_features, *hidden, num_classes]
        self.weights, self.scales, self.shifts = (nn.ParameterList() for _ in range(3))
        for fan_in, fan_out in itertools.pairwise(widths):
            weight = torch.zeros(fan_in, fan_out)
            if hidden:
                bound = 1 / math.sqrt(fan_in)
                weight.uniform_(-bound, bound, generator=generator)
            self.weights.append(weight.expand(num_members, -1, -1).clone())
        for layer, width in enumerate(hidden):
            self.scales.append(torch.ones(num_members, 1, width))
            self.shifts.append(torch.zeros(num_members, 1, width))
            self.register_buffer(f"mean_{layer}", torch.zeros(num_members, 1, width))
            self.register_buffer(f"var_{layer}", torch.ones(num_members, 1, width))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> logits (G, B, K)."""
        for layer in range(len(self.hidden)):
            x = torch.matmul(x, self.weights[layer])  # (G, B, H)
            x = F.relu(self._norm(x, layer) * self.scales[layer] + self.shifts[layer])
        return torch.matmul(x, self.weights[-1]) + self.bias

    def _norm(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        mean, var = getattr(self, f"mean_{layer}"), getattr(self, f"var_{layer}")
        if self.training:
            var_now, mean_now = torch.var_mean(x, dim=1, correction=0, keepdim=True)
            with torch.no_grad():
                unbiased = var_now * (x.shape[1] / max(1, x.shape[1] - 1))
                mean.lerp_(mean_now, BN_MOMENTUM)
                var.lerp_(unbiased, BN_MOMENTUM)
            mean, var = mean_now, var_now
        return (x - mean) * torch.rsqrt(var + BN_EPS)

    def member(self, index: int) -> GridProbe:
        """A copy of one member, as a grid of one member."""
        alone = GridProbe(self.weights[0].shape[1], self.hidden, self.num_classes, 1)
        state = {key: value[index : index + 1] for key, value in self.state_dict().items()}
        alone.load_state_dict(state)
        return alone.to(self.bias.device)


class GridSGD:
    """SGD with momentum; each member has its own learning rate and weight decay.

    v <- m v + g + wd p, p <- p - lr v, as torch's; only weight matrices decay. lrs, weight_decays:
    one number per member.
    """

    def __init__(
        self,
        probe: GridProbe,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        momentum: float,
    ) -> None:
        self.momentum, device = momentum, probe.bias.device
        self.lrs = torch.tensor(lrs, dtype=torch.float32, device=device).view(-1, 1, 1)
        decays = torch.tensor(weight_decays, dtype=torch.float32, device=device)
        self.weight_decays = decays.view(-1, 1, 1)
        self.parameters = list(probe.parameters())
        self.decaying = {id(weight) for weight in probe.weights}
        self.velocities = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Update with the learning rates times `share` (the schedule's), and forget gradients."""
        for p, velocity in zip(self.parameters, self.velocities):
            assert p.grad is not None
            velocity.mul_(self.momentum).add_(p.grad)
            if id(p) in self.decaying:
                velocity.add_(self.weight_decays * p)
            p.sub_(self.lrs * share * velocity)
            p.grad = None


def train_step(
    probe: GridProbe, optimizer: GridSGD, x: torch.Tensor, labels: torch.Tensor, share: float
) -> None:
    """One step on features (B, D) and labels (B,) in [0, K); the learning rates times `share`."""
    probe.train()
    losses = _losses(probe(x), labels)
    losses.mean(dim=1).sum().backward()  # members share nothing, so each gets its own gradient
    optimizer.step(share)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (G, B) of each member and row; logits (G, B, K), labels (B,)."""
    labels = labels.repeat(len(logits))
    losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return losses.view(len(logits), -1)


def cosine(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: from 1 down to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


class Totals:
    """Correct predictions and losses of all members, summed over labelled batches."""

    def __init__(self) -> None:
        self.num_correct = self.losses = torch.zeros(())
        self.num_rows = 0

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Logits (G, B, K) and labels (B,)."""
        num_correct = (logits.argmax(dim=2) == labels).sum(dim=1)
        losses = _losses(logits, labels).double().sum(dim=1)
        if self.num_rows:
            num_correct, losses = self.num_correct + num_correct, self.losses + losses
        self.num_correct, self.losses = num_correct, losses
        self.num_rows += len(labels)

    def means(self) -> Scores:
        """Of each member; (-1, inf) where the loss is not finite."""
        top1, loss = self.num_correct.double() / self.num_rows, self.losses / self.num_rows
        finite = loss.isfinite()
        return top1.masked_fill(~finite, -1), loss.masked_fill(~finite, math.inf)


def mean_scores(scores: Iterable[Scores]) -> Scores:
    """The means of several scores; (-1, inf) for a member that was not finite in any of them."""
    top1, loss = (torch.stack(values).mean(dim=0) for values in zip(*scores))
    return top1.masked_fill(~loss.isfinite(), -1), loss


def best_member(scores: Iterable[Scores]) -> int:
    """The member with the highest mean top-1 of several scores; of equal ones the lowest mean
    loss."""
    top1, loss = (values.tolist() for values in mean_scores(scores))
    return min(range(len(top1)), key=lambda index: (-top1[index], loss[index]))


class Selection:
    """The members' scores at their last and at their best epoch, and their weights at the best.

    A higher top-1 is better; with equal top-1 a lower loss; with equal losses the earlier epoch.
    """

    def __init__(self, probe: GridProbe) -> None:
        self.probe = probe
        self.best = {key: value.clone() for key, value in probe.state_dict().items()}
        unseen = torch.full((probe.num_members,), -2.0, dtype=torch.float64)  # below a diverged one
        unseen = unseen.to(probe.bias.device)
        self.last_scores = self.best_scores = (unseen, torch.full_like(unseen, math.inf))
        self.best_epochs = torch.zeros(probe.num_members, dtype=torch.int64)

    def see(self, totals: Totals, epoch: int) -> None:
        """Take note of the scores after `epoch` epochs."""
        self.last_scores = top1, loss = totals.means()
        best_top1, best_loss = self.best_scores
        better = (top1 > best_top1) | ((top1 == best_top1) & (loss < best_loss))
        self.best_scores = (
            torch.where(better, top1, best_top1), torch.where(better, loss, best_loss)
        )  # fmt: skip
        self.best_epochs[better.cpu()] = epoch
        for key, value in self.probe.state_dict().items():
            self.best[key][better] = value[better]

    def winner(self) -> tuple[int, int, float]:
        """(member, epoch, top-1) of the member that is best at its best epoch."""
        member = best_member([self.best_scores])
        return member, int(self.best_epochs[member]), self.best_scores[0][member].item()

    def probe_at_best(self, member: int) -> GridProbe:
        """A copy of one member as it was at its best epoch."""
        alone = self.probe.member(member)
        alone.load_state_dict({k: v[member : member + 1] for k, v in self.best.items()})
        return alone
