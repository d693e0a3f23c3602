"""Self-supervised pretraining of an image encoder, in one file.

    python train.py --config configs/imagenette_cpu.yaml
    python train.py --config configs/simclr.yaml --out runs/a --data.train A.beton --optim.lr 0.5
    python train.py --config configs/simclr.yaml --views.view_0.blur_prob 0 --print_config

One forward pass gives the features of every view; the method's loss trains backbone and projector,
and linear probes at every depth train along on the same features, detached. The run's folder holds
`config.yaml`, `metrics.jsonl`, `checkpoint.pt`, TensorBoard events, and at the end `report.png` and
`backbone.safetensors`. The same command again goes on exactly where the run stopped, also in the
middle of an epoch. The last line on stdout is JSON. Exit codes: 0 finished (also if it already
was), 75 interrupted with a checkpoint, 2 a user's mistake, 1 a loss that is not finite.
"""
# Shapes: B images a batch, V views an image, D features, H W pixels, N bank images, K classes.

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import yaml
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat

from jsonargparse.typing import NonNegativeInt, PositiveInt  # isort: skip
from torch import nn

from ffcv_ssl import BetonError, Loader, OrderOption, checkpoint, command
from ffcv_ssl.command import UserError, config_dict
from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.meters import Averages, Interval, flops_per_image
from ffcv_ssl.metrics_log import MetricsLog
from ffcv_ssl.optim import LARS, parameter_groups
from ffcv_ssl.probing import Probes, hits, knn_scores, probe_loss
from ffcv_ssl.run_data import open_dataset
from ffcv_ssl.transforms import NormalizeImage, Squeeze, ToDevice, ToTensor, ToTorchImage
from pipelines import Views, build

CHECKPOINT, BACKBONE, CHECKPOINT_FORMAT = "checkpoint.pt", "backbone.safetensors", 1


say = partial(print, flush=True)


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived, and the checkpoint is on disk."""


class NonFiniteLoss(ArithmeticError):
    """The loss or a weight became NaN or infinite; the last checkpoint is from before."""


# ---- Configuration: YAML and dotted overrides fill these records ---------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are loaded."""

    train: str = ""
    """The `.beton` file to train on. Only probes and k-NN use its labels; -1 is unlabelled."""
    val: str | None = None
    """The `.beton` file to evaluate on; null: no evaluation."""
    image_field: str = "image"
    """Name of the image field."""
    label_field: str = "label"
    """Name of the integer field with the class; a file without it trains without probes."""
    batch_size: PositiveInt = 256
    """Images a step, over all ranks."""
    num_workers: int = -1
    """Loader threads a rank; -1: all cores with a GPU, half of them where torch needs them too."""
    batches_ahead: PositiveInt = 3
    """Batches prepared in advance."""
    order: Literal["random", "quasi_random", "sequential"] = "random"
    """Order of the training samples; quasi_random is for files larger than memory."""
    os_cache: bool = True
    """False for files larger than memory."""
    on_error: Literal["raise", "replace"] = "raise"
    """What a corrupt sample does: end the run, or be replaced by another (counted)."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, on the 0..255 scale (ImageNet's)."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Pixels are divided by this, on the 0..255 scale (ImageNet's)."""


@dataclass(frozen=True)
class ResolutionConfig:
    """Side of the training views in pixels: grows from epoch `start_ramp` to epoch `end_ramp`."""

    min: PositiveInt = 224
    """The first resolution."""
    max: PositiveInt = 224
    """The last resolution, also of the evaluation unless that sets its own."""
    start_ramp: NonNegativeInt = 0
    """Epoch until which the resolution is `min`; then it grows linearly, rounded to 32 pixels."""
    end_ramp: NonNegativeInt = 0
    """Epoch from which the resolution is `max`."""

    def __post_init__(self):
        if self.min > self.max or self.start_ramp > self.end_ramp:
            got = f"got {self.min}, {self.max}, {self.start_ramp}, {self.end_ramp}"
            raise UserError(f"resolution: {got}, expected min <= max and start_ramp <= end_ramp")


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and projector."""

    backbone: str = "resnet50"
    """A ResNet of torchvision by name: resnet18, resnet50, resnext50_32x4d, wide_resnet50_2..."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels."""
    projector: str = "2048-512"
    """Widths of the projector's layers."""
    projector_norm: bool = True
    """Batch-norm between the projector's layers."""

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", self.projector):
            raise UserError(f"model.projector: got {self.projector!r}, expected widths: 2048-512")
        known = torchvision.models.list_models(torchvision.models, "*resne*t*")
        if self.backbone not in known:
            expected = f"expected one of {', '.join(known)}"
            raise UserError(f"model.backbone: got {self.backbone!r}, {expected}")


