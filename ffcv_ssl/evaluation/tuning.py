"""Training a pretrained network on labels: what fine-tuning and transfer have in common.

A `Tuner` trains for a number of steps and hands control back after each one; its state is all that
an exact resume needs. `evaluate` measures, each sample once, whatever the number of ranks.
"""

# B images a batch, N samples, K classes or labels, D features, H W pixels

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ffcv_ssl.errors import NonFiniteLoss
from ffcv_ssl.evaluation.mean_ap import mean_average_precision
from ffcv_ssl.training.meters import Averages, Counters, FiniteWatch, Interval, flops_per_image
from ffcv_ssl.training.optimizers import make_optimizer, parameter_groups
from ffcv_ssl.training.world import share_learning


class Classifier(nn.Module):
    """A pretrained model up to one of its depths, and a linear classifier that begins at zero.

    layer 0: the backbone's features; k: those after the projector's k-th block, with its batch-norm
    and ReLU (Chen et al. 2020b, section 2); the last block has no ReLU, and batch-norm only where
    the projector's norm is `all`. Trains copies: the model itself is left alone.
    """

    def __init__(self, model, layer, num_classes):
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        self.projector = copy.deepcopy(model.projector[:layer])
        self.classifier = nn.Linear(list(model.widths.values())[layer], num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.requires_grad_(True)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K)."""
        features = self.backbone(images)
        for block in self.projector:
            features = block(features)
        return self.classifier(features)


class ClassTargets:
    """One class a sample: labels (N,) int64, -1: none; cross-entropy, top-1 and top-5."""

    metric = "top1"

    def __init__(self, labels, num_classes, device):
        self.labels, self.num_outputs = torch.as_tensor(labels, device=device), num_classes

    def loss(self, logits, rows):
        """Mean over images of -log softmax(logits)[label]; logits (B, K) float32, rows (B,)."""
        return F.cross_entropy(logits, self.labels[rows])

    def digest(self, logits):
        """What `measure` needs of logits (B, K): the best five classes (B, 5), best first."""
        return logits.topk(min(5, self.num_outputs), dim=1).indices

    def measure(self, digests, rows):
        """top1, top5, and the top-1 of each class (None where it has no image), in [0, 1]."""
        labels = self.labels[rows]
        hits = (digests == labels[:, None]).cpu().numpy()
        labels = labels.cpu().numpy()
        number = np.bincount(labels, minlength=self.num_outputs)
        right = np.bincount(labels[hits[:, 0]], minlength=self.num_outputs)
        per_class = [int(r) / int(n) if n else None for r, n in zip(right, number)]
        top1, top5 = float(hits[:, 0].mean()), float(hits.any(axis=1).mean())
        return {"top1": top1, "top5": top5, "per_class": per_class}


class MultiTargets:
    """Several labels a sample: (N, K), 1, 0 or -1 ("difficult": left out); binary cross-entropy and
    11-point mean average precision."""

    metric = "map"

    def __init__(self, labels, device):
        self.labels, self.num_outputs = torch.as_tensor(labels, device=device), labels.shape[1]

    def loss(self, logits, rows):
        """Binary cross-entropy summed over an image's labels, mean over images."""
        labels = self.labels[rows]
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0).to(logits.dtype), reduction="none"
        )
        return losses.masked_fill(labels < 0, 0).sum(dim=1).mean()

    def digest(self, logits):
        """What `measure` needs of logits (B, K): themselves."""
        return logits

    def measure(self, digests, rows):
        """map, and each label's average precision (None where no image has it), in [0, 1]."""
        mean, each = mean_average_precision(digests.cpu().numpy(), self.labels[rows].cpu().numpy())
        return {"map": mean, "per_class": [None if ap != ap else ap for ap in each]}


