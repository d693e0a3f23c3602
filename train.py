"""Self-supervised pretraining of an image encoder, in one file.

    python train.py --config configs/imagenette_cpu.yaml
    python train.py --config configs/simclr.yaml --out runs/a --data.train A.beton --optim.lr 0.5
    python train.py --config configs/simclr.yaml --method byol --views.view_0.blur_prob 0
    python train.py --config configs/simclr.yaml --method path/to/mine.py:MyMethod --mine.key 1
    torchrun --nproc_per_node 8 --max_restarts 3 train.py --config configs/simclr.yaml
    python train.py --config configs/simclr.yaml --slurm.partition gpu --slurm.gpus_per_node 8

One forward pass gives the features of every view. The method's loss trains backbone and projector,
perhaps together with a loss on a second stream of labelled images. Linear probes at every depth
train on the same features, detached. The run's folder holds `config.yaml`, `metrics.jsonl`,
`checkpoint.pt`, TensorBoard events, and at the end `report.png` and `backbone.safetensors`. The
same command again continues exactly where the run stopped, also in the middle of an epoch and on
another number of devices. The last line on stdout is JSON. Exit codes: 0 finished (also if it
already was), 75 interrupted with a checkpoint, 2 a user's mistake, 1 a loss that is not finite.
"""
# Shapes: B images per batch over all ranks, V views, D features, H W pixels, N rows, K classes.

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from ffcv_ssl.config import settings
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.errors import Interrupted
from ffcv_ssl.jobs import slurm
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.methods import EMATeacher, Features, Loss, Method, apply_head, find, make_mlp, stack
from ffcv_ssl.methods.numeric import center, cross_entropy, full_precision, mean_over, unit_rows
from ffcv_ssl.training import (
    checkpoint,
    command,
    console,
    data_parallel,
    gradient_cache,
    memory,
    runtime,
)
from ffcv_ssl.training.config_checks import check_enough_images, check_labels, check_run
from ffcv_ssl.training.health_check import pair_of
from ffcv_ssl.training.initial_weights import begin_with
from ffcv_ssl.training.labelled_stream import LabelledStream
from ffcv_ssl.training.meters import Averages, Counters, FiniteWatch, Interval, flops_by_px
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.online_evaluation import in_words, open_evaluation
from ffcv_ssl.training.optimizers import make_optimizer, resolution_at, set_lr
from ffcv_ssl.training.pace import Pace
from ffcv_ssl.training.probes import Probes, ProbeTrainer
from ffcv_ssl.training.resumption import begin_extension, free_settings
from ffcv_ssl.training.run_data import make_loader, rank_share
from ffcv_ssl.training.run_files import open_files
from ffcv_ssl.training.run_folder import CHECKPOINT
from ffcv_ssl.training.run_rules import RunRules
from ffcv_ssl.training.step_data import StepData, StepKind, Streams
from ffcv_ssl.training.view_pictures import ViewPictures
from ffcv_ssl.training.world import ALONE, World
from pipelines import Views, make_views, views_in_full

# ---- Configuration: YAML and dotted overrides; the groups are in ffcv_ssl/config/settings.py -----


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str | None = None
    """The run's folder; null: runs/NAME for configs/NAME.yaml."""
    seed: settings.Seed = 0  # type: ignore[valid-type]
    """Decides weights, order and views."""
    epochs: PositiveInt = 100
    """Passes over the training file; over the labels where they train alone."""
    extend: bool = False
    """Give a finished run more epochs; the schedules are drawn anew over all epochs."""
    init_from: str | None = None
    """Weights to begin with: a run's folder or file, or a state dict of torchvision or timm."""
    init_digest: str | None = None
    """Digest of the weights in init_from, which a run records; other weights are refused."""
    method: str = "simclr"
    """simclr, vicreg, barlow or byol; a file of ffcv_ssl/methods: supervised, instance_simclr,
    moco, simsiam; or your own: path/to/file.py:Class, package.module:Class."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 are autocast; fp16 scales its gradients. Losses are float32 in any case. For
    the convolutions of fp32 on a GPU see system.tf32."""
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
    labelled: settings.LabelledConfig = field(default_factory=settings.LabelledConfig)
    optim: settings.OptimConfig = field(default_factory=settings.OptimConfig)
    probes: settings.ProbeConfig = field(default_factory=settings.ProbeConfig)
    evaluation: settings.EvaluationConfig = field(default_factory=settings.EvaluationConfig)
    checkpoint: settings.CheckpointConfig = field(default_factory=settings.CheckpointConfig)
    log: settings.LogConfig = field(default_factory=settings.LogConfig)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)
    slurm: slurm.SlurmConfig = field(default_factory=slurm.SlurmConfig)

    @property
    def unlabelled_batch_size(self) -> int:
        """Images per step of the method's loss."""
        other = self.labelled.unsupervised_batch_size
        return self.data.batch_size if other is None else other

    @property
    def labelled_batch_size(self) -> int:
        """Images per step of the labelled stream; 0 where there is none."""
        if self.labelled.loss == "none":
            return 0
        return self.labelled.classes_per_batch * self.labelled.images_per_class


