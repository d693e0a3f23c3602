"""Pretrained encoders from files: runs and weights of ours, state dicts of torchvision and timm.

Guarantees: every weight of the encoder comes from the file and is finite, nothing in the file is
executed, and a file of another architecture is refused with the first key that does not fit.
"""

# B images per batch, D features, H W pixels

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.checksums import weights_damage
from ffcv_ssl.training.metrics_log import X_AXES, each_metric_from_the_end
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT
from ffcv_ssl.training.runtime import autocast

PREFIXES = ("module.", "backbone.")
"""Before the names of weights that torch's data parallelism and other toolkits save."""
COMPILED = "_orig_mod."
"""Before the name of any part that was compiled by torch.compile."""
HEADS = ("fc.", "classifier.")
"""Not part of an encoder."""
FINETUNED = "finetuned.safetensors"
"""The network of a fine-tuning, in its run's folder."""
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
        """D of each depth by name, `backbone` first."""
        return self.model.widths

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

    def check_depths(self, depths: Iterable[str], where: str = "depths") -> None:
        """Raise UserError for a depth (a name) that this encoder does not have."""
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
        digest = hashlib.blake2b(digest_size=16)
        for key, value in self.model.state_dict().items():
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            values = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(values.numpy().data)
        return digest.hexdigest()


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
    file = _find_file(path)
    state, about = _read(file)
    with checkpoint.needing(file, "what a run's file says of its network"):
        config, weights, architecture, known = _parts(file, state, about, model)
        if model is not None and _kind(model) != _kind(architecture):
            raise UserError(
                f"{file}: got a {_kind(architecture)}, but --model asks for a {_kind(model)}; "
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
    config = _run_config(file, state)
    found = state["model"] if config is not None else _unwrapped(state)
    _check_tensors(file, found)
    first_key = next(iter(found))
    if config is not None:
        known = _counters(state) | _epoch(file, state)
        return config, (found, first_key), _model_config(config["model"]), known
    named = _model_config(about) if about else model
    if named is None:
        raise UserError(f"{file}: names no network; give --model.backbone (resnet50...)")
    config, known = _origin(file, about)
    return config, (_renamed(found), first_key), named, known


def says_architecture(path: str | Path) -> bool:
    """Whether a file names its architecture, as files of ours do. Raises as `load_encoder`."""
    file = _find_file(path)
    state, about = _read(file)
    return bool(about) or _run_config(file, state) is not None


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


def _find_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"checkpoint: no file or folder '{path}'; give a run's folder or file")
        return path
    for name in (FINETUNED, CHECKPOINT, BACKBONE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: not a run's folder: no {CHECKPOINT}, {BACKBONE} or {FINETUNED}")


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's dict of state, and its metadata if a file of ours, else {}."""
    if file.suffix != ".safetensors":
        expected = "expected a run of ours, or what torch.save(model.state_dict(), FILE) writes"
        return checkpoint.load(file, expected), {}
    from safetensors import SafetensorError, safe_open

    try:
        if (damage := weights_damage(file)) is not None:
            raise UserError(
                f"{file}: not a readable safetensors file ({damage}); "
                "copy it again, or export it again from its checkpoint"
            )
        with safe_open(file, "pt") as opened:
            keys = opened.keys()  # `opened` itself cannot be iterated over
            about = opened.metadata() or {}
            is_ours = {"model", "stem"} <= about.keys()
            return {key: opened.get_tensor(key) for key in keys}, about if is_ours else {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: not a readable safetensors file ({error}); copy it again"
        ) from None


def _run_config(file: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration in a pretraining run's state, or None for any other dict. Raises UserError
    for the state of another command of ours."""
    config = state.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return None
    if {"backbone", "stem", "projector"} <= model.keys() and isinstance(state.get("model"), dict):
        return config
    if "format" in state:
        raise UserError(
            f"{file}: got the checkpoint of another command, "
            f"expected that of a pretraining run, or a fine-tuning's {FINETUNED}"
        )
    return None


def _model_config(settings: dict[str, Any]) -> ModelConfig:
    """The architecture that a run's configuration or a file's metadata names. Raises TypeError."""
    backbone = settings["backbone"] if "backbone" in settings else settings["model"]
    projector, norm = settings.get("projector", ""), settings.get("projector_norm", "hidden")
    for value in (backbone, settings["stem"], projector, norm):
        if not isinstance(value, str):
            raise TypeError(f"the model's settings have {value!r}")
    return ModelConfig(backbone, settings["stem"], projector, norm)


def _kind(config: ModelConfig) -> str:
    """A ModelConfig's backbone in words."""
    return f"{config.backbone} with the {config.stem} stem"


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The dict of weights in the state that another program saved."""
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return state


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of `Model`, without the known prefixes."""
    weights = {}
    for key, value in state.items():
        key = key.replace(COMPILED, "")
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        if not key.startswith(HEADS):
            weights[key if key.startswith("projector.") else f"backbone.{key}"] = value
    return weights


def _check_tensors(file: Path, state: dict[str, Any]) -> None:
    """Raise UserError for a dict that does not map names to tensors."""
    are_named = all(isinstance(key, str) for key in state)
    if not state or not are_named or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{file}: got no state dict of tensors, expected a ResNet's weights")


def _build(
    file: Path, config: ModelConfig, weights: dict[str, torch.Tensor], first_key: str
) -> Model:
    """The model that `config` describes, with as many projector blocks as the file has weights of.
    first_key: the first name in the file."""
    blocks = {int(key.split(".")[1]) for key in weights if re.match(r"projector\.\d+\.", key)}
    model = Model(config)
    keep_blocks(model, max(blocks, default=-1) + 1)
    wanted = model.state_dict()
    architecture = _kind(config)
    for key, value in wanted.items():
        if key not in weights:
            if key.endswith("num_batches_tracked"):  # older files lack it, and nothing here uses it
                weights[key] = value
                continue
            raise UserError(
                f"{file}: not a {architecture}: it lacks {key} {list(value.shape)}; "
                f"its first key is {first_key}"
            )
        if weights[key].shape != value.shape:
            raise UserError(
                f"{file}: not a {architecture}: "
                f"{key} is {list(weights[key].shape)}, expected {list(value.shape)}"
            )
        if value.is_floating_point() and not weights[key].is_floating_point():
            raise UserError(
                f"{file}: {key} has values of {weights[key].dtype}, expected floating point; "
                "save them unquantised"
            )
        if not weights[key].isfinite().all():  # features of NaN would all have rank 0: top-1 of 1
            raise UserError(
                f"{file}: {key} has values that are not finite, so its training diverged; "
                "take an earlier checkpoint"
            )
    for key in weights:
        if key not in wanted:
            raise UserError(f"{file}: not a {architecture}: it has {key}, expected no such key")
    model.load_state_dict(weights)
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
