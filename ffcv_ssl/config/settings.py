"""Settings of training commands by group: data, model, methods, schedules, records, the machine.

Frozen dataclasses that YAML files and dotted overrides fill; a field's docstring is its --help.
Raises UserError where values of one group do not go together.
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
Workers = restricted_number_type("Workers", int, (">=", -1))


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
    """Images a step, over all ranks; labelled ones of their own stream come on top."""
    chunk_size: NonNegativeInt = 0
    """Images a forward pass and rank, for batches that do not fit on the device at once: embeddings
    first, then gradients (two passes, the same gradients but for batch-norm); 0: all at once."""
    num_workers: Workers = -1  # type: ignore[valid-type]
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
    """A ResNet of torchvision by name: resnet18, resnet50, resnext50_32x4d, wide_resnet50_2...; or
    tiny, two convolutions to try things out."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels."""
    projector: str = "2048-512"
    """Widths of the projector's layers; empty: none, the loss sees the backbone's features."""
    projector_norm: Literal["hidden", "all", "none"] = "hidden"
    """Which of its layers have batch-norm; the last one's is without shift (SimCLRv2)."""

    def __post_init__(self):
        if not re.fullmatch(r"([1-9]\d*(-[1-9]\d*)*)?", self.projector):
            raise UserError(f"model.projector: got {self.projector!r}, expected widths: 2048-512")
        known = [file.stem for file in _BACKBONES.glob("[!_]*.py")]
        if self.backbone in known:
            return
        import torchvision  # slow to import

        known += torchvision.models.list_models(torchvision.models, "*resne*t*")
        if self.backbone not in known:
            expected = f"expected one of {', '.join(known)}"
            raise UserError(f"model.backbone: got {self.backbone!r}, {expected}")


@dataclass(frozen=True)
class SimCLRConfig:
    """SimCLR's settings, and those of its instance-wise variant."""

    temperature: PositiveFloat = 0.15
    """Temperature of the softmax over similarities."""


@dataclass(frozen=True)
class VICRegConfig:
    """VICReg's weights."""

    invariance: NonNegativeFloat = 25.0
    """Of the mean squared difference between an image's two embeddings."""
    variance: NonNegativeFloat = 25.0
    """Of the hinge that keeps each feature's standard deviation above 1."""
    covariance: NonNegativeFloat = 1.0
    """Of the squared covariances between features."""


@dataclass(frozen=True)
class BarlowConfig:
    """Barlow Twins' settings."""

    off_diagonal: NonNegativeFloat = 0.0025
    """Weight of the redundancy reduction term (lambda)."""


@dataclass(frozen=True)
class BYOLConfig:
    """BYOL's settings; its predictor has the projector's widths."""

    momentum: ClosedUnitInterval = 0.996
    """The teacher's momentum at step 0; a cosine takes it to 1. Its half-life is log 2 / (1 -
    momentum) steps: 173 at 0.996, too long for a short run."""
    predictor_lr: PositiveFloat | None = None
    """The predictor's learning rate as a multiple of the peak of the others, constant and without
    warm-up, as Chen and He 2021 keep theirs. A predictor that stays ahead of its encoder keeps more
    directions alive in a short run. None: as the others."""


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
    """Epochs in which the rate grows linearly, by step."""
    warmup_start: ClosedUnitInterval = 0.0
    """The warm-up starts at the rate times this."""
    end_ratio: ClosedUnitInterval = 0.001
    """The cosine ends at the rate times this."""
    clip_norm: NonNegativeFloat = 0.0
    """Gradients of a larger norm, over all parameters, are scaled down to it; 0: never."""

    def __post_init__(self):
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov: got true with momentum 0, expected momentum above 0")
        if self.name == "adamw" and max(self.betas) >= 1:
            raise UserError(f"optim.betas: got {list(self.betas)}, expected numbers below 1")


@dataclass(frozen=True)
class LabelsConfig:
    """Which labels of the training file the labelled stream may use."""

    scheme: Literal["bernoulli", "balanced", "file"] = "bernoulli"
    """bernoulli: each image on its own; balanced: as many of each class; file: those listed."""
    fraction: PositiveFloat | None = None
    """Share of the labels, in (0, 1]; or give `count`."""
    count: PositiveInt | None = None
    """Number of labels; or give `fraction`."""
    file: str | None = None
    """Text file with the images' names, or their indices, one a line."""
    seed: NonNegativeInt = 0
    """Decides which labels are drawn; independent of the run's seed."""


@dataclass(frozen=True)
class LabelledConfig:
    """A second stream of images whose labels train the model too, beside any method."""

    loss: Literal["none", "suncet", "supcon", "cross_entropy"] = "none"
    """none: there is no such stream."""
    weight: PositiveFloat = 1.0
    """Weight of this loss beside the method's."""
    temperature: PositiveFloat = 0.1
    """Temperature of suncet and supcon."""
    classes_per_batch: PositiveInt = 10
    """Classes in a batch, over all ranks."""
    images_per_class: PositiveInt = 10
    """Images of each of them, over all ranks."""
    num_views: PositiveInt = 1
    """Views of each image: the first so many of the run's views."""
    unique_classes_per_rank: bool = False
    """Ranks hold different classes of a batch, instead of different images of all its classes."""
    unsupervised_batch_size: NonNegativeInt | None = None
    """Images a step of the method's own loss; null: data.batch_size; 0: train on labels alone."""
    supervised_epochs: NonNegativeFloat | None = None
    """Epochs after which this stream ends and costs nothing; null: it never does."""
    supervised_passes: NonNegativeFloat | None = None
    """Passes over the labels after which it ends, instead of supervised_epochs."""
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
            raise UserError(f"labelled: {got}: nothing to train on then; leave out the end")


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
    """Threads of torch on the CPU; 0: the cores, shared among the ranks of a node. Losses are
    bit-equal for equal numbers only."""
    compile: bool = False
    """Compile the model with torch.compile; evaluation and the resulting weights are unaffected."""

    def __post_init__(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            got = f"got {self.device!r}"
            raise UserError(f"system.device: {got}, expected auto, cpu, cuda or cuda:N")
