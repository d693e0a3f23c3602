"""Weights that a run begins with (`init_from`): those of another run, of torchvision or of timm.

Guarantees: at step 0 the backbone is exactly what the file holds; no random number is drawn; a
resumed run does not read the file.
"""

from __future__ import annotations

from typing import Any

import torch

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.weight_files import (
    Network,
    digest_of,
    fill,
    find_file,
    kind,
    network_in,
    read_file,
)
from ffcv_ssl.training.world import World


def begin_with(model: Model, config: Any, saved: dict[str, Any] | None, world: World) -> str | None:
    """Fill a run's model at its start; returns the digest of the file's weights, for the record.

    config: with init_from, init_digest and model; saved: the checkpoint of a run that goes on,
    whose record is returned. The projector is taken where it has the same layers, which a line
    says. Raises UserError where the file has another backbone, or weights of another digest than
    `init_digest`, and what `load_encoder` raises.
    """
    if saved is not None:
        return saved["config"].get("init_digest")
    if config.init_from is None:
        return None
    file = find_file(config.init_from, "init_from")
    state, about = read_file(file)
    with checkpoint.needing(file, "what a run's file says of its network"):
        network = network_in(file, state, about)
    _check_backbone(file, network.architecture, config.model)
    own, found = model.state_dict(), dict(network.weights)
    takes_projector = _has_same_projector(own, network)
    if not takes_projector:
        found = {key: value for key, value in found.items() if not key.startswith("projector.")}
        found |= {key: value for key, value in own.items() if key.startswith("projector.")}
    fill(model, found, file, kind(config.model), network.first_key)
    digest = _digest(model, network)
    if config.init_digest not in (None, digest):
        raise UserError(
            f"{file}: got weights {digest}, expected {config.init_digest} as in init_digest; "
            "restore the file, or leave init_digest out"
        )
    taken = "backbone and projector" if takes_projector else "backbone, but not the projector"
    world.say(f"{file}: {taken} taken as first weights; digest {digest}")
    return digest


def _check_backbone(file, named: ModelConfig | None, wanted: ModelConfig) -> None:
    if named is not None and kind(named) != kind(wanted):
        raise UserError(
            f"{file}: got a {kind(named)}, but the run trains a {kind(wanted)}; give it the file's "
            "model.backbone and model.stem, or another file"
        )


def _has_same_projector(own: dict[str, torch.Tensor], network: Network) -> bool:
    """Whether the file has all layers of the run's projector, of the same shapes, and no other."""

    def layers(weights):
        return {k: v.shape for k, v in weights.items() if k.startswith("projector.")}

    return bool(layers(own)) and layers(own) == layers(network.weights)


def _digest(model: Model, network: Network) -> str:
    """The fingerprint that an evaluation of the same file records."""
    weights = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    for key, value in network.weights.items():
        if key.startswith("projector."):
            weights[key] = value.float() if value.is_floating_point() else value
    return digest_of(weights)
