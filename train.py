"""Self-supervised pretraining of an image encoder, in one file.

    python train.py --config configs/imagenette_cpu.yaml
    python train.py --config configs/simclr.yaml --out runs/a --data.train A.beton --optim.lr 0.5
    python train.py --config configs/simclr.yaml --method byol --views.view_0.blur_prob 0
    torchrun --nproc_per_node 8 --max_restarts 3 train.py --config configs/simclr.yaml
    python train.py --config configs/simclr.yaml --slurm.partition gpu --slurm.gpus_per_node 8

One forward pass gives the features of every view; the method's loss trains backbone and projector,
perhaps with a loss on labelled images of their own, and linear probes at every depth train along on
the same features, detached. The run's folder holds `config.yaml`, `metrics.jsonl`, `checkpoint.pt`,
TensorBoard events, and at the end `report.png` and `backbone.safetensors`. The same command again
goes on exactly where the run stopped, also in the middle of an epoch and on another number of
devices. The last line on stdout is JSON. Exit codes: 0 finished (also if it already was), 75
interrupted with a checkpoint, 2 a user's mistake, 1 a loss that is not finite.
"""
# Shapes: B images a batch over all ranks, V views, D features, H W pixels, N rows, K classes.

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn

from ffcv_ssl import OrderOption
from ffcv_ssl.config import settings
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.files import hold_folder
from ffcv_ssl.jobs import slurm
from ffcv_ssl.training import checkpoint, command
from ffcv_ssl.training.gradient_cache import (
    backward_in_parts,
    check_parts,
    frozen_statistics,
    split_views,
)
from ffcv_ssl.training.labelled_stream import LabelledStream
from ffcv_ssl.training.meters import (
    Averages,
    Counters,
    FiniteWatch,
    Interval,
    flops_per_image,
    step_flops,
)
from ffcv_ssl.training.models import Model, make_mlp
from ffcv_ssl.training.online_evaluation import labels_of, open_evaluation
from ffcv_ssl.training.optimizers import make_optimizer, move_average_, resolution_at, set_lr
from ffcv_ssl.training.probes import Probes, ProbeTrainer
from ffcv_ssl.training.run_data import make_loader, open_dataset, rank_share, set_resolution
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT, RunFolder
from ffcv_ssl.training.world import World, share_learning
from pipelines import Views, build

AGREE_EVERY = 8  # steps between two moments when several ranks agree on whether to save or stop


# ---- Configuration: YAML and dotted overrides; the groups are in ffcv_ssl/config/settings.py -----


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str | None = None
    """The run's folder; null: runs/NAME for configs/NAME.yaml."""
    seed: NonNegativeInt = 0
    """Decides weights, order and views."""
    epochs: PositiveInt = 100
    """Passes over the training file; over the labels where they train alone."""
    method: Literal["simclr", "vicreg", "barlow", "byol", "supervised", "instance_simclr"] = (
        "simclr"
    )
    """What the loss is; `labelled` adds one on labelled images to it."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 are autocast; fp16 scales its gradients. Losses are float32 in any case."""
    channels_last: bool = True
    """Channels-last memory format, faster for convolutions."""
    data: settings.DataConfig = field(default_factory=settings.DataConfig)
    views: Views = field(default_factory=Views)
    resolution: settings.ResolutionConfig = field(default_factory=settings.ResolutionConfig)
    model: settings.ModelConfig = field(default_factory=settings.ModelConfig)
    simclr: settings.SimCLRConfig = field(default_factory=settings.SimCLRConfig)
    vicreg: settings.VICRegConfig = field(default_factory=settings.VICRegConfig)
    barlow: settings.BarlowConfig = field(default_factory=settings.BarlowConfig)
    byol: settings.BYOLConfig = field(default_factory=settings.BYOLConfig)
    supervised: settings.SupervisedConfig = field(default_factory=settings.SupervisedConfig)
    labelled: settings.LabelledConfig = field(default_factory=settings.LabelledConfig)
    optim: settings.OptimConfig = field(default_factory=settings.OptimConfig)
    probes: settings.ProbeConfig = field(default_factory=settings.ProbeConfig)
    evaluation: settings.EvaluationConfig = field(default_factory=settings.EvaluationConfig)
    checkpoint: settings.CheckpointConfig = field(default_factory=settings.CheckpointConfig)
    log: settings.LogConfig = field(default_factory=settings.LogConfig)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)
    slurm: slurm.SlurmConfig = field(default_factory=slurm.SlurmConfig)

    @property
    def own_batch_size(self):
        """Images a step of the method's own loss."""
        other = self.labelled.unsupervised_batch_size
        return self.data.batch_size if other is None else other

    @property
    def labelled_batch_size(self):
        """Images a step of the labelled stream, while there is one."""
        settings = self.labelled
        return (settings.loss != "none") * settings.classes_per_batch * settings.images_per_class


