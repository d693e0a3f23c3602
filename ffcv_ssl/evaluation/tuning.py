"""Training a pretrained network on labels: what fine-tuning and transfer have in common.

A `Tuner` trains for a number of steps and hands control back after each step; its state is all that
an exact resume needs. `evaluate` measures each sample once, whatever the number of ranks.
"""

# B images per batch, N samples, K classes or labels, D features, H W pixels

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ffcv_ssl.config.settings import OptimConfig
from ffcv_ssl.errors import NonFiniteLoss
from ffcv_ssl.evaluation.mean_ap import mean_average_precision
from ffcv_ssl.loader import Loader
from ffcv_ssl.training.data_parallel import share_learning
from ffcv_ssl.training.meters import Averages, Counters, FiniteWatch, Interval, flops_per_image
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.optimizers import make_optimizer, parameter_groups
from ffcv_ssl.training.runtime import Tracer, autocast
from ffcv_ssl.training.world import World, send

TOP_K = 5
"""top5 counts the labels among the best five classes, or all classes where there are fewer."""


class Classifier(nn.Module):
    """A pretrained model up to one of its depths, and a linear classifier that begins at zero.

    depth: `backbone`, or `projector_k` for the features after the projector's k-th block, with its
    batch-norm and ReLU (Chen et al. 2020b, section 2); the last block has no ReLU, and batch-norm
    only where the projector's norm is `all`. Trains copies: the model itself is left alone.
    """

    def __init__(self, model: Model, depth: str, num_classes: int) -> None:
        super().__init__()
        num_blocks = list(model.widths).index(depth)  # the backbone comes first
        self.backbone = copy.deepcopy(model.backbone)
        self.projector = copy.deepcopy(model.projector[:num_blocks])
        self.classifier = nn.Linear(model.widths[depth], num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.requires_grad_(True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        features = self.backbone(images)
        for block in self.projector:
            features = block(features)
        return self.classifier(features)


class ClassTargets:
    """One class per sample: labels (N,) int64, -1: none; cross-entropy, top-1 and top-5."""

    metric = "top1"

    def __init__(self, labels: np.ndarray, num_classes: int, device: torch.device) -> None:
        self.labels, self.num_outputs = torch.as_tensor(labels, device=device), num_classes

    def loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean over images of -log softmax(logits)[label]; logits (B, K) float32, rows (B,)."""
        return F.cross_entropy(logits, self.labels[rows])

    def digest(self, logits: torch.Tensor) -> torch.Tensor:
        """What `measure` needs of logits (B, K): the best five classes (B, 5), best first."""
        return logits.topk(min(TOP_K, self.num_outputs), dim=1).indices

    def measure(self, digests: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
        """top1, top5, and the top-1 of each class (None where it has no image), in [0, 1]."""
        labels_on_device = self.labels[rows]
        is_correct = (digests == labels_on_device[:, None]).cpu().numpy()
        labels = labels_on_device.cpu().numpy()
        num_images = np.bincount(labels, minlength=self.num_outputs)
        num_correct = np.bincount(labels[is_correct[:, 0]], minlength=self.num_outputs)
        per_class = [int(c) / int(n) if n else None for c, n in zip(num_correct, num_images)]
        top1, top5 = float(is_correct[:, 0].mean()), float(is_correct.any(axis=1).mean())
        return {"top1": top1, "top5": top5, "per_class": per_class}


class MultiTargets:
    """Several labels per sample: (N, K), 1, 0 or -1 ("difficult": left out); binary cross-entropy
    and 11-point mean average precision."""

    metric = "map"

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self.labels, self.num_outputs = torch.as_tensor(labels, device=device), labels.shape[1]

    def loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy summed over an image's labels, mean over images."""
        labels = self.labels[rows]
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0).to(logits.dtype), reduction="none"
        )
        return losses.masked_fill(labels < 0, 0).sum(dim=1).mean()

    def digest(self, logits: torch.Tensor) -> torch.Tensor:
        """What `measure` needs of logits (B, K): the logits themselves."""
        return logits

    def measure(self, digests: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
        """map, and each label's average precision (None where no image has it), in [0, 1]."""
        mean, each = mean_average_precision(digests.cpu().numpy(), self.labels[rows].cpu().numpy())
        return {"map": mean, "per_class": [None if ap != ap else ap for ap in each]}


@torch.no_grad()
def evaluate(
    network: Classifier,
    loader: Loader,
    targets: ClassTargets | MultiTargets,
    world: World,
    precision: str,
    before_batch: Callable[[], None],
    path: Path,
) -> dict[str, Any]:
    """The metrics of a network in evaluation mode, the same on every rank.

    Each sample of `loader` (of clean views, in order) counts once. before_batch() is called before
    each batch and may raise to end the evaluation. Raises NonFiniteLoss, naming the folder `path`,
    for outputs that are not finite: finite weights may still be too large.
    """
    network.eval()
    world.broadcast_(network.buffers())  # the first rank's, which the checkpoint holds
    digests, rows, is_finite = [], [], torch.ones((), dtype=torch.bool, device=world.device)
    for batch in loader:
        before_batch()
        with autocast(precision, world.device):
            logits = network.forward(batch.view_0)  # forward: never compiled, as training may be
        is_finite &= torch.isfinite(logits).all()
        digests.append(targets.digest(logits.float()))
        valid_rows = batch.indices.masked_fill(~torch.as_tensor(batch.valid), -1)
        rows.append(send(valid_rows, world.device))
    if world.any(not is_finite)[0]:
        raise NonFiniteLoss(
            f"{path}: an output of the network is not finite in its evaluation, in {precision}; "
            "lower the learning rate or raise the precision"
        )
    all_digests, all_rows = world.gather(torch.cat(digests)), world.gather(torch.cat(rows))
    return targets.measure(all_digests[all_rows >= 0], all_rows[all_rows >= 0])


def make_tuning_optimizer(config: OptimConfig, network: Classifier) -> torch.optim.Optimizer:
    """The optimiser of a `Classifier`.

    LARS leaves the classifier without adaptation and decay, as SimCLRv2's program does: the trust
    ratio of weights that begin at zero would keep them there.
    """
    optimizer = make_optimizer(config, nn.ModuleList([network.backbone, network.projector]))
    decay = 0.0 if config.name == "lars" else config.weight_decay
    for group in parameter_groups(network.classifier, decay):
        optimizer.add_param_group({**group, "adapt": False})
    return optimizer


class Tuner:
    """Trains a `Classifier` on the batches of a loader, epoch after epoch.

    lr_of(step) gives the learning rate of each step. config: a TuningConfig, of which precision,
    system and the side of the views count.
    """

    def __init__(
        self,
        network: Classifier,
        loader: Loader,
        targets: ClassTargets | MultiTargets,
        optim: OptimConfig,
        lr_of: Callable[[int], float],
        config: Any,
        world: World,
        tracer: Tracer,
    ) -> None:
        self.tracer = tracer
        self.world, self.precision, self.lr_of = world, config.precision, lr_of
        self.loader, self.targets = loader, targets
        self.steps_per_epoch = len(loader)
        self.flops_per_image = flops_per_image(_OnViews(network), [config.data.resolution_px])
        self.network = network.to(world.device).to(memory_format=torch.channels_last)
        self.optimizer = make_tuning_optimizer(optim, self.network)
        self.shared = share_learning(self.network, world, config.system)
        self.done, self.averages = Counters(self.steps_per_epoch), Averages()
        self.interval, self.watch = Interval(world.device, [loader]), FiniteWatch(world.device)

    @property
    def step(self) -> int:
        """Batches trained on so far."""
        return self.done.step

    @property
    def lr(self) -> float:
        """The last step's learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def train(self, until: int) -> Iterator[None]:
        """Train up to step `until`: a generator that yields after each step before `until`."""
        self.network.train()
        self.interval.start()
        while self.step < until:
            if self.step % self.steps_per_epoch == 0:
                self.loader.set_epoch(self.step // self.steps_per_epoch)
            for batch in self.tracer.around(self.interval.timed(self.loader)):
                self._train_step(batch)
                if self.step == until:
                    return
                yield

    def _train_step(self, batch):
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_of(self.step)
        rows = send(batch.indices, self.world.device)
        with autocast(self.precision, self.world.device):
            logits = self.shared(batch.view_0)
        loss = self.targets.loss(logits.float(), rows)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.add_losses(loss, {}, torch.ones_like(loss))
        self.watch.see(loss, self.step + 1)
        self._count(len(batch.indices) * self.world.size)

    def _count(self, images):
        done = self.done
        done.step, done.updates = done.step + 1, done.updates + 1
        done.images, done.views = done.images + images, done.views + images
        done.flops += images * self.flops_per_image
        self.interval.images += images

    def check_finite(self, path: Path) -> None:
        """Raise NonFiniteLoss, naming the folder `path`, if a loss or a weight is not finite."""
        how, kept = f"lr {self.lr:.4g}, {self.precision}", "nothing of it was saved"
        self.watch.check(self.network.parameters(), self.step, path, how, kept)

    def record(self) -> dict[str, Any]:
        """What metrics hold of the steps since the last call; starts a new interval."""
        means, speed = self.averages.take(self.world), self.interval.take(self.world)
        return {**self.done.record(), "lr": self.lr, **means, **speed}

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from."""
        parts: dict[str, Any] = {
            "network": self.network,
            "optimizer": self.optimizer,
            "loader": self.loader,
        }
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "done": self.done.state_dict(), "averages": self.averages.over_ranks(self.world),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done.load_state_dict(state["done"])
        if self.step % self.steps_per_epoch:  # between epochs `train` begins the next one
            self.loader.load_state_dict(state["loader"])
        self.averages.load(state["averages"], self.world)


class _OnViews(nn.Module):
    """A network that takes a list of views and returns dicts, as `flops_per_image` expects."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, views):
        return [{"logits": self.network(view)} for view in views]