def check_config(config: Config) -> None:
    """Raise UserError for settings of different groups that do not go together."""
    check_run(config, method_class)


# ---- The network -------------------------------------------------------------------------------


class Learner(nn.Module):
    """All that gradients reach, in one pass: the model and the heads of its losses."""

    def __init__(self, model: Model, method: Method, classifier: nn.Module | None) -> None:
        super().__init__()
        self.model, self.method, self.classifier = model, method, classifier

    def forward(self, views: Sequence[Tensor], num_unlabelled: int) -> list[Features]:
        """Views (B, 3, H, W) -> the features of each; `embedding` is those of the last depth. The
        first `num_unlabelled` views are for the method's loss, the others of labelled images."""
        outputs = self.model(views)
        for features in outputs:
            features["embedding"] = features[self.model.last]
        self.method.add_heads(outputs[:num_unlabelled])
        if self.classifier is not None:
            for features in outputs[num_unlabelled:]:
                features["logits"] = self.classifier(features["backbone"])
        return outputs


# ---- Losses: pure functions of float32 embeddings; those with a `world` get a rank's part --------


class Contrast(NamedTuple):
    """Terms of contrastive losses for each anchor i: s_ik = sim(i, k)/t, j runs over the positives
    of i, k over all rows but i."""

    log_all_minus_positives: Tensor
    """log sum_k exp(s_ik) - log sum_j exp(s_ij)."""
    log_positives_minus_mean: Tensor
    """log sum_j exp(s_ij) - mean_j s_ij; 0 where there is one positive."""
    mean: Tensor
    """mean_j s_ij."""
    is_anchor: Tensor
    """Whether row i has a positive (bool)."""


def contrast(
    embeddings: Tensor, groups: Tensor, temperature: float, anchors: slice = slice(None)
) -> Contrast:
    """The terms of the rows `anchors` of (N, D). Rows of one group are positives of each other.
    groups: (N,) int64; a row of group -1 takes no part."""
    z = unit_rows(embeddings)
    logits = z[anchors] @ z.T / temperature  # (anchors, N)
    takes_part = groups >= 0
    is_positive = (groups[anchors, None] == groups) & takes_part
    is_negative = ~is_positive & takes_part
    is_positive[:, anchors].fill_diagonal_(False)
    number = is_positive.sum(dim=1)
    positives = logits.masked_fill(~is_positive, -math.inf).logsumexp(dim=1)
    positives = positives.masked_fill(number == 0, 0)
    negatives = logits.masked_fill(~is_negative, -math.inf).logsumexp(dim=1)
    mean = logits.masked_fill(~is_positive, 0).sum(dim=1) / number.clamp(min=1)
    all_minus_positives = F.softplus(negatives - positives)  # exact where it is small, too
    positives_minus_mean = (positives - mean).masked_fill(number < 2, 0)  # its gradient, too
    return Contrast(all_minus_positives, positives_minus_mean, mean, number > 0)