def check_config(config):
    """Raise ValueError for settings that do not go together, as the parser cannot see them."""
    if config.optim.warmup_epochs >= config.epochs:
        got = f"got {config.optim.warmup_epochs}"
        raise UserError(f"optim.warmup_epochs: {got}, expected less than epochs ({config.epochs})")
    make_optimizer(config.optim, nn.Linear(1, 1))  # torch has its own limits
    views, method = config.views.resolve(), METHODS[config.method]
    if config.own_batch_size and not method.fewest_views <= len(views) <= method.most_views:
        expected = f"{method.fewest_views} to {method.most_views}"
        raise UserError(f"views: got {len(views)}, expected {expected} for {config.method}")
    if config.labelled.num_views > len(views):
        got = f"got {config.labelled.num_views}, expected at most the run's {len(views)} views"
        raise UserError(f"labelled.num_views: {got}")
    if config.resolution.min < config.resolution.max:
        for name, view in views.items():
            if view.crop != "random":
                raise UserError(f"views.{name}.crop: a {view.crop} crop has one size: no ramp")


# A resumed run may differ in these and in nothing else: they do not change what is learnt. (Which
# labels were chosen is in the state of the labelled stream.)
FREE_KEYS = ("out", "data.train", "data.val", "data.num_workers", "data.batches_ahead")
FREE_GROUPS = ("checkpoint.", "log.", "system.", "slurm.", "data.os_cache", "labelled.labels.file")


class Learner(nn.Module):
    """All that gradients reach, in one pass: the model and the heads of its losses."""

    def __init__(self, model, method, classifier):
        super().__init__()
        self.model, self.method, self.classifier = model, method, classifier

    def forward(self, views, num_own):
        """A list of (B, 3, H, W), the method's own views first -> their dicts of features.

        `embedding` is the last depth's; heads add what their losses need.
        """
        outputs = self.model(views)
        for features in outputs:
            features["embedding"] = features[self.model.last]
        self.method.add_heads(outputs[:num_own])
        if self.classifier is not None:
            for features in outputs[num_own:]:
                features["logits"] = self.classifier(features["backbone"])
        return outputs


# ---- Losses: pure functions of float32 embeddings of the global batch ----------------------------


def full_precision(z):
    """bfloat16 and float16 as float32; losses are never computed in less."""
    return z if z.dtype == torch.float64 else z.float()


def unit_rows(z):
    """Rows of length 1, of any float type, at least float32; a row of zeros stays, and gets no
    gradient. Scaled first, so that rows of any size keep their direction."""
    z = full_precision(z)
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    return F.normalize(z / largest.masked_fill(largest == 0, math.inf), dim=-1)


def contrast(embeddings, groups, temperature):
    """For every row the terms of a contrastive loss: rows of its group against all others.

    embeddings (N, D); groups (N,) int64, -1: takes no part. Returns (N,) each: the loss with the
    sum over positives inside the logarithm, how much larger it is with their mean outside, that
    mean of sim/t, and whether the row is an anchor: one with a positive.
    """
    z = unit_rows(embeddings)
    logits = z @ z.T / temperature  # (N, N)
    takes_part = groups >= 0
    alike = (groups[:, None] == groups) & takes_part
    others = ~alike & takes_part
    alike.fill_diagonal_(False)
    number = alike.sum(dim=1)
    positives = logits.masked_fill(~alike, -math.inf).logsumexp(dim=1).masked_fill(number == 0, 0)
    negatives = logits.masked_fill(~others, -math.inf).logsumexp(dim=1)
    mean = logits.masked_fill(~alike, 0).sum(dim=1) / number.clamp(min=1)
    inside = F.softplus(negatives - positives)  # exact where it is small, too
    outside = (positives - mean).masked_fill(number < 2, 0)  # of one: 0, and its gradient
    return inside, outside, mean, number > 0


def mean_over(values, chosen):
    """Mean of values (N,) where chosen (N,) bool; 0 where none is."""
    return values.masked_fill(~chosen, 0).sum() / chosen.sum().clamp(min=1)


def suncet(embeddings, labels, temperature):
    """Supervised noise contrastive estimation (Assran et al. 2021, eq. 2).

    l(i) = -log(sum_{j != i, same class} exp(sim(i, j)/t) / sum_{k != i} exp(sim(i, k)/t)), the mean
    over the anchors that have a positive. embeddings (N, D); labels (N,), -1: takes no part.
    """
    inside, _, _, is_anchor = contrast(embeddings, labels, temperature)
    return mean_over(inside, is_anchor)