@dataclass(frozen=True)
class SimCLRConfig:
    """SimCLR's settings."""

    temperature: PositiveFloat = 0.15
    """Temperature of the softmax over similarities."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule of backbone and projector."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """The optimiser."""
    lr: PositiveFloat = 1.0
    """Base learning rate, before scaling."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr."""
    momentum: ClosedUnitInterval = 0.9
    """Momentum of LARS and SGD."""
    nesterov: bool = False
    """Nesterov momentum (SGD)."""
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 1e-6
    """Decay of weights; biases and norm layers have none."""
    lars_lr: Literal["inside", "outside"] = "inside"
    """lr scales what enters the momentum buffer (ours), or what leaves it (FFCV-SSL, SSLight)."""
    lars_norm: Literal["joint", "separate"] = "joint"
    """The trust ratio divides by |g + wd p| (ours) or by |g| + wd |p| (suncet)."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Epochs in which the rate grows linearly from 0, by step."""
    end_ratio: ClosedUnitInterval = 0.001
    """The cosine ends at the rate times this."""


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes on the backbone and after each projector layer, trained along on view 0."""

    lr: PositiveFloat = 1e-4
    """AdamW's learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on clean centre crops of the validation file."""

    every_epochs: PositiveInt = 1
    """Epochs between evaluations; the untrained and the final model are always evaluated."""
    resolution: PositiveInt | None = None
    """Side of the crops in pixels; null: resolution.max."""
    batch_size: PositiveInt = 256
    """Images a batch."""
    knn_k: NonNegativeInt = 20
    """Neighbours that vote; 0: no k-NN."""
    knn_temperature: PositiveFloat = 0.1
    """Votes weigh exp(similarity / temperature)."""
    knn_bank: PositiveInt = 20000
    """Training images to search, drawn once with the run's seed; all if there are fewer."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. Each epoch's end is saved in any case."""

    every_minutes: PositiveFloat = 10.0
    """Minutes between checkpoints within an epoch."""
    keep_every: NonNegativeInt = 0
    """Keep a copy every so many epochs, and of epoch 0 (untrained) and the last; 0: none."""


@dataclass(frozen=True)
class LogConfig:
    """What is reported while training."""

    every_steps: PositiveInt = 50
    """Steps a log line; each epoch's end has one too."""
    tensorboard: bool = True
    """Write TensorBoard events."""