def suncet(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised noise contrastive estimation (Assran et al. 2021, eq. 2).

    l(i) = -log(sum_{j != i, same class} exp(sim(i, j)/t) / sum_{k != i} exp(sim(i, k)/t)), the mean
    over the anchors that have a positive. embeddings (N, D); labels (N,), -1: takes no part.
    """
    terms = contrast(embeddings, labels, temperature)
    return mean_over(terms.log_all_minus_positives, terms.is_anchor)


def supcon(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss with the sum over positives outside the logarithm (Khosla et al.
    2020, eq. 2): l(i) = -mean_j log(exp(sim(i, j)/t) / sum_{k != i} exp(sim(i, k)/t)).

    Inputs and mean over anchors as in `suncet`. This loss is an upper bound of suncet's.
    """
    terms = contrast(embeddings, labels, temperature)
    log_all_minus_mean = terms.log_all_minus_positives + terms.log_positives_minus_mean
    return mean_over(log_all_minus_mean, terms.is_anchor)


def nt_xent(embeddings: Tensor, temperature: float, world: World = ALONE) -> Loss:
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al. 2020, eq. 1).

    l(i, j) = -sim(i, j)/t + log sum_{k != i} exp(sim(i, k)/t), the mean over all VB anchors i and
    the V - 1 other views j of the same image. embeddings: (V, B of this rank, D), V >= 2. Returns
    the loss and its two terms, which add up to it. A rank computes the anchors of its own images.
    """
    num_views, batch, _ = embeddings.shape
    images = torch.arange(world.size * batch, device=embeddings.device).view(world.size, 1, batch)
    rows = full_precision(embeddings).flatten(0, 1)
    rows = world.gather(rows, partial=True)  # by rank, view and image
    own = slice(world.rank * num_views * batch, (world.rank + 1) * num_views * batch)
    terms = contrast(rows, images.expand(-1, num_views, -1).flatten(), temperature, own)
    log_all_minus_mean = terms.log_all_minus_positives + terms.log_positives_minus_mean
    loss = world.mean(log_all_minus_mean.mean())
    alignment = -world.mean(terms.mean.detach().mean())
    return loss, {"alignment": alignment, "uniformity": loss.detach() - alignment}


def vicreg(
    z: Tensor,
    z2: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    world: World = ALONE,
) -> Loss:
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, eq. 1 to 6). z, z2 (B of
    this rank, D).

    25 mean (z - z2)^2 + 25 mean_d relu(1 - sqrt(var + 1e-4)), averaged over both views, + the sum
    of squared off-diagonal covariances / D, summed over both. Unbiased variances and covariances.
    """
    z, z2 = full_precision(z), full_precision(z2)
    terms: dict[str, Any] = {"invariance": world.mean(F.mse_loss(z, z2))}
    terms |= {"variance": 0.0, "covariance": 0.0}
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    degrees = max(1, len(z) * world.size - 1) / world.size
    for view in (center(z, world), center(z2, world)):
        products = world.mean(view.T @ view) / degrees  # (D, D)
        spread = (products.diagonal() + 1e-4).sqrt()  # (D,)
        terms["variance"] = terms["variance"] + F.relu(1 - spread).mean() / 2
        products = products.masked_fill(itself, 0)
        terms["covariance"] = terms["covariance"] + products.square().sum() / z.shape[1]
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return sum(weights[name] * term for name, term in terms.items()), terms


def barlow_twins(z: Tensor, z2: Tensor, off_diagonal: float = 0.0025, world: World = ALONE) -> Loss:
    """Barlow Twins (Zbontar et al. 2021, eq. 1): the cross-correlation becomes the identity.

    c = bn(z)^T bn(z2) / B, loss = sum (c_ii - 1)^2 + lambda sum_{i != j} c_ij^2. z, z2 (B of this
    rank, D); bn over all ranks, without affine parameters, biased variance, eps 1e-5.
    """
    views = [center(z, world), center(z2, world)]
    powers = [world.mean(view.square().mean(dim=0), partial=True) for view in views]
    normed = [view / (power + 1e-5).sqrt() for view, power in zip(views, powers)]
    c = world.mean(normed[0].T @ normed[1] / len(z))  # (D, D)
    on = (c.diagonal() - 1).square().sum()
    off = c.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), 0).square().sum()
    return on + off_diagonal * off, {"on_diagonal": on, "off_diagonal": off}