def supcon(embeddings, labels, temperature):
    """Supervised contrastive loss with the sum over positives outside the logarithm (Khosla et al.
    2020, eq. 2): l(i) = -mean_j log(exp(sim(i, j)/t) / sum_{k != i} exp(sim(i, k)/t)).

    Inputs and mean over anchors as in `suncet`, of which it is the upper bound.
    """
    inside, outside, _, is_anchor = contrast(embeddings, labels, temperature)
    return mean_over(inside + outside, is_anchor)


def nt_xent(embeddings, temperature):
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al. 2020, eq. 1).

    l(i, j) = -sim(i, j)/t + log sum_{k != i} exp(sim(i, k)/t), the mean over all VB anchors i and
    the V - 1 other views j of each one's image: `supcon` with each image a class of its own.
    embeddings: (V, B, D), V >= 2. Returns the loss and its two terms, which add up to it.
    """
    num_views, batch, _ = embeddings.shape
    images = torch.arange(batch, device=embeddings.device).repeat(num_views)
    inside, outside, mean, _ = contrast(embeddings.flatten(0, 1), images, temperature)
    loss = (inside + outside).mean()
    alignment = -mean.detach().mean()
    return loss, {"alignment": alignment, "uniformity": loss.detach() - alignment}


def instance_nt_xent(anchor, positive, negative, temperature):
    """Instance-wise SimCLR (Bordes et al. 2023, 3.4): a softmax over one positive and one negative.

    l = -log(exp(sim(a, p)/t) / (exp(sim(a, p)/t) + exp(sim(a, n)/t))), mean over images. All
    (B, D): a crop, the same crop with noise, a small patch of the same image.
    """
    a, p, n = unit_rows(anchor), unit_rows(positive), unit_rows(negative)
    return F.softplus(((a * n).sum(-1) - (a * p).sum(-1)) / temperature).mean()


def centre(z):
    """Features minus their means, in full precision; first minus a row, which changes no result:
    the differences of nearly equal rows stay exact."""
    z = full_precision(z) - z[0].detach()
    return z - z.mean(dim=0)


def vicreg(z, z2, invariance=25.0, variance=25.0, covariance=1.0):
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, eq. 1 to 6). z, z2 (B, D).

    25 mean (z - z2)^2 + 25 mean_d relu(1 - sqrt(var + 1e-4)), averaged over both views, + the sum
    of squared off-diagonal covariances / D, summed over both. Unbiased variances and covariances.
    """
    z, z2 = full_precision(z), full_precision(z2)
    terms = {"invariance": F.mse_loss(z, z2), "variance": 0.0, "covariance": 0.0}
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    for view in (centre(z), centre(z2)):
        products = view.T @ view / max(1, len(z) - 1)  # (D, D)
        spread = (products.diagonal() + 1e-4).sqrt()  # (D,)
        terms["variance"] = terms["variance"] + F.relu(1 - spread).mean() / 2
        products = products.masked_fill(itself, 0)
        terms["covariance"] = terms["covariance"] + products.square().sum() / z.shape[1]
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return sum(weights[name] * term for name, term in terms.items()), terms


def barlow_twins(z, z2, off_diagonal=0.0025):
    """Barlow Twins (Zbontar et al. 2021, eq. 1): the cross-correlation becomes the identity.

    c = bn(z)^T bn(z2) / B, loss = sum (c_ii - 1)^2 + lambda sum_{i != j} c_ij^2. z, z2 (B, D);
    bn without affine parameters, biased variance, eps 1e-5.
    """
    normed = [v / (v.square().mean(dim=0) + 1e-5).sqrt() for v in (centre(z), centre(z2))]
    c = normed[0].T @ normed[1] / len(z)  # (D, D)
    on = (c.diagonal() - 1).square().sum()
    off = c.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), 0).square().sum()
    return on + off_diagonal * off, {"on_diagonal": on, "off_diagonal": off}


def byol(predictions, targets):
    """BYOL's regression (Grill et al. 2020, eq. 2): 2 - 2 cos(prediction of one view, target of the
    other), the mean over images, the sum over both directions. (V, B, D) each, V >= 2; more views
    than two average over the pairs. Targets get no gradient.
    """
    p, t = unit_rows(predictions), unit_rows(targets.detach())
    num_views = len(p)
    pairs = [(v, w) for v in range(num_views) for w in range(num_views) if v != w]
    return 2 * sum((p[v] - t[w]).square().sum(-1).mean() for v, w in pairs) / len(pairs)


def cross_entropy(logits, labels, label_smoothing=0.0):
    """Mean of -log softmax(logits)[label] over rows with a label; logits (N, K), labels (N,).
    Smoothing s: the target is 1 - s at the label, plus s / K everywhere."""
    logits, index = full_precision(logits), labels.clamp(min=0)[:, None]
    logits = logits - logits.detach().amax(dim=1, keepdim=True)
    own = logits.gather(1, index)[:, 0]
    others = logits.scatter(1, index, -math.inf).logsumexp(dim=1)
    losses = F.softplus(others - own)  # exact where it is small, too
    return mean_over(losses + label_smoothing * (own - logits.mean(dim=1)), labels >= 0)


