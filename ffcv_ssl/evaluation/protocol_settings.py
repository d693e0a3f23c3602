"""Settings that all protocols share: the checkpoint, the data, the labels, precision and machine.

A setting that is left open is taken from the pretraining run: images look as they did there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from ffcv_ssl.config import settings
from ffcv_ssl.config.renamed import Table
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.former_names import RENAMED


@dataclass(frozen=True)
class EvalData:
    """Which images, and how they are loaded; null: as in the checkpoint's run."""

    train: str | None = None
    """The `.beton` file to learn from."""
    val: str | None = None
    """The `.beton` file to measure on."""
    image_field: str | None = None
    """Name of the image field in both files; null: the run's, or `image`."""
    label_field: str | None = None
    """Name of the field with the class in both files; null: the run's, or `label`."""
    batch_size: PositiveInt = 256
    """Images per batch, over all ranks."""
    resolution_px: settings.Pixels | None = None
    """Side of the crops; null: that of the run's evaluation, or 224."""
    center_ratio: PositiveFloat | None = None
    """Side of the centre crop as a share of the image's short side; null: 224/256, or 1 where the
    run's images were small."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the pixels, on the 0..255 scale; null: the run's, or ImageNet's."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Pixels are divided by this, on the 0..255 scale; null: the run's, or ImageNet's."""
    num_workers: settings.Workers = -1
    """Loader threads per rank; -1: all cores with a GPU, half of the cores without one."""
    os_cache: bool = True
    """False for files larger than memory."""
    on_error: Literal["raise", "replace"] = "raise"
    """What a corrupt sample does: end the command, or be replaced by another sample (counted)."""

    def __post_init__(self) -> None:
        if self.center_ratio is not None and self.center_ratio > 1:
            raise UserError(f"data.center_ratio: got {self.center_ratio:g}, expected at most 1")


@dataclass(frozen=True)
class EvalLabels(settings.LabelsConfig):
    """Which labels of the training file may be used; all of them if nothing is given."""

    @property
    def is_all(self) -> bool:
        """Whether no choice was asked for; a seed alone chooses nothing."""
        return replace(self, seed=0) == EvalLabels()


@dataclass(frozen=True)
class Architecture:
    """The network of a file of weights that does not name it."""

    backbone: str | None = None
    """A ResNet of torchvision by name; null: the file names it."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels."""

    def resolve(self) -> settings.ModelConfig | None:
        """A ModelConfig without projector, or None. Raises UserError for an unknown name."""
        if self.backbone is None:
            return None
        return settings.ModelConfig(self.backbone, self.stem, projector="")


@dataclass(frozen=True)
class ProtocolConfig:
    """Settings of every protocol; a protocol's own dataclass adds to them."""

    RENAMED: ClassVar[Table] = RENAMED

    checkpoint: str = ""
    """A run's folder, a checkpoint, or a file of weights; the command takes several."""
    out: str | None = None
    """Folder of the results; null: the checkpoint's."""
    seed: settings.Seed = 0
    """Decides everything that is drawn, except the choice of labels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's forward pass; bf16 is autocast. For fp32 on a GPU see system.tf32."""
    model: Architecture = field(default_factory=Architecture)
    data: EvalData = field(default_factory=EvalData)
    labels: EvalLabels = field(default_factory=EvalLabels)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)


@dataclass(frozen=True)
class FrozenConfig(ProtocolConfig):
    """Settings of every protocol that measures features of a frozen network."""

    depths: list[str] = field(default_factory=lambda: ["backbone"])
    """Where the features are taken: backbone, projector_1 (after the projector's first layer)..."""