def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's regression (Grill et al. 2020, eq. 2): 2 - 2 cos(prediction of one view, target of the
    other), the mean over images, the sum over both directions. (V, B, D) each, V >= 2; more views
    than two average over the pairs. Targets get no gradient.
    """
    p, t = unit_rows(predictions), unit_rows(targets.detach())
    num_views = len(p)
    pairs = [(v, w) for v in range(num_views) for w in range(num_views) if v != w]
    losses = [(p[v] - t[w]).square().sum(-1).mean() for v, w in pairs]
    return 2 * sum(losses[1:], losses[0]) / len(pairs)


# ---- Methods: what a step does with the features; others are in ffcv_ssl/methods/ --------------


class SimCLR(Method):
    """Views of one image attract, all other images of the batch repel."""

    group, Settings = "simclr", settings.SimCLRConfig
    max_views, min_batch = 12, 2

    def loss(self, outputs: list[Features], labels: Tensor | None) -> Loss:
        return nt_xent(stack(outputs), self.settings.temperature, self.world)


class VICReg(Method):
    """Embeddings of an image agree, spread, and do not repeat one another's features."""

    group, Settings = "vicreg", settings.VICRegConfig
    min_batch = 2

    def loss(self, outputs: list[Features], labels: Tensor | None) -> Loss:
        weights, (z, z2) = self.settings, stack(outputs)
        terms = (weights.invariance, weights.variance, weights.covariance)
        return vicreg(z, z2, *terms, self.world)


class BarlowTwins(Method):
    """Features correlate with themselves across views, and with no others."""

    group, Settings = "barlow", settings.BarlowConfig
    min_batch = 2

    def loss(self, outputs: list[Features], labels: Tensor | None) -> Loss:
        z, z2 = stack(outputs)
        return barlow_twins(z, z2, self.settings.off_diagonal, self.world)


class BYOL(Method):
    """From one view, a predictor predicts the teacher's embedding of the other view.

    The teacher averages weights only; its batch-norm uses the statistics of its own batches.
    """

    group, Settings = "byol", settings.BYOLConfig
    max_views = 12

    def __init__(self, config: Config, model: Model, num_classes: int, world: World) -> None:
        super().__init__(config, model, num_classes, world)
        self.teacher = EMATeacher(model, self.settings.momentum, schedule="cosine")
        width = model.widths[model.last]
        widths = config.model.projector or str(width)
        # no batch-norm at its end, which makes training unstable (Chen and He 2021, 4.4)
        norm = "none" if config.model.projector_norm == "none" else "hidden"
        self.predictor = nn.Sequential(*make_mlp(widths, width, norm))

    def add_heads(self, outputs: list[Features]) -> None:
        apply_head(self.predictor, outputs, "prediction")

    def targets(self, views: list[Tensor]) -> list[Features]:
        return [{"target": embedding} for embedding in self.teacher(views)]

    def loss(self, outputs: list[Features], labels: Tensor | None) -> Loss:
        predictions, targets = (self.all_gather(outputs, n) for n in ("prediction", "target"))
        return byol(predictions, targets), {}

    def constant_lr(self) -> dict[nn.Module, float]:
        multiple = self.settings.predictor_lr
        return {} if multiple is None else {self.predictor: multiple}

    def after_update(self, model: nn.Module, progress: float) -> None:
        self.teacher.move(model, progress)

    def extra_flops(self, sides_px: list[int]) -> int:
        return self.teacher.flops(sides_px)


METHODS = {"simclr": SimCLR, "vicreg": VICReg, "barlow": BarlowTwins, "byol": BYOL}


def method_class(name: str) -> type[Method]:
    """A method of this file, of ffcv_ssl/methods/, or of the user's. Raises UserError."""
    return METHODS[name] if name in METHODS else find.find_method(name, tuple(METHODS))


def labelled_loss(
    outputs: Sequence[Features], labels: Tensor, config: Config, world: World
) -> Tensor:
    """The labelled stream's loss over all ranks; outputs of its views, labels (B of this rank,)."""
    kind, temperature = config.labelled.loss, config.labelled.temperature
    name = "logits" if kind == "cross_entropy" else "embedding"
    rows = world.gather(torch.cat([features[name] for features in outputs]))
    labels = world.gather(labels.repeat(len(outputs)))
    if kind == "cross_entropy":
        return cross_entropy(rows, labels)
    return {"suncet": suncet, "supcon": supcon}[kind](rows, labels, temperature)


# ---- The run -------------------------------------------------------------------------------------


def clean_view(config: Config) -> dict[str, list]:
    """The ops of the only view of an evaluation, by name: a centre crop."""
    views = Views(recipe="evaluation", small_images=config.views.small_images).resolve()
    return make_views(views, config.evaluation.resolution or config.resolution.max)