# ---- Methods: what a step does with the model's outputs ------------------------------------------


class Method(nn.Module, ABC):
    """A loss with the heads and teachers it needs. Subclasses override what differs.

    `loss` sees the outputs of this rank's views and returns the loss of the global batch, gathered
    by `together`, and its named terms. It runs in float32, outside autocast."""

    fewest_views, most_views = 2, 2

    def __init__(self, config, model, num_classes, world):
        super().__init__()
        self.config, self.world = config, world

    def add_heads(self, outputs):
        """Add to the features of each own view what heads compute; part of the forward pass."""

    def targets(self, views):
        """For each own view a dict of features that get no gradient."""
        return [{} for _ in views]

    def extra_flops(self, sides_px):
        """Operations an image beyond those of the learner."""
        return 0

    def constant_lr(self):
        """{module: its learning rate, constant, as a multiple of the peak of the others}."""
        return {}

    @abstractmethod
    def loss(self, outputs, labels):
        """Outputs of V own views, labels (B of this rank,) -> (scalar loss, {term: scalar})."""

    def after_update(self, model, progress):
        """Called after each step; progress in [0, 1] is the share of the run that is done."""

    def together(self, outputs, name="embedding"):
        """(V, B, D): one kind of feature of all views, of the global batch."""
        return self.world.gather(torch.stack([features[name] for features in outputs]), dim=1)


class SimCLR(Method):
    """Views of one image attract, all other images of the batch repel."""

    most_views = 12

    def loss(self, outputs, labels):
        return nt_xent(self.together(outputs), self.config.simclr.temperature)


class InstanceSimCLR(Method):
    """A crop attracts itself with noise and repels a small patch of its own image."""

    fewest_views = most_views = 3

    def loss(self, outputs, labels):
        z = self.together(outputs)
        return instance_nt_xent(*z, self.config.simclr.temperature), {}


class VICReg(Method):
    """Embeddings of an image agree, spread, and do not repeat one another's features."""

    def loss(self, outputs, labels):
        weigh = self.config.vicreg
        weights = (weigh.invariance, weigh.variance, weigh.covariance)
        return vicreg(*self.together(outputs), *weights)


class BarlowTwins(Method):
    """Features correlate with themselves across views, and with no others."""

    def loss(self, outputs, labels):
        return barlow_twins(*self.together(outputs), self.config.barlow.off_diagonal)


class BYOL(Method):
    """A predictor on one view finds the embedding that a slow teacher gives the other.

    The teacher averages weights only; its batch-norm uses the statistics of its own batches.
    """

    most_views = 12

    def __init__(self, config, model, num_classes, world):
        super().__init__(config, model, num_classes, world)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        width = model.widths[model.last]
        widths = config.model.projector or str(width)
        # no batch-norm at its end, which makes training unstable (Chen and He 2021, 4.4)
        norm = "none" if config.model.projector_norm == "none" else "hidden"
        self.predictor = nn.Sequential(*make_mlp(widths, width, norm))

    def add_heads(self, outputs):
        rows = [len(features["embedding"]) for features in outputs]
        if rows:
            joined = self.predictor(torch.cat([features["embedding"] for features in outputs]))
            for features, prediction in zip(outputs, joined.split(rows)):
                features["prediction"] = prediction

    @torch.no_grad()
    def targets(self, views):
        return [{"target": features[self.teacher.last]} for features in self.teacher(views)]

    def extra_flops(self, sides_px):
        return flops_per_image(self.teacher, sides_px, backward=False)

    def loss(self, outputs, labels):
        return byol(self.together(outputs, "prediction"), self.together(outputs, "target")), {}

    def constant_lr(self):
        multiple = self.config.byol.predictor_lr
        return {} if multiple is None else {self.predictor: multiple}

    def after_update(self, model, progress):
        start = self.config.byol.momentum
        momentum = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
        move_average_(self.teacher, model, momentum)


class Supervised(Method):
    """The baseline: a linear classifier on the last depth, trained on the file's labels."""

    fewest_views, most_views = 1, 12

    def __init__(self, config, model, num_classes, world):
        super().__init__(config, model, num_classes, world)
        self.classifier = nn.Linear(model.widths[model.last], num_classes)

    def add_heads(self, outputs):
        for features in outputs:
            features["class"] = self.classifier(features["embedding"])

    def loss(self, outputs, labels):
        logits = self.together(outputs, "class")  # (V, B, K)
        labels = self.world.gather(labels).repeat(len(logits))
        smoothing = self.config.supervised.label_smoothing
        return cross_entropy(logits.flatten(0, 1), labels, smoothing), {}


