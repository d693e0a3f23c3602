"""Pretrained encoders from files: runs and weights of ours, state dicts of torchvision and timm.

Guarantees: every weight of the encoder comes from the file and is finite, nothing in the file is
executed, and a file of another architecture is refused with the first key that does not fit.
"""

# B images per batch, D features, H W pixels

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import checkpoint, weight_files
from ffcv_ssl.training.metrics_log import X_AXES, each_metric_from_the_end
from ffcv_ssl.training.models import STAGES, Model, has_stages, stage_widths
from ffcv_ssl.training.run_folder import CHECKPOINT
from ffcv_ssl.training.runtime import autocast
from ffcv_ssl.training.weight_files import kind

KEPT_COPY = re.compile(r"checkpoint_epoch_(\d+)\.pt")


@dataclass
class Encoder:
    """A pretrained model in evaluation mode, and where it comes from."""

    path: str
    """The file or folder, as it was asked for."""
    name: str
    """A short name for tables: the run's folder, with the epoch of a kept copy."""
    model: Model
    """Backbone and, where the file has them, the projector's blocks."""
    architecture: ModelConfig
    """What the model was made from; the file may have only the first of its projector's blocks."""
    config: dict[str, Any] | None = None
    """The run's configuration as nested dicts; None for a file that is not from a run of ours."""
    about: dict[str, Any] = field(default_factory=dict)
    """epoch, step, updates, images, views, flops, seconds of the run so far, where known."""
    precision: str = "fp32"
    """Of `encode`: fp32, or bf16 (autocast). Features are float32 in any case."""

    @property
    def widths(self) -> dict[str, int]:
        """D of each depth by name, `backbone` first; last, stages that were asked for."""
        return self.model.widths | self.model.stage_widths

    @property
    def arithmetic(self) -> str:
        """What `encode` computes in: its precision, or tf32 where float32 convolutions use TF32."""
        device = next(self.model.parameters()).device
        is_tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return "tf32" if is_tf32 and self.precision == "fp32" else self.precision

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) -> {depth: (B, D) float32}, without gradients, in evaluation mode."""
        self.model.eval()
        with autocast(self.precision, images.device):
            features = self.model.encode(images)
        return {depth: values.float() for depth, values in features.items()}

    def check_depths(
        self, depths: Collection[str], where: str = "depths", stages: bool = True
    ) -> None:
        """Raise UserError for a depth (a name) that this encoder does not have. With `stages`, the
        backbone's stages (`layer3`) are depths too: once asked for, `encode` hands them out."""
        if stages and not {*STAGES}.isdisjoint(depths) and has_stages(self.model.backbone):
            self.model.stage_widths = stage_widths(self.model.backbone)
        for depth in depths:
            if depth not in self.widths:
                raise UserError(
                    f"{where}: got {depth!r}, but {self.path} has no such depth; "
                    f"expected one of {', '.join(self.widths)}"
                )

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the weights as they are at the first use: equal for equal weights,
        whatever file they came from."""
        return weight_files.digest_of(self.model.state_dict())


def load_encoder(
    path: str | Path, model: ModelConfig | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """The encoder in a file, on `device`.

    path: a run's folder, its checkpoint.pt, a kept copy of it, a backbone.safetensors or
    finetuned.safetensors of ours, or a state dict of a torchvision or timm ResNet (.pth, .pt,
    .safetensors); prefixes of its names (`module.`, `backbone.`, `_orig_mod.`) and its classifier
    are left out. model: for files that do not name their architecture. Of BYOL, the student is
    loaded. Raises UserError for a file of something else, of another architecture, or with weights
    that are not floating point or not finite, CheckpointError for a file that cannot be read.
    """
    file = weight_files.find_file(path)
    state, about = weight_files.read_file(file)
    with checkpoint.needing(file, "what a run's file says of its network"):
        config, weights, architecture, known = _parts(file, state, about, model)
        if model is not None and kind(model) != kind(architecture):
            raise UserError(
                f"{file}: got a {kind(architecture)}, but --model asks for a {kind(model)}; "
                "leave out --model: the file names its network"
            )
        encoder = _build(file, architecture, *weights).eval()
    is_cuda = torch.device(device).type == "cuda"  # whose convolutions are faster channels-last
    layout = torch.channels_last if is_cuda else torch.contiguous_format
    encoder = encoder.to(device).to(memory_format=layout).requires_grad_(False)
    return Encoder(str(path), _name(file), encoder, architecture, config, known)


def _parts(
    file: Path, state: dict[str, Any], about: dict[str, str], model: ModelConfig | None
) -> tuple[dict[str, Any] | None, tuple[dict[str, torch.Tensor], str], ModelConfig, dict[str, Any]]:
    """(configuration, (weights, first name in the file), architecture, counters) of a file."""
    network = weight_files.network_in(file, state, about)
    weights = network.weights, network.first_key
    if network.config is not None and network.architecture is not None:
        known = _counters(state) | _epoch(file, state)
        return network.config, weights, network.architecture, known
    named = network.architecture or model
    if named is None:
        raise UserError(f"{file}: names no network; give --model.backbone (resnet50...)")
    config, known = _origin(file, about)
    return config, weights, named, known


def says_architecture(path: str | Path) -> bool:
    """Whether a file names its architecture, as files of ours do. Raises as `load_encoder`."""
    file = weight_files.find_file(path)
    state, about = weight_files.read_file(file)
    return bool(about) or weight_files.run_config(file, state) is not None


def save_encoder(
    path: str | Path, module: nn.Module, encoder: Encoder, about: dict[str, Any]
) -> None:
    """Write a network that was made from `encoder` (fine-tuned...) so that `load_encoder` reads it.

    module: a backbone, or a module with the parts `backbone` and `projector` of a Model and perhaps
    a `classifier`, which is kept in the file. about: as of an Encoder. Atomic, as safetensors.
    """
    model = encoder.architecture
    metadata = {
        "model": model.backbone, "stem": model.stem, "projector": model.projector,
        "projector_norm": model.projector_norm, "about": json.dumps(about),
        "config": json.dumps(encoder.config),
    }  # fmt: skip
    checkpoint.save_weights(path, module, metadata)


def keep_blocks(model: Model, count: int) -> None:
    """Remove all projector blocks of a Model after the first `count`, in place."""
    model.projector = model.projector[:count]
    model.widths = dict(list(model.widths.items())[: count + 1])


def _build(
    file: Path, config: ModelConfig, weights: dict[str, torch.Tensor], first_key: str
) -> Model:
    """The model that `config` describes, with as many projector blocks as the file has weights of.
    first_key: the first name in the file."""
    blocks = {int(key.split(".")[1]) for key in weights if re.match(r"projector\.\d+\.", key)}
    model = Model(config)
    keep_blocks(model, max(blocks, default=-1) + 1)
    weight_files.fill(model, weights, file, kind(config), first_key)
    return model


def _origin(file: Path, metadata: dict[str, str]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(configuration, counters) of the run that weights of ours are from; (None, {}) for others."""
    if {"config", "about"} <= metadata.keys():
        config, about = json.loads(metadata["config"]), json.loads(metadata["about"])
        if not isinstance(config, dict | None) or not isinstance(about, dict):
            raise TypeError("got config or about as no mapping")
        return config, about
    settings = file.with_name("config.yaml")
    if not metadata or not settings.is_file():
        return None, {}
    last = next(each_metric_from_the_end(file.parent), {})
    known = {axis: last[axis] for axis in X_AXES if axis in last}
    try:
        return read_yaml(settings), known
    except ValueError as error:
        raise UserError(f"{settings}: {error}") from None


def _counters(record: dict[str, Any]) -> dict[str, Any]:
    """{axis: number} of those of X_AXES that a state or a line of metrics has. Raises TypeError."""
    known = {axis: record[axis] for axis in X_AXES if axis in record}
    for axis, value in known.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{axis} is {value!r}")
    return known


def _epoch(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """{"epoch": E} of a run's checkpoint, by its name or the run's metrics; {} where unknown."""
    kept = KEPT_COPY.fullmatch(file.name)
    step = state.get("step")
    if kept or step == 0:
        return {"epoch": int(kept[1]) if kept else 0}
    for record in each_metric_from_the_end(file.parent) if step else []:
        if record["step"] and isinstance(record.get("epoch"), int | float):
            return {"epoch": round(step * record["epoch"] / record["step"], 6)}
    return {}


def _name(file: Path) -> str:
    """A file's short name."""
    kept = KEPT_COPY.fullmatch(file.name)
    if kept or file.name == CHECKPOINT or file.suffix == ".safetensors":
        return file.resolve().parent.name + (f" epoch {int(kept[1])}" if kept else "")
    return file.stem