class Trainer:
    """A run: its state, a step, an epoch, an evaluation, and how it is saved and resumed.

    `__init__` restores the state of the folder's checkpoint, or starts at step 0; `fit` trains to
    the end. `step` counts batches; `updates` leaves out the batches that fp16 skipped.
    """

    def __init__(self, config: Config, world: World, stop: command.StopSignal) -> None:
        self.config, self.world = config, world
        self.files = open_files(config.data, config.probes)
        self.train_set, on_record = self.files.train, self.files.on_record()
        others = find.groups_of_others(method_class(config.method), METHODS)
        free = free_settings(config, others)
        self.folder, saved = runtime.open_folder(
            str(config.out), config_dict(config), on_record, world, *free, complete=views_in_full
        )
        self.views = config.views.resolve()
        self._build_loaders()
        self._build_model(saved)
        self._build_evaluation()
        ops = make_views(self.views, config.resolution.max)
        self.pictures = ViewPictures(self.folder, self.train_set, config, ops, self.views, world)
        self.done, self.averages = Counters(self.steps_per_epoch), Averages()
        self.interval = Interval(world.device, self.streams.loaders)
        self.pace = Pace(config, self.steps_per_epoch, self.evaluation, world)
        self.watch = FiniteWatch(world.device)
        # all ranks have the same loss, so only that of the first rank counts
        self.one = torch.full((), float(world.is_first), device=world.device)
        self.tracer = runtime.Tracer(self.folder.path, config.system.profile, world)
        self.saver = runtime.Saver(
            self.folder, self._state, lambda: f"step {self.step}",
            config.checkpoint.every_minutes, world, stop,
        )  # fmt: skip
        self.folder.begin(saved, self._start, self._restore)

    @property
    def step(self) -> int:
        """Batches trained on so far."""
        return self.done.step

    def _build_loaders(self):
        config, train, world = self.config, self.train_set, self.world
        check_labels(config, method_class(config.method), train)
        ops = make_views(self.views, config.resolution.max)
        self.loader = self.labelled = None
        if config.unlabelled_batch_size:
            share = rank_share("data.batch_size", config.unlabelled_batch_size, world)
            self.loader = make_loader(
                train, config.data, ops, world, config.channels_last, drop_last=True,
                seed=config.seed, order=OrderOption[config.data.order.upper()], batch_size=share,
            )  # fmt: skip
        if config.labelled.loss != "none":
            first = dict(list(ops.items())[: config.labelled.num_views])
            self.labelled = LabelledStream(
                config.labelled, train, config.data, first, config.seed, world, config.channels_last
            )
        gradient_cache.check_parts(
            config, [v.size_px(config.resolution.max) for v in self.views.values()], world
        )
        self.streams = Streams(
            self.loader, self.labelled, self.views, config.labelled.num_views,
            config.data.label_field, config.epochs,
        )  # fmt: skip
        self.steps_per_epoch = self.streams.steps_per_epoch
        self.total_steps = self.streams.total_steps
        check_enough_images(train, config.unlabelled_batch_size, self.steps_per_epoch, world)
        if self.labelled is not None:
            world.say(self.streams.describe_labelled())

    def _build_model(self, saved):
        config, device, num_classes = self.config, self.world.device, self.train_set.num_classes
        torch.manual_seed(config.seed)
        self.model, classifier = Model(config.model, config.probes.stages), None
        self.folder.config["init_digest"] = begin_with(self.model, config, saved, self.world)
        method = method_class(config.method)
        self.method = method(config, self.model, num_classes, self.world)
        self.method_source = None if config.method in METHODS else find.source_digest(method)
        if config.labelled.loss == "cross_entropy":
            classifier = nn.Linear(self.model.widths["backbone"], num_classes)
        learner = Learner(self.model, self.method, classifier)
        self.flops_by_px = flops_by_px(learner, self.method, self.views, config)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.learner = learner.to(device, memory_format=self.layout)
        self.scaler = runtime.LossScaler(device, enabled=config.precision == "fp16")
        constant, scaled = self.method.constant_lr(), self.scaler.is_enabled()
        self.optimizer = make_optimizer(config.optim, self.learner, constant, scaled)
        self.probes = None
        if self.files.probes is None and self.train_set.labels is not None:
            probes = Probes(self.model.widths, num_classes, self.model.stage_widths).to(device)
            self.probes = ProbeTrainer(probes, config.probes, self.world)
        # some steps give no gradients to the classifier (its stream ended) or heads (labels alone)
        unreached = classifier is not None or self.loader is None
        self.network = data_parallel.share_learning(learner, self.world, config.system, unreached)

    def _build_evaluation(self):
        config = self.config
        pair = make_views(pair_of(self.views), config.resolution.max)
        self.evaluation = open_evaluation(
            self.files, config.data, config.evaluation, clean_view(config), pair, config.seed,
            self.world, config.channels_last,
        )  # fmt: skip

    # -- training

    @memory.names_out_of_memory("data.batch_size, data.chunk_size or resolution.max")
    def fit(self) -> dict[str, Any]:
        """Train to the end, evaluating on the way. Raises Interrupted with the checkpoint on disk.

        A resumed run does the same between two epochs as an uninterrupted one: the folder tells
        what is still to be done at an epoch's end.
        """
        if self.world.device.type == "cuda" and self.step < self.total_steps:
            self._try_largest_step()
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

    def _try_largest_step(self):
        """See whether a step at `resolution.max` fits into memory, before hours of smaller ones."""
        noise = (self.config, self.train_set, self.world, self.layout)
        self.learner.train()
        mib = memory.try_step(
            lambda: self._backward(self.streams.largest(*noise)), self.learner, self.optimizer
        )
        self.world.say(f"memory of a step at {self.config.resolution.max} px: {mib} MiB")

    def _train_epoch(self, epoch):
        px = resolution_at(epoch, self.config.resolution)
        self.learner.train()
        self.interval.start()
        end = (epoch + 1) * self.steps_per_epoch
        steps = self.interval.timed(self.streams.steps(self.step, px))
        steps = self.pace.steps(steps, self.step)
        for data in self.tracer.around(steps):
            self._train_step(data, px)
            if self.step % self.config.log.every_steps == 0 or self.step == end:
                self._log(px)
            if self.step < end:  # the end is saved below, when the loader too has ended the epoch
                self.saver.save_if_due(self.step)
        assert self.step == end, f"the loader ended the epoch at step {self.step} instead of {end}"
        self.saver.save()
        self.saver.exit_if_asked()

    def _train_step(self, data: StepData, px: int) -> None:
        config, progress = self.config, self.step / self.total_steps
        batch_size = config.unlabelled_batch_size or config.labelled_batch_size
        epochs, steps_per_epoch = config.epochs, self.steps_per_epoch
        set_lr(self.optimizer, self.step, config.optim, batch_size, epochs, steps_per_epoch)
        self.method.before_step(progress, self.optimizer)
        outputs, loss, terms = self._backward(data)
        self.scaler.unscale_(self.optimizer)
        self.method.after_backward(progress)
        self._update()
        self.method.after_update(self.model, (self.step + 1) / self.total_steps)
        self.averages.add_losses(loss, terms, self.one)
        if self.probes is not None:  # they train on the first view
            first = data.labelled if data.kind is StepKind.LABELS_ALONE else data.unlabelled
            self.probes.train_step(outputs[0], first.labels, self.averages)
        self.watch.see(loss, self.step + 1)
        flops, labelled_flops = self.flops_by_px[px]
        self.interval.images += self.done.add_step(
            (data.unlabelled.number * self.world.size, len(self.views), flops),
            (data.labelled.number * self.world.size, config.labelled.num_views, labelled_flops),
        )

    def _backward(self, data: StepData) -> tuple[list[Features], Tensor, dict[str, Tensor]]:
        """Leave the gradients of the loss in the parameters; returns (outputs, loss, terms). Large
        batches are computed in parts: see ffcv_ssl/training/gradient_cache.py."""
        num_unlabelled = len(data.unlabelled.views)
        views = [*data.unlabelled.views, *data.labelled.views]
        parts = gradient_cache.split_views(views, self.config.data.chunk_size)
        if len(parts) == 1:
            outputs = self._forward(self.network, views, num_unlabelled)
            loss, terms = self._loss(outputs, data)
            self.scaler.scale(loss).backward()
            return outputs, loss, terms
        with torch.no_grad():
            outputs = gradient_cache.join_parts(
                [self._forward(self._learner_once, part, num_unlabelled) for part in parts]
            )
        loss, terms = self._loss(outputs, data)
        self.scaler.scale(loss).backward()
        for number, part in enumerate(parts):
            with data_parallel.average_gradients(self.network, now=number == len(parts) - 1):
                with self._autocast():
                    again = self.network(part, num_unlabelled)
                gradient_cache.backward_part(again, outputs, number, len(parts))
        return outputs, loss, terms

    def _forward(self, network, views, num_unlabelled):
        """The features of all views from `network`, with the method's targets."""
        with self._autocast():
            outputs = network(views, num_unlabelled)
            if num_unlabelled:
                chosen = self.method.target_views
                chosen = range(num_unlabelled) if chosen is None else chosen
                targets = self.method.targets([views[v] for v in chosen])
                for v, features in zip(chosen, targets):
                    outputs[v].update(features)
        return outputs

    def _learner_once(self, views, num_unlabelled):
        """The learner in the first of two passes; only the second updates running statistics."""
        with gradient_cache.frozen_statistics(self.learner):
            return self.learner(views, num_unlabelled)

    def _loss(self, outputs, data):
        """The loss of the global batch and its named terms; in float32, outside autocast."""
        if data.kind is StepKind.UNLABELLED:
            return self.method.loss(outputs, data.unlabelled.labels)
        name, weight = self.config.labelled.loss, self.config.labelled.weight
        num_unlabelled = len(data.unlabelled.views)
        of_labels = labelled_loss(
            outputs[num_unlabelled:], data.labelled.labels, self.config, self.world
        )
        if data.kind is StepKind.LABELS_ALONE:
            return weight * of_labels, {name: of_labels}
        loss, terms = self.method.loss(outputs[:num_unlabelled], data.unlabelled.labels)
        return loss + weight * of_labels, {**terms, name: of_labels}

    def _update(self):
        """A step of the optimizer; fp16 skips it where a gradient overflows."""
        clip = self.config.optim.clip_norm
        if clip:
            nn.utils.clip_grad_norm_(self.learner.parameters(), clip, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.updates += 1

    def _autocast(self):
        return runtime.autocast(self.config.precision, self.world.device)

    # -- evaluation and records

    def _evaluate_if_due(self, epoch):
        is_due = epoch % self.config.evaluation.every_epochs == 0 or epoch == self.config.epochs
        if is_due:
            self.pictures.write(self.step, epoch)
        if self.evaluation is None or not is_due:
            return
        if self.world.from_first(self.folder.has_evaluation(self.step)):
            return
        self.learner.eval()
        self.world.broadcast_(self.learner.buffers())  # those of the checkpoint
        probes = self.probes and self.probes.probes
        with self.pace.evaluation(self.step) as phase:
            seen = phase.counting(self.saver.exit_if_asked, self.config.evaluation.batch_size)
            results = self.evaluation.run(self._encode, probes, seen)
        self.folder.write({**self.done.record(), **results})
        self.world.say(f"epoch {epoch}/{self.config.epochs}  {in_words(results)}")

    def _encode(self, images):
        with self._autocast():
            return self.model.encode(images)

    def _log(self, px):
        self._check_finite()
        means, speed = self.averages.take(self.world), self.interval.take(self.world)
        lr = self.optimizer.param_groups[0]["lr"]
        record = {**self.done.record(), "resolution": px, "lr": lr, **means, **speed}
        self.folder.write(record)
        line = runtime.log_line(self.step, self.total_steps, record)
        self.world.say(line + self.pace.describe(self.step))

    def _check_finite(self):
        """Raise NonFiniteLoss if a loss or a weight is not finite; waits for the device."""
        how = f"lr {self.optimizer.param_groups[0]['lr']:.4g}, {self.config.precision}"
        kept = f"{CHECKPOINT} still holds {self.saver.saved_position}, with finite weights"
        self.done.updates -= self.scaler.take_skipped()
        self.watch.check(self.learner.parameters(), self.step, self.folder.path, how, kept)

    def _finish(self):
        """Leave the run's picture and the backbone, and return the summary."""
        config = self.config
        if not self.folder.is_finished:
            ops = make_views(self.views, config.resolution.max)
            samples = self.train_set.sample_views(ops, config.data.image_field, config.seed)
            about = {"model": config.model.backbone, "stem": config.model.stem}
            self.folder.finish(samples, self.model.backbone, about, self.step)
        return self.summary("finished")

    def summary(self, status: str) -> dict[str, Any]:
        """What the last line on stdout says: counters, last losses and last evaluation."""
        shown = self.folder.latest("train/", "val/", "health/")
        return {"status": status, "out": str(self.folder.path), **self.done.record(), **shown}

    # -- saving and resuming

    def _parts(self):
        """Everything with a state_dict of its own, by its name in the checkpoint."""
        parts = {
            "model": self.model, "method": self.method, "classifier": self.learner.classifier,
            "optimizer": self.optimizer, "scaler": self.scaler, "probes": self.probes,
            "loader": self.loader, "labelled": self.labelled and self.labelled.loader,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self):
        self._check_finite()
        state = {name: part.state_dict() for name, part in self._parts().items()}
        if self.method_source is not None:
            state["method_source"] = self.method_source
        return {**state, **self.done.state_dict(), "averages": self.averages.over_ranks(self.world)}

    def _start(self):
        """Begin at step 0."""
        config = self.config
        self.folder.open_log(None, config.log)
        self.saver.save()
        step = self.streams.describe_step(config.unlabelled_batch_size, config.labelled_batch_size)
        steps = f"{config.epochs} epochs of {self.steps_per_epoch} steps"
        self.world.say(f"{self.folder.path}: {steps}, {step}")

    def _restore(self, saved):
        folder, steps = self.folder, self.steps_per_epoch
        begin_extension(folder, saved, self.config, steps, self.world)
        self.done.load_state_dict(saved)
        self.saver.mark_saved()
        for name, part in self._parts().items():
            if name != "loader" or self.step % self.steps_per_epoch:  # between epochs: set_epoch
                part.load_state_dict(saved[name])
        self.averages.load(saved["averages"], self.world)
        self.folder.open_log(self.step, self.config.log)
        checkpoint.restore_rng_state(saved["rng"])
        if self.step < self.total_steps:
            self.world.say(f"{self.folder.path}: resumed at step {self.step} of {self.total_steps}")
        for note in self.folder.notes(saved, self.config.method, self.method_source):
            self.world.say(note)

    def close(self) -> None:
        """End the loaders' threads and the log."""
        loaders = (self.loader, self.labelled, self.evaluation, self.pictures)
        for part in (*loaders, self.tracer, self.folder):
            if part is not None:
                part.close()


# ---- Command line --------------------------------------------------------------------------------


def read_config(argv: Sequence[str]) -> Config:
    """The command line as a Config, with its method's settings and its folder. Raises UserError."""
    return read_with_notes(argv)[0]


def read_with_notes(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """`read_config`, and lines that say what it chose: see ffcv_ssl/training/run_rules.py."""
    config_class, unread = find.settings_for(argv, Config, METHODS)
    summary, rules = __doc__.split("\n")[0], RunRules(config_class(), Views)
    about = ("train.py", summary, check_config, unread, rules)
    config, _ = parse_config(config_class, argv, *about)
    config = replace(config, out=rules.out) if config.out is None else config
    return config, rules.notes(config)


def config_class_of(method: str) -> type[Config]:
    """Config with the settings of the method of that name. Raises UserError."""
    return find.with_settings(Config, method_class(method))


def run(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the command: returns (exit code, summary)."""
    if slurm.is_batch(argv):
        return 0, slurm.submit_batch(argv, lambda line: [slurm.job_of(read_config(line), __file__)])
    config, notes = read_with_notes(argv)
    if slurm.wants_submission(config):
        return 0, slurm.submit(config, __file__)
    world = slurm.join(config.system)
    shown = console.showing(config.log.progress, world)
    with world, shown, command.StopSignal() as stop, runtime.hold(str(config.out), world):
        for note in notes:
            world.say(note)
        trainer = Trainer(config, world, stop)
        trainer.folder.write_config()
        try:
            return 0, trainer.fit()
        except Interrupted as message:
            world.say(message, sys.stderr)
            return command.EXIT_INTERRUPTED, trainer.summary("interrupted")
        finally:
            trainer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the last line on stdout is the summary."""
    return command.run_ranks(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