METHODS = {
    "simclr": SimCLR, "vicreg": VICReg, "barlow": BarlowTwins, "byol": BYOL,
    "supervised": Supervised, "instance_simclr": InstanceSimCLR,
}  # fmt: skip


def labelled_loss(outputs, labels, config, world):
    """The labelled stream's loss over all ranks; outputs of its views, labels (B of this rank,)."""
    kind, temperature = config.labelled.loss, config.labelled.temperature
    name = "logits" if kind == "cross_entropy" else "embedding"
    rows = world.gather(torch.cat([features[name] for features in outputs]))
    labels = world.gather(labels.repeat(len(outputs)))
    if kind == "cross_entropy":
        return cross_entropy(rows, labels)
    return {"suncet": suncet, "supcon": supcon}[kind](rows, labels, temperature)


# ---- The run -------------------------------------------------------------------------------------


def make_views(views, px):
    """The ops of each view at a resolution of `px`, by name."""
    return {name: build(view, px) for name, view in views.items()}


def clean_view(config):
    """The ops of the only view of an evaluation, by name: a centre crop."""
    views = Views(recipe="evaluation", small_images=config.views.small_images).resolve()
    return make_views(views, config.evaluation.resolution or config.resolution.max)


class Trainer:
    """A run: its state, a step, an epoch, an evaluation, and how it is saved and resumed.

    After `__init__` it stands where its folder's checkpoint left it, or at step 0; `fit` brings it
    to the end. `step` counts batches; `updates` leaves out those that fp16 skipped.
    """

    def __init__(self, config, world, stop):
        self.config, self.world, self.stop = config, world, stop
        data, names = config.data, (config.data.image_field, config.data.label_field)
        self.train_set = open_dataset(data.train, *names)
        self.val_set = open_dataset(data.val, *names) if data.val else None
        sets = {"train": self.train_set, "val": self.val_set}
        free = (FREE_KEYS, FREE_GROUPS)
        self.folder = RunFolder(config.out, config_dict(config), sets, *free, world.is_first)
        saved = self.folder.read_checkpoint()
        world.barrier()  # the first rank may write one as soon as all have read
        self.views = config.views.resolve()
        self._build_loaders()
        self._build_model()
        self._build_evaluation()
        self.done, self.averages = Counters(self.steps_per_epoch), Averages()
        self.interval = Interval()
        # a loss is the same on all ranks: the first one's counts
        self.one = torch.full((), float(world.is_first), device=world.device)
        self.watch, self.saved_step = FiniteWatch(world.device), 0
        self._start() if saved is None else self._restore(saved)
        self.saved_at = time.perf_counter()

    @property
    def step(self):
        """Batches trained on so far."""
        return self.done.step

    def _build_loaders(self):
        config, train, world = self.config, self.train_set, self.world
        has_labels = train.labels is not None
        if (config.method == "supervised" or config.labelled.loss != "none") and not has_labels:
            wanted = "labels, as method supervised and the labelled stream need"
            raise UserError(f"{train.path}: no {wanted}, in field '{config.data.label_field}'")
        ops = make_views(self.views, config.resolution.max)
        self.loader = self.labelled = None
        if config.own_batch_size:
            share = rank_share("data.batch_size", config.own_batch_size, world)
            self.loader = make_loader(
                train, config.data, ops, world, config.channels_last, drop_last=True,
                seed=config.seed, order=OrderOption[config.data.order.upper()], batch_size=share,
            )  # fmt: skip
        if config.labelled.loss != "none":
            some = dict(list(ops.items())[: config.labelled.num_views])
            self.labelled = LabelledStream(
                config.labelled, train, config.data, some, config.seed, world, config.channels_last
            )
        check_parts(config, [v.size_px(config.resolution.max) for v in self.views.values()], world)
        self.steps_per_epoch = len(self.loader if self.loader is not None else self.labelled)
        if self.steps_per_epoch == 0:
            got = f"{train.num_samples} samples make no batch of {config.own_batch_size}"
            raise UserError(f"{train.path}: {got}; lower data.batch_size")
        self.total_steps = config.epochs * self.steps_per_epoch
        self.labelled_until = 0
        if self.labelled is not None:
            self.labelled_until = self.labelled.end_step(self.steps_per_epoch)
            until = f"until step {min(self.labelled_until, self.total_steps)}"
            world.say(f"labelled stream: {self.labelled.description}; {until}")

    def _build_model(self):
        config, device, num_classes = self.config, self.world.device, self.train_set.num_classes
        torch.manual_seed(config.seed)
        self.model, classifier = Model(config.model), None
        self.method = METHODS[config.method](config, self.model, num_classes, self.world)
        if config.labelled.loss == "cross_entropy":
            classifier = nn.Linear(self.model.widths["backbone"], num_classes)
        learner = Learner(self.model, self.method, classifier)
        self.flops_by_px = {
            px: self._count_flops(learner, [view.size_px(px) for view in self.views.values()])
            for px in {resolution_at(epoch, config.resolution) for epoch in range(config.epochs)}
        }
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.learner = learner.to(device, memory_format=layout)
        self.optimizer = make_optimizer(config.optim, self.learner, self.method.constant_lr())
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.probes = None
        if self.train_set.labels is not None:
            probes = Probes(self.model.widths, num_classes).to(device)
            self.probes = ProbeTrainer(probes, config.probes, self.world)
        # no loss may reach the classifier (its stream ended) or the heads (labels alone)
        unreached = classifier is not None or self.loader is None
        self.network = share_learning(self.learner, self.world, unreached, config.system.compile)

    def _count_flops(self, learner, sides):
        """Operations of a training step, an own image and a labelled image with all their views."""
        twice = self.config.data.chunk_size > 0  # one more forward pass
        own = labelled = 0
        if self.loader is not None:
            own = step_flops(learner, sides, len(sides), twice) + self.method.extra_flops(sides)
        if self.labelled is not None:
            some = sides[: self.config.labelled.num_views]
            labelled = step_flops(learner, some, 0, twice)
        return own, labelled

    def _build_evaluation(self):
        config, sets = self.config, (self.train_set, self.val_set)
        options = (clean_view(config), config.seed, self.world, config.channels_last)
        self.evaluation = open_evaluation(*sets, config.data, config.evaluation, *options)

    # -- training

    def fit(self):
        """Train to the end, evaluating on the way. Raises Interrupted with the checkpoint on disk.

        The state between two epochs is the same whether the run came here or was resumed here:
        what is still to be done at an epoch's end is read off the folder.
        """
        while True:
            epoch, rest = divmod(self.step, self.steps_per_epoch)
            if rest == 0:
                every = self.config.checkpoint.keep_every
                if every and (epoch % every == 0 or epoch == self.config.epochs):
                    self.folder.keep_copy(epoch)
                self._evaluate_if_due(epoch)
                if epoch == self.config.epochs:
                    return self._finish()
            self._train_epoch(epoch)

    def _train_epoch(self, epoch):
        px = resolution_at(epoch, self.config.resolution)
        self.learner.train()
        self.interval.start()
        end = (epoch + 1) * self.steps_per_epoch
        for own, labelled in self.interval.timed(self._batches(epoch, px)):
            self._train_step(own, labelled, px)
            if self.step % self.config.log.every_steps == 0 or self.step == end:
                self._log(px)
            if self.step < end:  # the end is saved below, when the loader too has ended the epoch
                self._save_if_due()
        assert self.step == end, f"the loader ended the epoch at step {self.step} instead of {end}"
        self._save()
        self._exit_if_asked()

    def _batches(self, epoch, px):
        """The rest of the epoch: (own batch or None, labelled batch or None) for each step."""
        sides = {n: v.size_px(px) for n, v in self.views.items() if v.crop == "random"}
        own = repeat(None, self.steps_per_epoch - self.step % self.steps_per_epoch)
        if self.loader is not None:
            set_resolution(self.loader, sides)
            if self.step % self.steps_per_epoch == 0:
                self.loader.set_epoch(epoch)
            own = self.loader
        if self.step < self.labelled_until:
            some = list(self.views)[: self.config.labelled.num_views]
            self.labelled.start({name: side for name, side in sides.items() if name in some})
        for batch in own:
            if self.step < self.labelled_until:
                yield batch, self.labelled.next()
            else:
                if self.labelled is not None:
                    self.labelled.close()  # from here on it costs nothing
                yield batch, None

    def _train_step(self, own, labelled, px):
        config, names = self.config, list(self.views)
        batch_size = config.own_batch_size or config.labelled_batch_size
        length = (config.epochs, self.steps_per_epoch)
        set_lr(self.optimizer, self.step, config.optim, batch_size, *length)
        views, labels = [], {}
        if own is not None:
            views += [getattr(own, name) for name in names]
            labels["own"] = labels_of(own, config.data.label_field)
        num_own = len(views)
        if labelled is not None:
            views += [getattr(labelled, name) for name in names[: config.labelled.num_views]]
            labels["labelled"] = labels_of(labelled, config.data.label_field)

        def loss_of(outputs):  # float32, outside autocast
            loss, terms = 0.0, {}
            if own is not None:
                loss, terms = self.method.loss(outputs[:num_own], labels["own"])
            if labelled is not None:
                rest = (outputs[num_own:], labels["labelled"], config, self.world)
                terms = {**terms, config.labelled.loss: labelled_loss(*rest)}
                loss = loss + config.labelled.weight * terms[config.labelled.loss]
            return loss, terms

        outputs, loss, terms = self._backward(views, num_own, loss_of)
        self._update()
        self.method.after_update(self.model, (self.step + 1) / self.total_steps)
        self.averages.add_losses(loss, terms, self.one)
        if self.probes is not None:
            known = labels["own" if own is not None else "labelled"]
            self.probes.train_step(outputs[0], known, self.averages)
        self.watch.see(loss, self.step + 1)
        self._count(*(0 if batch is None else len(batch.indices) for batch in (own, labelled)), px)

    def _backward(self, views, num_own, loss_of):
        """Gradients of the loss; returns (outputs, loss, terms). Large batches go in parts."""
        parts = split_views(views, self.config.data.chunk_size)
        if len(parts) == 1:
            outputs = self._forward(self.network, views, num_own)
            loss, terms = loss_of(outputs)
            self.scaler.scale(loss).backward()
            return outputs, loss, terms

        def features_of(part, num_own):
            with frozen_statistics(self.learner):
                return self.learner(part, num_own)

        def forward(part):
            return self._forward(features_of, part, num_own)

        def again(part):
            with self._autocast():
                return self.network(part, num_own)

        no_sync = getattr(self.network, "no_sync", contextlib.nullcontext)
        return backward_in_parts(forward, again, parts, loss_of, self.scaler.scale, no_sync)

    def _forward(self, network, views, num_own):
        """Outputs with the method's targets, by way of `network`: with or without other ranks."""
        with self._autocast():
            outputs = network(views, num_own)
            for features, targets in zip(outputs, self.method.targets(views[:num_own])):
                features.update(targets)
        return outputs

    def _update(self):
        """A step of the optimiser; fp16 skips it where a gradient overflows."""
        clip = self.config.optim.clip_norm
        if clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), clip, foreach=True)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.updates += int(self.scaler.get_scale() >= scale)

    def _count(self, num_own, num_labelled, px):
        """Account for a step over so many images of each rank."""
        own_flops, labelled_flops = self.flops_by_px[px]
        num_own, num_labelled = num_own * self.world.size, num_labelled * self.world.size
        num_views = num_own * len(self.views) + num_labelled * self.config.labelled.num_views
        self.done.step += 1
        self.done.images += num_own + num_labelled
        self.interval.images += num_own + num_labelled
        self.done.views += num_views
        self.done.flops += num_own * own_flops + num_labelled * labelled_flops

    def _autocast(self):
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.world.device.type, dtype)

    # -- evaluation and records

    def _evaluate_if_due(self, epoch):
        is_due = epoch % self.config.evaluation.every_epochs == 0 or epoch == self.config.epochs
        if self.evaluation is None or not is_due:
            return
        if self.world.from_first(self.folder.has_evaluation(self.step)):
            return
        self.learner.eval()
        self.world.broadcast_(self.learner.buffers())  # the ones the checkpoint holds
        results = self.evaluation.run(self._encode, self.probes.probes, self._exit_if_asked)
        self.folder.write({**self.done.record(), **results})
        shown = [f"{k[4:-5]} {v:.1%}" for k, v in results.items() if k.endswith("top1")]
        self.world.say(f"epoch {epoch}/{self.config.epochs}  top-1 on val: {'  '.join(shown)}")

    def _encode(self, images):
        with self._autocast():
            return self.model.encode(images)

    def _log(self, px):
        self._check_finite()
        means, (rate, wait) = self.averages.take(self.world), self.interval.take()
        lr = self.optimizer.param_groups[0]["lr"]
        speed = {"train/images_per_s": rate, "train/data_wait": wait}
        self.folder.write({**self.done.record(), "resolution": px, "lr": lr, **means, **speed})
        self.world.say(
            f"step {self.step}/{self.total_steps}  loss {means['train/loss']:.4f}  lr {lr:.4g}  "
            f"{rate:.0f} images/s  data wait {wait:.0%}"
        )

    def _check_finite(self):
        """Raise NonFiniteLoss if a loss or a weight is not finite; waits for the device."""
        how = f"lr {self.optimizer.param_groups[0]['lr']:.4g}, {self.config.precision}"
        kept = f"{CHECKPOINT} holds step {self.saved_step}, from before"
        self.watch.check(self.learner.parameters(), self.step, self.folder.path, how, kept)

    def _finish(self):
        """Leave the run's picture and the backbone, and return the summary."""
        if self.world.is_first and not (self.folder.path / BACKBONE).exists():
            from ffcv_ssl.training.report import draw_report  # matplotlib is slow to import

            data = self.config.data
            ops = make_views(self.views, self.config.resolution.max)
            samples = self.train_set.sample_views(ops, data.image_field, self.config.seed)
            draw_report(self.folder.path, samples)
            about = {"model": self.config.model.backbone, "stem": self.config.model.stem}
            checkpoint.save_weights(self.folder.path / BACKBONE, self.model.backbone, about)
        return self.summary("finished")

    def summary(self, status):
        """What the last line on stdout says: counters, last losses and last evaluation."""
        shown = self.folder.latest("train/", "val/")
        out = str(self.folder.path)
        return {"status": status, "out": out, **self.done.record(), **shown}

    # -- saving and resuming

    def _save_if_due(self):
        if self.world.size > 1 and self.step % AGREE_EVERY:
            return
        is_due = time.perf_counter() - self.saved_at >= 60 * self.config.checkpoint.every_minutes
        asked, is_due = self.world.any(self.stop.asked, is_due)
        if asked or is_due:
            self._save()
        self._exit_if_asked(asked)

    def _exit_if_asked(self, asked=None):
        """Raise Interrupted where a rank was told to stop; `asked`: what was agreed just before."""
        if asked or (asked is None and self.world.any(self.stop.asked)[0]):
            where = f"{CHECKPOINT} holds step {self.saved_step}"
            raise Interrupted(f"{self.folder.path}: interrupted; {where}")

    def _save(self):
        """Write the checkpoint, if it is worth keeping and once the metrics are on disk."""
        self._check_finite()
        self.folder.save(self._state())
        self.saved_step, self.saved_at = self.step, time.perf_counter()

    def _parts(self):
        """Everything with a state_dict of its own, by its name in the checkpoint."""
        parts = {
            "model": self.model, "method": self.method, "classifier": self.learner.classifier,
            "optimizer": self.optimizer, "scaler": self.scaler, "probes": self.probes,
            "loader": self.loader, "labelled": self.labelled and self.labelled.loader,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self):
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            **self.done.state_dict(),
            "averages": self.averages.over_ranks(self.world), "rng": checkpoint.rng_state(),
        }  # fmt: skip

    def _start(self):
        """Begin at step 0; what a run without a checkpoint left in the folder is not part of it."""
        config = self.config
        self.folder.open_log(None, config.log.tensorboard)
        self._save()
        streams = [(config.own_batch_size, "images", len(self.views))]
        if self.labelled_until:
            streams += [(config.labelled_batch_size, "labelled", config.labelled.num_views)]
        self.world.say(
            f"{self.folder.path}: {config.epochs} epochs of {self.steps_per_epoch} steps, "
            f"{sum(size * views for size, _, views in streams)} views a step: "
            + ", ".join(f"{size} {what} x {views}" for size, what, views in streams if size)
        )

    def _restore(self, saved):
        self.done.load_state_dict(saved)
        self.saved_step = self.step
        for name, part in self._parts().items():
            if name != "loader" or self.step % self.steps_per_epoch:  # between epochs: set_epoch
                part.load_state_dict(saved[name])
        device, is_first = self.world.device, self.world.is_first  # the sums were of all ranks
        sums = {name: pair.to(device) * is_first for name, pair in saved["averages"].items()}
        self.averages.sums = sums
        self.folder.open_log(self.step, self.config.log.tensorboard)
        checkpoint.restore_rng_state(saved["rng"])
        if self.step < self.total_steps:
            self.world.say(f"{self.folder.path}: resumed at step {self.step} of {self.total_steps}")
        if note := self.folder.note_versions(saved):
            self.world.say(note)

    def close(self):
        """End the loaders' threads and the log."""
        for part in (self.loader, self.labelled, self.evaluation, self.folder):
            if part is not None:
                part.close()


