"""Files with weights of a network: runs and weights of ours, state dicts of torchvision and timm.

Guarantees: nothing in a file is executed, every weight of the network comes from the file and is
finite, and a file of another architecture is refused with the first key that does not fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.checksums import weights_damage
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT

PREFIXES = ("module.", "backbone.")
"""Before the names of weights that torch's data parallelism and other toolkits save."""
COMPILED = "_orig_mod."
"""Before the name of any part that was compiled by torch.compile."""
HEADS = ("fc.", "classifier.")
"""Not part of an encoder."""
FINETUNED = "finetuned.safetensors"
"""The network of a fine-tuning, in its run's folder."""


class Network(NamedTuple):
    """What a file says of its network."""

    config: dict[str, Any] | None
    """The configuration in a pretraining run's checkpoint; None for other files."""
    weights: dict[str, torch.Tensor]
    """By the names of a `Model`: backbone.*, and projector.* where the file has them."""
    first_key: str
    """The first name in the file."""
    architecture: ModelConfig | None
    """None where the file does not say."""


def network_in(file: Path, state: dict[str, Any], about: dict[str, str]) -> Network:
    """The network in what `read_file` returned. Raises UserError for what is no network."""
    config = run_config(file, state)
    found = state["model"] if config is not None else _unwrapped(state)
    _check_tensors(file, found)
    first_key = next(iter(found))
    if config is not None:
        return Network(config, found, first_key, model_config(config["model"]))
    return Network(None, _renamed(found), first_key, model_config(about) if about else None)


def find_file(path: str | Path, setting: str = "checkpoint") -> Path:
    """The file with the weights that `path` means: itself, or one in a run's folder. setting: what
    names it, for a message. Raises UserError where there is none."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{setting}: no file or folder '{path}'; give a run's folder or file")
        return path
    for name in (FINETUNED, CHECKPOINT, BACKBONE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: not a run's folder: no {CHECKPOINT}, {BACKBONE} or {FINETUNED}")


def read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
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


def run_config(file: Path, state: dict[str, Any]) -> dict[str, Any] | None:
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


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """The architecture that a run's configuration or a file's metadata names. Raises TypeError."""
    backbone = settings["backbone"] if "backbone" in settings else settings["model"]
    projector, norm = settings.get("projector", ""), settings.get("projector_norm", "hidden")
    for value in (backbone, settings["stem"], projector, norm):
        if not isinstance(value, str):
            raise TypeError(f"the model's settings have {value!r}")
    return ModelConfig(backbone, settings["stem"], projector, norm)


def kind(config: ModelConfig) -> str:
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


def fill(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    file: Path,
    architecture: str,
    first_key: str,
) -> None:
    """Load weights of a file into a model. architecture: of the model, in words; first_key: the
    first name in the file. Raises UserError for weights that are not exactly the model's, or are
    not finite."""
    wanted = model.state_dict()
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


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of weights by name, in their order: equal for equal weights, whatever file they
    came from."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in weights.items():
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        values = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()