@dataclass(frozen=True)
class SystemConfig:
    """Where the run computes."""

    device: str = "auto"
    """auto (the CUDA device if there is one), cpu, cuda or cuda:N."""
    torch_threads: NonNegativeInt = 0
    """Threads of torch on the CPU; 0: all cores. Losses are bit-equal for equal numbers only."""

    def __post_init__(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            got = f"got {self.device!r}"
            raise UserError(f"system.device: {got}, expected auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str | None = None
    """The run's folder; null: runs/NAME for configs/NAME.yaml."""
    seed: NonNegativeInt = 0
    """Decides weights, order and views."""
    epochs: PositiveInt = 100
    """Passes over the training file."""
    method: Literal["simclr"] = "simclr"
    """What the loss is."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 are autocast; fp16 scales its gradients."""
    channels_last: bool = True
    """Channels-last memory format, faster for convolutions."""
    data: DataConfig = field(default_factory=DataConfig)
    views: Views = field(default_factory=Views)
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    system: SystemConfig = field(default_factory=SystemConfig)


def check_config(config):
    """Raise ValueError for settings that do not go together, as the parser cannot see them."""
    if config.optim.warmup_epochs >= config.epochs:
        raise UserError(
            f"optim.warmup_epochs: got {config.optim.warmup_epochs}, expected less than epochs "
            f"({config.epochs})"
        )
    make_optimizer(config.optim, nn.Linear(1, 1))  # torch has its own limits
    views = config.views.resolve()
    METHODS[config.method].check_views(views)
    if config.resolution.min < config.resolution.max:
        for name, view in views.items():
            if view.crop != "random":
                raise UserError(f"views.{name}.crop: a {view.crop} crop has one size: no ramp")


# A resumed run may differ in these and in nothing else: they do not change what is learnt.
FREE_KEYS = ("out", "data.train", "data.val", "data.num_workers", "data.batches_ahead")
FREE_GROUPS = ("checkpoint.", "log.", "system.", "data.os_cache")


class World(NamedTuple):
    """This process' place among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


# ---- Model: a torchvision ResNet and an MLP that hand out the features of every depth ------------


def make_backbone(name, stem):
    """A torchvision ResNet without its classifier, (B, 3, H, W) -> (B, D), and its D."""
    backbone = torchvision.models.get_model(name, weights=None)
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        channels = backbone.conv1.out_channels
        backbone.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone, width


def make_projector(widths, in_features, norm):
    """Blocks of an MLP given as `2048-512`: Linear-BN-ReLU each, the last a Linear without bias."""
    *hidden, last = (int(width) for width in widths.split("-"))
    blocks = nn.ModuleList()
    for width in hidden:
        layers = [nn.Linear(in_features, width, bias=not norm)]
        layers += [nn.BatchNorm1d(width)] if norm else []
        blocks.append(nn.Sequential(*layers, nn.ReLU()))
        in_features = width
    blocks.append(nn.Sequential(nn.Linear(in_features, last, bias=False)))
    return blocks


class Model(nn.Module):
    """Backbone and projector. `widths` maps the name of each depth to its D."""

    def __init__(self, config):
        super().__init__()
        self.backbone, width = make_backbone(config.backbone, config.stem)
        self.projector = make_projector(config.projector, width, config.projector_norm)
        self.widths = {"backbone": width}
        for depth, block in enumerate(self.projector, start=1):
            self.widths[f"projector_{depth}"] = block[0].out_features

    def encode(self, images):
        """(B, 3, H, W) -> {"backbone": (B, D), "projector_1": (B, D), ...}."""
        features = [self.backbone(images)]
        for block in self.projector:
            features.append(block(features[-1]))
        return dict(zip(self.widths, features))

    def forward(self, views):
        """A list of V (B, 3, H, W) -> a list of V dicts as of `encode`.

        Views of one size share one pass, and so their batch-norm statistics, as in SimCLR.
        """
        outputs = [None] * len(views)
        for side in sorted({view.shape[-1] for view in views}, reverse=True):
            members = [v for v, view in enumerate(views) if view.shape[-1] == side]
            layers = self.encode(torch.cat([views[v] for v in members]))
            parts = {name: features.chunk(len(members)) for name, features in layers.items()}
            for position, v in enumerate(members):
                outputs[v] = {name: chunks[position] for name, chunks in parts.items()}
        return outputs


# ---- Methods: the model's outputs -> a loss and its named terms ----------------------------------


def nt_xent(embeddings, temperature):
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al. 2020, eq. 1).

    l(i, j) = -sim(i, j)/t + log sum_{k != i} exp(sim(i, k)/t), the mean over all VB anchors i and
    the V - 1 other views j of each one's image. embeddings: (V, B, D), any float type, V >= 2.
    Returns float32 scalars: loss, and its two terms, which add up to it.
    """
    num_views, batch, _ = embeddings.shape
    z = F.normalize(embeddings.float(), dim=-1)  # (V, B, D)
    same = torch.einsum("vbd,wbd->vw", z, z) / temperature  # summed over images
    pairs = num_views * (num_views - 1) * batch
    alignment = -(same.sum() - same.trace()) / pairs
    z = z.flatten(0, 1)  # (VB, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -math.inf)  # (VB, VB)
    uniformity = logits.logsumexp(dim=1).mean()
    return alignment + uniformity, {"alignment": alignment, "uniformity": uniformity}


class SimCLR(nn.Module):
    """SimCLR: views of one image attract, all other images of the batch repel.

    Every method is a module (for those with parameters or buffers of their own) with these parts.
    """

    def __init__(self, config, world):
        super().__init__()
        self.temperature = config.simclr.temperature

    @staticmethod
    def check_views(views):
        """Raise UserError unless the method can use these views."""
        if len(views) < 2:
            raise UserError(f"views: got {len(views)} a sample, expected 2 or more for simclr")

    def loss(self, outputs):
        """The model's outputs -> (scalar loss, {term: scalar})."""
        last = [layers[next(reversed(layers))] for layers in outputs]
        return nt_xent(torch.stack(last), self.temperature)


METHODS = {"simclr": SimCLR}

# ---- Optimisers and schedules --------------------------------------------------------------------


def make_optimizer(config, model):
    """The optimiser of the model; `lr_at` sets its rate before each step."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "lars":
        inside, joint = config.lars_lr == "inside", config.lars_norm == "joint"
        return LARS(groups, config.lr, config.momentum, lr_inside=inside, joint_norm=joint)
    if config.name == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
    return torch.optim.AdamW(groups, config.lr, config.betas)


def lr_at(step, config, steps_per_epoch):
    """Learning rate of update `step` (from 0): linear warm-up, then cosine, both by step."""
    optim, batch_size = config.optim, config.data.batch_size
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    peak = optim.lr * scale[optim.lr_scaling]
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (optim.end_ratio + (1 - optim.end_ratio) * cosine)


def resolution_at(epoch, config):
    """Side of the views in pixels in `epoch` (from 0): min, a linear ramp by 32 pixels, max."""
    if epoch < config.start_ramp:
        return config.min
    if epoch >= config.end_ramp or config.min == config.max:
        return config.max
    share = (epoch - config.start_ramp) / (config.end_ramp - config.start_ramp)
    px = 32 * round((config.min + share * (config.max - config.min)) / 32)
    return min(max(px, config.min), config.max)


# ---- Data ----------------------------------------------------------------------------------------


def make_loader(dataset, config, views, px, world, **options):
    """A loader of `views` (dict of View) as normalised float32 (B, 3, H, W), and of the labels."""
    data, device = config.data, world.device
    finish = [ToTensor(), ToDevice(device), ToTorchImage(channels_last=config.channels_last)]
    finish += [NormalizeImage(np.array(data.mean), np.array(data.std), np.float32)]
    pipelines = dict.fromkeys(dataset.field_names)  # None: what nobody asks for is not read
    del pipelines[data.image_field]
    for name, view in views.items():
        pipelines[name] = (data.image_field, build(view, px) + finish)
    if dataset.labels is not None:
        pipelines[data.label_field] = [IntDecoder(), ToTensor(), Squeeze(), ToDevice(device)]
    workers = data.num_workers
    if workers == -1 and device.type == "cpu":
        workers = max(1, len(os.sched_getaffinity(0)) // 2)
    return Loader(
        dataset.path, num_workers=workers, os_cache=data.os_cache, on_error=data.on_error,
        seed=config.seed, batches_ahead=data.batches_ahead, pipelines=pipelines,
        rank=world.rank, world_size=world.size, **options,
    )  # fmt: skip


def make_train_loader(dataset, config, views, world):
    """The loader of the training views; `data.batch_size` is global, a loader's is its rank's."""
    loader = make_loader(
        dataset, config, views, config.resolution.max, world, drop_last=True,
        batch_size=config.data.batch_size // world.size,
        order=OrderOption[config.data.order.upper()],
    )  # fmt: skip
    if len(loader) == 0:
        got = f"{dataset.num_samples} samples make no batch of {config.data.batch_size}"
        raise UserError(f"{dataset.path}: {got}; lower data.batch_size")
    return loader


def make_clean_loader(dataset, config, world, indices=None):
    """Centre crops in the file's order, every sample once; `indices` for a part of the file."""
    views = Views(recipe="evaluation", small_images=config.views.small_images).resolve()
    px = config.evaluation.resolution or config.resolution.max
    return make_loader(
        dataset, config, views, px, world, indices=indices, drop_last=False,
        batch_size=config.evaluation.batch_size, order=OrderOption.SEQUENTIAL,
    )  # fmt: skip


# ---- The run -------------------------------------------------------------------------------------


class Trainer:
    """A run: its state, a step, an epoch, an evaluation, and how it is saved and resumed.

    After `__init__` it stands where its folder's checkpoint left it, or at step 0; `fit` brings it
    to the end. `step` counts batches; `updates` leaves out those that fp16 skipped.
    """

    def __init__(self, config, world, stop):
        self.config, self.world, self.stop, self.out = config, world, stop, Path(config.out)
        data, names = config.data, (config.data.image_field, config.data.label_field)
        self.train_set = open_dataset(data.train, *names)
        self.val_set = open_dataset(data.val, *names) if data.val else None
        saved = self._read_checkpoint()
        self._build_model()
        self._build_loaders()
        self.step = self.updates = self.images = self.flops = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.averages, self.interval, self.flops_by_px = Averages(), Interval(), {}
        self.one = torch.ones((), device=world.device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=world.device)
        self._start() if saved is None else self._restore(saved)
        self.saved_at = time.perf_counter()

    def _build_model(self):
        config, device = self.config, self.world.device
        torch.manual_seed(config.seed)
        self.views = config.views.resolve()
        self.method = METHODS[config.method](config, self.world).to(device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = Model(config.model).to(device, memory_format=layout)
        self.learner = nn.ModuleList([self.model, self.method])
        self.optimizer = make_optimizer(config.optim, self.learner)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.probes = self.probe_optimizer = None
        if self.train_set.labels is not None:
            self.probes = Probes(self.model.widths, self.train_set.num_classes).to(device)
            options = {"lr": config.probes.lr, "weight_decay": config.probes.weight_decay}
            self.probe_optimizer = torch.optim.AdamW(self.probes.parameters(), **options)

    def _build_loaders(self):
        config, train, val = self.config, self.train_set, self.val_set
        self.loader = make_train_loader(train, config, self.views, self.world)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.val_loader = self.bank_loader = None
        for dataset in (train, val):
            if dataset is not None and dataset.labels is None:
                say(f"{dataset.path}: no labels in field '{config.data.label_field}': no probes")
            if dataset is None or dataset.labels is None:
                return
        if val.num_classes > train.num_classes:
            expected = f"expected those of {train.path} ({train.num_classes})"
            raise UserError(f"{val.path}: got {val.num_classes} classes, {expected}")
        self.val_loader = make_clean_loader(val, config, self.world)
        if config.evaluation.knn_k > 0:
            bank = train.draw_labelled(config.evaluation.knn_bank, config.seed)
            self.bank_loader = make_clean_loader(train, config, self.world, bank)

    # -- training

    def fit(self):
        """Train to the end, evaluating on the way. Raises Interrupted with the checkpoint on disk.

        The state between two epochs is the same whether the run came here or was resumed here:
        what is still to be done at an epoch's end is read off the folder.
        """
        while True:
            epoch, rest = divmod(self.step, self.steps_per_epoch)
            if rest == 0:
                self._keep_copy(epoch)
                self._evaluate_if_due(epoch)
                if epoch == self.config.epochs:
                    return self._finish()
            self._train_epoch(epoch)

    def _train_epoch(self, epoch):
        px = resolution_at(epoch, self.config.resolution)
        for name, view in self.views.items():
            if view.crop == "random":
                self.loader.set_resolution(view.size_px(px), name)
        if self.step % self.steps_per_epoch == 0:
            self.loader.set_epoch(epoch)
        self.model.train()
        self.interval.start()
        end = (epoch + 1) * self.steps_per_epoch
        for batch in self.interval.timed(self.loader):
            self._train_step(batch, px)
            if self.step % self.config.log.every_steps == 0 or self.step == end:
                self._log(px)
            if self.step < end:  # the end is saved below, when the loader too has ended the epoch
                self._save_if_due()
        assert self.step == end, f"the loader ended the epoch at step {self.step} instead of {end}"
        self._save()
        self._exit_if_asked()

    def _train_step(self, batch, px):
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, self.config, self.steps_per_epoch)
        views = [getattr(batch, name) for name in self.views]
        with self._autocast():
            outputs = self.model(views)
        loss, terms = self.method.loss(outputs)  # float32, outside autocast
        self._update(loss)
        self.averages.add("train/loss", loss, self.one)
        for name, value in terms.items():
            self.averages.add(f"train/loss/{name}", value, self.one)
        if self.probes is not None:
            self._train_probes(outputs[0], self._labels(batch))
        self.step += 1
        is_bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(is_bad, self.step, self.first_bad_step)
        num_images = len(views[0]) * self.world.size
        self.images += num_images
        self.interval.images += num_images
        self.flops += num_images * self._flops_per_image(px)

    def _update(self, loss):
        """Backward and a step of the optimiser; fp16 skips it where a gradient overflows."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += int(self.scaler.get_scale() >= scale)

    def _train_probes(self, features, labels):
        """A step of the probes on the features that the model's own forward pass gave."""
        logits = self.probes(features)
        self.probe_optimizer.zero_grad(set_to_none=True)
        probe_loss(logits, labels).backward()
        self.probe_optimizer.step()
        num_labelled = (labels >= 0).sum()
        for name, scores in logits.items():
            self.averages.add(f"train/{name}/top1", hits(scores.detach(), labels, 1), num_labelled)

    def _autocast(self):
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.world.device.type, dtype)

    def _labels(self, batch):
        """(B,) int64 on the device; -1 where an image is unlabelled or only pads the batch."""
        labels = getattr(batch, self.config.data.label_field).view(-1)
        return labels.masked_fill(~torch.as_tensor(batch.valid, device=labels.device), -1)

    def _flops_per_image(self, px):
        if px not in self.flops_by_px:
            sides_px = [view.size_px(px) for view in self.views.values()]
            self.flops_by_px[px] = flops_per_image(self.model, sides_px)
        return self.flops_by_px[px]

    # -- evaluation

    def _evaluate_if_due(self, epoch):
        is_due = epoch % self.config.evaluation.every_epochs == 0 or epoch == self.config.epochs
        if self.val_loader is None or not is_due or self.log.has_evaluation(self.step):
            return
        results = self._evaluate()
        self.log.write({**self._counters(), **results})
        shown = [f"{k[4:-5]} {v:.1%}" for k, v in results.items() if k.endswith("top1")]
        say(f"epoch {epoch}/{self.config.epochs}  top-1 on val: {'  '.join(shown)}")

    @torch.no_grad()
    def _evaluate(self):
        """Probes and k-NN on the validation file: {"val/<depth or knn>/top<1 or 5>": share}."""
        self.model.eval()
        knn, classes = self.config.evaluation, self.train_set.num_classes
        bank = self._encode_bank() if self.bank_loader is not None else None
        counts, num_labelled = {}, 0
        for batch in self.val_loader:
            self._exit_if_asked()
            labels, features = self._labels(batch), self._encode(batch)
            scores = self.probes(features)
            if bank is not None:
                queries = F.normalize(features["backbone"].float(), dim=1)
                settings = (classes, knn.knn_k, knn.knn_temperature)
                scores["knn"] = knn_scores(queries, *bank, *settings)
            for name, values in scores.items():
                for k in (1, 5):
                    key = f"val/{name}/top{k}"
                    counts[key] = counts.get(key, 0) + hits(values, labels, k)
            num_labelled = num_labelled + (labels >= 0).sum()
        return {key: int(count) / max(1, int(num_labelled)) for key, count in counts.items()}

    def _encode(self, batch):
        with self._autocast():
            return self.model.encode(batch.view_0)

    def _encode_bank(self):
        """Unit features (N, D) and labels (N,) of the bank."""
        features, labels = [], []
        for batch in self.bank_loader:
            self._exit_if_asked()
            known = self._labels(batch) >= 0
            features.append(F.normalize(self._encode(batch)["backbone"].float(), dim=1)[known])
            labels.append(self._labels(batch)[known])
        return torch.cat(features), torch.cat(labels)

    # -- records

    def _counters(self):
        return {
            "epoch": round(self.step / self.steps_per_epoch, 6), "step": self.step,
            "updates": self.updates, "images": self.images, "flops": self.flops,
            "views": self.images * len(self.views), "seconds": self._seconds(),
        }  # fmt: skip

    def _seconds(self):
        return round(self.seconds_before + time.perf_counter() - self.started, 3)

    def _log(self, px):
        self._check_finite()
        means, (rate, wait) = self.averages.take(), self.interval.take()
        lr = self.optimizer.param_groups[0]["lr"]
        speed = {"train/images_per_s": rate, "train/data_wait": wait}
        self.log.write({**self._counters(), "resolution": px, "lr": lr, **means, **speed})
        say(
            f"step {self.step}/{self.total_steps}  loss {means['train/loss']:.4f}  lr {lr:.4g}  "
            f"{rate:.0f} images/s  data wait {wait:.0%}"
        )

    def _check_finite(self):
        """Raise NonFiniteLoss if a loss or a weight is not finite; waits for the device."""
        step, lr = int(self.first_bad_step), self.optimizer.param_groups[0]["lr"]
        norms = torch.stack(torch._foreach_norm(list(self.learner.parameters())))
        if step < 0 and bool(torch.isfinite(norms).all()):
            return
        what = f"the loss of step {step}" if step >= 0 else f"a weight, by step {self.step},"
        raise NonFiniteLoss(
            f"{self.out}: {what} is not finite (lr {lr:.4g}, {self.config.precision}); {CHECKPOINT}"
            f" holds step {self.saved_step}, from before; lower optim.lr or raise the precision"
        )

    def _finish(self):
        """Leave the run's picture and the backbone, and return the summary."""
        if not (self.out / BACKBONE).exists():
            from ffcv_ssl.report import draw_report  # matplotlib is slow to import

            draw_report(self.out, self._view_samples())
            about = {"model": self.config.model.backbone, "stem": self.config.model.stem}
            checkpoint.save_weights(self.out / BACKBONE, self.model.backbone, about)
        return self.summary("finished")

    def _view_samples(self):
        """uint8 (B, H, W, 3) arrays of each view of the first few images, for the picture."""
        data, px = self.config.data, self.config.resolution.max
        ops = {name: [*build(view, px), ToTensor()] for name, view in self.views.items()}
        return self.train_set.sample_views(ops, data.image_field, self.config.seed)

    def summary(self, status):
        """What the last line on stdout says: counters, last losses and last evaluation."""
        last = {**self.log.latest("train/"), **self.log.latest("val/")}
        shown = {k: v for k, v in last.items() if k.startswith(("train/", "val/"))}
        return {"status": status, "out": str(self.out), **self._counters(), **shown}

    # -- saving and resuming

    def _save_if_due(self):
        minutes = (time.perf_counter() - self.saved_at) / 60
        if self.stop.asked or minutes >= self.config.checkpoint.every_minutes:
            self._save()
        self._exit_if_asked()

    def _exit_if_asked(self):
        if self.stop.asked:
            raise Interrupted(f"{self.out}: interrupted; {CHECKPOINT} holds step {self.saved_step}")

    def _save(self):
        """Write the checkpoint, if it is worth keeping and once the metrics are on disk."""
        self._check_finite()
        self.log.sync()
        checkpoint.save(self.out / CHECKPOINT, self._state())
        self.saved_step, self.saved_at = self.step, time.perf_counter()

    def _parts(self):
        """Everything with a state_dict of its own, by its name in the checkpoint."""
        parts = {"model": self.model, "method": self.method, "optimizer": self.optimizer}
        parts |= {"scaler": self.scaler, "loader": self.loader}
        if self.probes is not None:
            parts |= {"probes": self.probes, "probe_optimizer": self.probe_optimizer}
        return parts

    def _state(self):
        return {
            "format": CHECKPOINT_FORMAT, "config": config_dict(self.config),
            "datasets": self._datasets(), "step": self.step, "updates": self.updates,
            "images": self.images, "flops": self.flops, "seconds": self._seconds(),
            **{name: part.state_dict() for name, part in self._parts().items()}, "ema": None,
            "averages": dict(self.averages.sums), "rng": checkpoint.rng_state(),
            "threads": torch.get_num_threads(), "versions": checkpoint.versions(),
        }  # fmt: skip

    def _datasets(self):
        sets = {"train": self.train_set, "val": self.val_set}
        return {name: dataset and dataset.describe() for name, dataset in sets.items()}

    def _keep_copy(self, epoch):
        every = self.config.checkpoint.keep_every
        if every and (epoch % every == 0 or epoch == self.config.epochs):
            kept = self.out / f"checkpoint_epoch_{epoch:04d}.pt"
            checkpoint.keep_copy(self.out / CHECKPOINT, kept)

    def _read_checkpoint(self):
        """The folder's checkpoint, or None; refuses, with both sides named, that of another run."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return None
        saved = checkpoint.load(path)
        if saved.get("format") != CHECKPOINT_FORMAT:
            got = f"got format {saved.get('format')!r}, expected {CHECKPOINT_FORMAT}"
            raise UserError(f"{path}: {got}; use another --out")
        sides = (saved["config"], config_dict(self.config))
        differences = command.config_differences(*sides, FREE_KEYS, FREE_GROUPS)
        for name, now in self._datasets().items():
            if saved["datasets"][name] != now:
                differences.append(f"{name} data {saved['datasets'][name]} there, {now} here")
        if differences:
            what = "; ".join(differences)
            raise UserError(f"{path}: another run's: {what}; restore that or use another --out")
        return saved

    def _start(self):
        """Begin at step 0; what a run without a checkpoint left in the folder is not part of it."""
        for stale in [*self.out.glob("checkpoint_epoch_*.pt"), self.out / BACKBONE]:
            stale.unlink(missing_ok=True)
        self.log = MetricsLog(self.out, None, self.config.log.tensorboard)
        self._save()
        say(f"{self.out}: {self.config.epochs} epochs of {self.steps_per_epoch} steps")

    def _restore(self, saved):
        self.step, self.updates, self.images = saved["step"], saved["updates"], saved["images"]
        self.flops, self.seconds_before = saved["flops"], saved["seconds"]
        self.saved_step, device = self.step, self.world.device
        for name, part in self._parts().items():
            if name != "loader" or self.step % self.steps_per_epoch:  # between epochs: set_epoch
                part.load_state_dict(saved[name])
        self.averages.sums = {k: pair.to(device) for k, pair in saved["averages"].items()}
        self.log = MetricsLog(self.out, self.step, self.config.log.tensorboard)
        checkpoint.restore_rng_state(saved["rng"])
        if self.step < self.total_steps:
            say(f"{self.out}: resumed at step {self.step} of {self.total_steps}")
        now = {"threads": torch.get_num_threads(), **checkpoint.versions()}
        before = {"threads": saved["threads"], **saved["versions"]}
        if now != before:
            say(f"{self.out}: losses may differ in their last bits: {before} before, {now} now")

    def close(self):
        """End the loaders' threads and the log."""
        for loader in (self.loader, self.val_loader, self.bank_loader):
            if loader is not None:
                loader.close()
        self.log.close()


# ---- Command line --------------------------------------------------------------------------------


def make_world(config):
    """This process' place in the run: one process so far."""
    torch.set_num_threads(config.system.torch_threads or len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return World(device=command.choose_device(config.system.device))


def read_config(argv):
    """The command line as a Config with its folder. Raises UserError."""
    summary = __doc__.split("\n")[0]
    config, files = command.parse_config(Config, argv, "train.py", summary, check_config)
    if config.out is not None:
        return config
    return replace(config, out=f"runs/{Path(files[-1]).stem if files else 'train'}")


def run(argv):
    """The command: returns (exit code, summary)."""
    config = read_config(argv)
    with command.StopSignal() as stop, command.hold_folder(config.out) as out:
        trainer = Trainer(config, make_world(config), stop)
        text = yaml.safe_dump(config_dict(config), sort_keys=False)
        checkpoint.write_text(out / "config.yaml", text)
        try:
            return 0, trainer.fit()
        except Interrupted as message:
            print(message, file=sys.stderr)
            return command.EXIT_INTERRUPTED, trainer.summary("interrupted")
        finally:
            trainer.close()


def main(argv=None):
    """Run the command and return its exit code; the last line on stdout is the summary."""
    try:
        code, summary = run(sys.argv[1:] if argv is None else argv)
    except (UserError, BetonError, checkpoint.CheckpointError) as error:
        print(command.one_line(error), file=sys.stderr)
        return command.EXIT_USER_ERROR
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(summary), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