# ---- Command line --------------------------------------------------------------------------------


def read_config(argv):
    """The command line as a Config with its folder. Raises UserError."""
    summary = __doc__.split("\n")[0]
    config, files = parse_config(Config, argv, "train.py", summary, check_config)
    if config.out is not None:
        return config
    return replace(config, out=f"runs/{Path(files[-1]).stem if files else 'train'}")


def run(argv):
    """The command: returns (exit code, summary)."""
    if slurm.is_batch(argv):
        return 0, slurm.submit_batch(argv, lambda line: [slurm.job_of(read_config(line), __file__)])
    config = read_config(argv)
    if slurm.wants_submission(config):
        return 0, slurm.submit(config, __file__)
    system = config.system
    world = World.join(system.device, system.torch_threads, slurm.task_environment())
    hold = hold_folder(config.out) if world.is_first else contextlib.nullcontext()
    with command.StopSignal() as stop, hold:
        trainer = Trainer(config, world, stop)
        trainer.folder.write_config()
        try:
            return 0, trainer.fit()
        except Interrupted as message:
            world.say(message, sys.stderr)
            return command.EXIT_INTERRUPTED, trainer.summary("interrupted")
        finally:
            trainer.close()
            world.leave()


def main(argv=None):
    """Run the command and return its exit code; the last line on stdout is the summary."""
    return command.run_ranks(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