def autocast(precision, device):
    """The context of a forward pass in `bf16` or `fp32`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def evaluate(network, loader, targets, world, precision, before_batch, path):
    """What `targets.measure` says of a network in evaluation mode, on every rank alike.

    Each sample of `loader` (of clean views, not random) counts once. before_batch() is called
    before each batch and may raise to end the evaluation. Raises NonFiniteLoss, naming the folder
    `path`, for outputs that are not finite: weights that are may still be too large.
    """
    network.eval()
    world.broadcast_(network.buffers())  # the ones the checkpoint holds
    digests, rows, is_finite = [], [], torch.ones((), dtype=torch.bool, device=world.device)
    for batch in loader:
        before_batch()
        with autocast(precision, world.device):
            logits = network.forward(batch.view_0)  # not compiled, where training is
        is_finite &= torch.isfinite(logits).all()
        digests.append(targets.digest(logits.float()))
        rows.append(batch.indices.masked_fill(~torch.as_tensor(batch.valid), -1).to(world.device))
    if world.any(not is_finite)[0]:
        what = f"an output of the network is not finite when it is measured, in {precision}"
        raise NonFiniteLoss(f"{path}: {what}; lower the learning rate or raise the precision")
    digests, rows = world.gather(torch.cat(digests)), world.gather(torch.cat(rows))
    return targets.measure(digests[rows >= 0], rows[rows >= 0])


def make_tuning_optimizer(config, network):
    """The optimiser an OptimConfig names, of a `Classifier`.

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

    optim: an OptimConfig; lr_of(step) gives the rate of each step. config: a run's settings, of
    which precision, system and the side of the views count.
    """

    def __init__(self, network, loader, targets, optim, lr_of, config, world):
        self.world, self.precision, self.lr_of = world, config.precision, lr_of
        self.loader, self.targets = loader, targets
        self.steps_per_epoch = len(loader)
        self.flops_per_image = flops_per_image(_AsViews(network), [config.data.resolution_px])
        self.network = network.to(world.device, memory_format=torch.channels_last)
        self.optimizer = make_tuning_optimizer(optim, self.network)
        self.shared = share_learning(self.network, world, compiled=config.system.compile)
        self.done, self.averages = Counters(self.steps_per_epoch), Averages()
        self.interval, self.watch = Interval(), FiniteWatch(world.device)

    @property
    def step(self):
        """Batches trained on so far."""
        return self.done.step

    @property
    def lr(self):
        """The last step's rate."""
        return self.optimizer.param_groups[0]["lr"]

    def train(self, until):
        """Train up to step `until`, a generator that yields after each step before that."""
        self.network.train()
        self.interval.start()
        while self.step < until:
            if self.step % self.steps_per_epoch == 0:
                self.loader.set_epoch(self.step // self.steps_per_epoch)
            for batch in self.interval.timed(self.loader):
                self._train_step(batch)
                if self.step == until:
                    return
                yield

    def _train_step(self, batch):
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_of(self.step)
        with autocast(self.precision, self.world.device):
            logits = self.shared(batch.view_0)
        loss = self.targets.loss(logits.float(), batch.indices.to(self.world.device))
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

    def check_finite(self, path):
        """Raise NonFiniteLoss, naming the folder `path`, if a loss or a weight is not finite."""
        how, kept = f"lr {self.lr:.4g}, {self.precision}", "nothing of it was saved"
        self.watch.check(self.network.parameters(), self.step, path, how, kept)

    def record(self):
        """What a log line says of the steps since the last one; starts a new interval."""
        means, (rate, wait) = self.averages.take(self.world), self.interval.take()
        speed = {"train/images_per_s": rate, "train/data_wait": wait}
        return {**self.done.record(), "lr": self.lr, **means, **speed}

    def state_dict(self):
        """All that training goes on from."""
        parts = {"network": self.network, "optimizer": self.optimizer, "loader": self.loader}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "done": self.done.state_dict(), "averages": self.averages.over_ranks(self.world),
        }  # fmt: skip

    def load_state_dict(self, state):
        """Undo to `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done.load_state_dict(state["done"])
        if self.step % self.steps_per_epoch:  # between epochs `train` begins the next one
            self.loader.load_state_dict(state["loader"])
        device, is_first = self.world.device, self.world.is_first  # the sums were of all ranks
        self.averages.sums = {k: v.to(device) * is_first for k, v in state["averages"].items()}

    def close(self):
        """End the loader's threads."""
        self.loader.close()


class _AsViews(nn.Module):
    """A network as `flops_per_image` wants one."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, views):
        return [{"logits": self.network(view)} for view in views]
