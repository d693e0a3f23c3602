"""Settings of training commands by group: data, model, methods, schedules, records, the machine.

YAML files and dotted overrides fill these frozen dataclasses. A field's docstring is its --help.
Raises UserError where values of one group contradict each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type  # isort: skip

from ffcv_ssl.errors import UserError

_BACKBONES = Path(__file__).parents[1] / "training" / "backbones"
# All of torchvision's. They are written down because its import takes as long as torch's own.
_RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
Workers = restricted_number_type("Workers", int, (">=", -1))
Minutes = restricted_number_type("Minutes", float, [(">", 0), ("<=", 7 * 24 * 60)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
MAX_SIDE_PX = 65535
Pixels = restricted_number_type("Pixels", int, [(">", 0), ("<=", MAX_SIDE_PX)])


@dataclass(frozen=True)
class DataConfig:
    """Which images to load, and how."""

    train: str = ""
    """The `.beton` file to train on. Labels serve only probes, k-NN and the labelled stream; label
    -1 means unlabelled."""
    val: str | None = None
    """The `.beton` file to evaluate on; null: no evaluation (without any labels, of the
    representation's health alone)."""
    image_field: str = "image"
    """Name of the image field."""
    label_field: str = "label"
    """Name of the integer field with the class. Without this field there are no probes."""
    batch_size: PositiveInt = 256
    """Images per step, over all ranks. Images of the labelled stream are added to them."""
    chunk_size: NonNegativeInt = 0
    """Images per forward pass and rank, for batches that do not fit on the device; 0: all at once.
    A first pass computes all embeddings, a second pass the same gradients (but for batch-norm)."""
    num_workers: Workers = -1  # type: ignore[valid-type]
    """Loader threads per rank; -1: with a GPU the rank's share of the cores (at most 16), on a CPU
    half of it."""
    batches_ahead: PositiveInt = 3
    """Number of batches that the loader prepares in advance."""
    order: Literal["random", "quasi_random", "sequential"] = "random"
    """Order of the training samples. Use quasi_random for files larger than memory."""
    os_cache: bool = True
    """Let the system cache the file. Set to false for files larger than memory."""
    on_error: Literal["raise", "replace"] = "raise"
    """A corrupt sample ends the run (raise), or another sample replaces it (counted)."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean to subtract from the pixels, on the 0..255 scale (default: ImageNet's)."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Standard deviation to divide pixels by, on the 0..255 scale (default: ImageNet's)."""


@dataclass(frozen=True)
class ResolutionConfig:
    """Side of the training views in pixels. It grows from epoch `start_ramp` to `end_ramp`."""

    min: PositiveInt = 224
    """The first resolution."""
    max: PositiveInt = 224
    """The last resolution. Evaluation uses it too, unless evaluation.resolution is set."""
    start_ramp: NonNegativeInt = 0
    """The resolution is `min` until this epoch. Then it grows linearly, rounded to 32 pixels."""
    end_ramp: NonNegativeInt = 0
    """The resolution is `max` from this epoch on."""

    def __post_init__(self):
        if self.min > self.max or self.start_ramp > self.end_ramp:
            remedy = f"--resolution.min {self.max}"
            if self.min <= self.max:
                remedy = f"--resolution.start_ramp {self.end_ramp}"
            raise UserError(
                f"resolution: got min {self.min}, max {self.max}, start_ramp {self.start_ramp}, "
                f"end_ramp {self.end_ramp}, expected min <= max and start_ramp <= end_ramp; give "
                f"{remedy}"
            )
        if self.max > MAX_SIDE_PX:
            raise UserError(f"resolution.max: got {self.max}, expected at most {MAX_SIDE_PX}")


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and projector."""

    backbone: str = "resnet50"
    """Name of a torchvision ResNet: resnet18, resnet50, resnext50_32x4d, wide_resnet50_2...; or
    tiny: two convolutions, for quick trials."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers. cifar: a 3x3 convolution of stride 1, no pooling; for images of about 32 px."""
    projector: str = "2048-512"
    """Widths of the projector's layers. Empty: no projector; the loss uses backbone features."""
    projector_norm: Literal["hidden", "all", "none"] = "hidden"
    """Which projector layers have batch-norm. In the last layer it has no shift (SimCLRv2)."""

    def __post_init__(self):
        if not re.fullmatch(r"([1-9]\d*(-[1-9]\d*)*)?", self.projector):
            raise UserError(
                f"model.projector: got {self.projector!r}, expected widths such as 2048-512"
            )
        known = [*(file.stem for file in _BACKBONES.glob("[!_]*.py")), *_RESNETS]
        if self.backbone not in known:
            expected = f"expected one of {', '.join(known)}"
            raise UserError(f"model.backbone: got {self.backbone!r}, {expected}")


@dataclass(frozen=True)
class SimCLRConfig:
    """Settings of SimCLR and of its instance-wise variant."""

    temperature: PositiveFloat = 0.15
    """Temperature of the softmax over similarities."""


@dataclass(frozen=True)
class VICRegConfig:
    """Weights of VICReg's terms."""

    invariance: NonNegativeFloat = 25.0
    """Weight of the mean squared difference between an image's two embeddings."""
    variance: NonNegativeFloat = 25.0
    """Weight of the hinge that keeps each feature's standard deviation above 1."""
    covariance: NonNegativeFloat = 1.0
    """Weight of the squared covariances between features."""


@dataclass(frozen=True)
class BarlowConfig:
    """Settings of Barlow Twins."""

    off_diagonal: NonNegativeFloat = 0.0025
    """Weight of the redundancy reduction term (lambda)."""


@dataclass(frozen=True)
class BYOLConfig:
    """Settings of BYOL. The predictor has the projector's widths."""

    momentum: ClosedUnitInterval = 0.996
    """The teacher's momentum at step 0; a cosine raises it to 1. The teacher's half-life is log 2 /
    (1 - momentum) steps: 173 at 0.996, too long for a short run."""
    predictor_lr: PositiveFloat | None = None
    """The predictor's learning rate, as a multiple of the peak rate; constant, without warm-up
    (Chen and He 2021). In short runs, a faster predictor keeps more directions of the embeddings
    alive. null: the same rate as the rest."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule of backbone and projector."""

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
    """Weight decay. It does not apply to biases and norm layers."""
    lars_lr: Literal["inside", "outside"] = "inside"
    """LARS: lr scales the momentum buffer's input (ours) or its output (FFCV-SSL, SSLight)."""
    lars_norm: Literal["joint", "separate"] = "joint"
    """LARS: the trust ratio divides by |g + wd p| (ours) or by |g| + wd |p| (suncet)."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Epochs of warm-up. The learning rate grows linearly at each step."""
    warmup_start: ClosedUnitInterval = 0.0
    """The warm-up starts at this fraction of the learning rate."""
    end_ratio: ClosedUnitInterval = 0.001
    """The cosine ends at this fraction of the learning rate."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest gradient norm over all parameters; larger gradients are scaled down. 0: no limit."""
    fused: bool | None = None
    """Update each weight in one pass over memory (SGD, AdamW). This is faster, most of all for
    small batches on a CPU, and rounds differently. null: as torch chooses."""

    def __post_init__(self):
        if self.name == "lars" and self.fused:
            raise UserError("optim.fused: got true with optim.name lars, expected sgd or adamw")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov: got true with momentum 0, expected momentum above 0")
        if self.name == "adamw" and max(self.betas) >= 1:
            raise UserError(f"optim.betas: got {list(self.betas)}, expected numbers below 1")


@dataclass(frozen=True)
class LabelsConfig:
    """Which labels of the training file the labelled stream may use."""

    scheme: Literal["bernoulli", "balanced", "file"] = "bernoulli"
    """bernoulli: draw each image independently; balanced: equally many of each class; file: the
    images listed in `file`."""
    fraction: PositiveFloat | None = None
    """Fraction of the labels, in (0, 1]; or give `count`."""
    count: PositiveInt | None = None
    """Number of labels; or give `fraction`."""
    file: str | None = None
    """Text file with image names or indices, one per line."""
    seed: Seed = 0  # type: ignore[valid-type]
    """Seed of the choice of labels. It does not depend on the run's seed."""


@dataclass(frozen=True)
class LabelledConfig:
    """The labelled stream: a second stream of images. It adds a supervised loss to any method."""

    loss: Literal["none", "suncet", "supcon", "cross_entropy"] = "none"
    """Loss of the labelled stream; none: no labelled stream."""
    weight: PositiveFloat = 1.0
    """Weight of this loss. The method's loss has weight 1."""
    temperature: PositiveFloat = 0.1
    """Temperature of suncet and supcon."""
    classes_per_batch: PositiveInt = 10
    """Classes per labelled batch, over all ranks."""
    images_per_class: PositiveInt = 10
    """Images of each class per labelled batch, over all ranks."""
    num_views: PositiveInt = 1
    """Views per labelled image: the first `num_views` of the run's views."""
    unique_classes_per_rank: bool = False
    """true: each rank holds other classes. false: each rank holds images of all classes."""
    unsupervised_batch_size: NonNegativeInt | None = None
    """Images per step for the method's loss; null: data.batch_size; 0: train on labels only."""
    supervised_epochs: NonNegativeFloat | None = None
    """The labelled stream ends after this many epochs; null: it never ends."""
    supervised_passes: NonNegativeFloat | None = None
    """The labelled stream ends after this many passes over the labels (or: supervised_epochs)."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)

    def __post_init__(self):
        if self.supervised_epochs is not None and self.supervised_passes is not None:
            got = f"got supervised_epochs {self.supervised_epochs} and supervised_passes"
            raise UserError(f"labelled: {got} {self.supervised_passes}, expected one of them")
        if self.unsupervised_batch_size == 0 and self.loss == "none":
            got = "got unsupervised_batch_size 0 and loss none"
            raise UserError(f"labelled: {got}: nothing to train on; choose a labelled.loss")
        ends = self.supervised_epochs is not None or self.supervised_passes is not None
        if self.unsupervised_batch_size == 0 and ends:
            got = "got unsupervised_batch_size 0 and an end of the labelled stream"
            raise UserError(f"labelled: {got}: nothing to train on after it; leave out the end")
        if self.loss in ("suncet", "supcon"):
            self._check_pairs()

    def _check_pairs(self):
        """A contrastive loss is always 0 without positives, and without negatives."""
        if self.classes_per_batch < 2:
            raise UserError(
                f"labelled.classes_per_batch: got {self.classes_per_batch}, expected at least 2 "
                f"for {self.loss}, which repels images of other classes; raise it"
            )
        if self.images_per_class * self.num_views < 2:
            raise UserError(
                f"labelled.images_per_class: got {self.images_per_class} with one view, expected "
                f"at least 2 for {self.loss}, which attracts images of a class; raise it, or "
                "labelled.num_views"
            )


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes on the backbone and each projector layer. They train with the run on view 0."""

    train: str | None = None
    """A `.beton` file of labelled images for probes and k-NN, where those to train on have no
    labels. The probes are then fitted anew at each evaluation, to at most evaluation.knn_bank
    images in centre crops. null: the labels of data.train."""
    val: str | None = None
    """The `.beton` file to evaluate probes and k-NN on; null: data.val."""
    stages: bool = False
    """Probes on the stages of a ResNet too, `layer1` to `layer4`, averaged over pixels."""
    lr: PositiveFloat = 1e-4
    """AdamW's learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on centre crops of the validation file, without augmentation."""

    every_epochs: PositiveInt = 1
    """Epochs between evaluations. The untrained and the final model are always evaluated."""
    resolution: PositiveInt | None = None
    """Side of the crops in pixels; null: resolution.max."""
    batch_size: PositiveInt = 256
    """Images per batch."""
    knn_k: NonNegativeInt = 20
    """Number of neighbours that vote; 0: no k-NN."""
    knn_temperature: PositiveFloat = 0.1
    """Each vote has the weight exp(similarity / temperature)."""
    knn_bank: PositiveInt = 20000
    """Number of training images in the k-NN bank (at most all). The run's seed draws them once."""
    health: bool = True
    """Measure how healthy the representation is, with labels or without: see docs/watching.md."""

    def __post_init__(self):
        if (self.resolution or 0) > MAX_SIDE_PX:
            got = f"got {self.resolution}"
            raise UserError(f"evaluation.resolution: {got}, expected at most {MAX_SIDE_PX}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save the run. It is always saved at the end of each epoch."""

    every_minutes: PositiveFloat = 10.0
    """Minutes between checkpoints within an epoch."""
    keep_every: NonNegativeInt = 0
    """Keep a copy of every N-th epoch, of epoch 0 (untrained) and of the last; 0: no copies."""


@dataclass(frozen=True)
class LogConfig:
    """What to report during training."""

    every_steps: PositiveInt = 50
    """Steps between log lines. Each epoch's end also has a log line."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project that shows the metrics, the settings and the views, too (pip install
    wandb). Set WANDB_MODE=offline where there is no network. null: none."""
    progress: Literal["auto", "plain", "none"] = "auto"
    """How to show what takes a while, and how long it will take. auto: one live line on a terminal,
    plain lines elsewhere and under torchrun and Slurm; plain: lines; none: neither."""


@dataclass(frozen=True)
class SystemConfig:
    """The device and how torch uses it."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the CUDA device if there is one."""
    share_device: bool = False
    """All ranks take the same CUDA device and meet on the host, to try several ranks out on one
    GPU: slow, and without NCCL."""
    torch_threads: NonNegativeInt = 0
    """Number of torch's CPU threads; 0: divide the cores among the ranks of a node. Losses are
    bit-equal only for equal numbers of threads."""
    tf32: bool = True
    """On a GPU, convolutions of float32 use TF32: 10 bits of mantissa instead of 23, several times
    as fast. Only precision fp32 has such convolutions. Matrix products are always exact."""
    sync_batchnorm: Literal["auto", "on", "off"] = "auto"
    """Whether batch-norm normalises over the images of all ranks or of each rank apart; auto: over
    all ranks on GPUs."""
    compile: bool = False
    """Compile the model with torch.compile. It does not affect evaluation or the saved weights."""
    patience_minutes: Minutes = 20.0  # type: ignore[valid-type]
    """How long ranks wait for one another, at most a week. A rank that does not answer for so long
    is lost: the others name it and end."""
    profile: NonNegativeInt = 0
    """Trace so many steps with torch's profiler, after the first five of a start, into
    trace_rank_0.json.gz... in the run's folder; look at it in https://ui.perfetto.dev."""

    def __post_init__(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            got = f"got {self.device!r}"
            raise UserError(f"system.device: {got}, expected auto, cpu, cuda or cuda:N")
