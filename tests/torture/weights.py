"""Small checkpoints and files of weights, damaged: refused, or loaded as they were written."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.states import equal_states

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.models import Model
from torture.processes import folder_in_memory, one_line
from torture.text_mutants import damaged_bytes

ARCHITECTURE = ModelConfig("tiny", "imagenet", "")
CHECKED = ("checkpoint.pt", "backbone.safetensors", "plain.pth")
"""A run's checkpoint, the weights that a finished run leaves, and what torch.save writes."""
UNCHECKED = ("others.safetensors", "before_1_6.pth")
"""Weights without checksums: those of safetensors itself, and of torch.save before torch 1.6."""


@functools.cache
def sound_model() -> Model:
    """A small network; its weights are random, and so are the statistics of its batch-norms."""
    model = Model(ARCHITECTURE)
    draw = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
        else:
            value.fill_(7)
    return model


@functools.cache
def sound_state() -> dict[str, Any]:
    """What the run's checkpoint holds."""
    return {
        "step": 5, "model": dict(sound_model().state_dict()), "list": [1, 2.5, None, "x"],
        "config": {"out": "runs/x", "model": {"backbone": "tiny", "stem": "imagenet",
                   "projector": ""}},
    }  # fmt: skip


@functools.cache
def sound_files() -> dict[str, bytes]:
    """The files of CHECKED and UNCHECKED; all hold the same weights."""
    folder, backbone = folder_in_memory(), sound_model().backbone
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    checkpoint.save(folder / "checkpoint.pt", sound_state())
    about = {"model": "tiny", "stem": "imagenet"}
    checkpoint.save_weights(folder / "backbone.safetensors", backbone, about)
    torch.save(weights, folder / "plain.pth")
    save_file(weights, folder / "others.safetensors")
    torch.save(weights, folder / "before_1_6.pth", _use_new_zipfile_serialization=False)
    return {name: (folder / name).read_bytes() for name in CHECKED + UNCHECKED}


def damage(names: tuple[str, ...], folder: Path, choose: random.Random) -> Path:
    """Write one of the files of these names, damaged."""
    path = folder / choose.choice(names)
    path.write_bytes(damaged_bytes(sound_files()[path.name], choose))
    return path


def loaded(load: Callable[[Path], Any], path: Path) -> Any:
    """What a file loads as; None where it is refused, in one line."""
    try:
        return load(path)
    except (CheckpointError, UserError) as error:
        one_line(error)
        return None


def try_checked(folder: Path, choose: random.Random) -> list[str]:
    """Load a damaged file that has checksums: what happened at each way to load it. Raises
    AssertionError for any other value than was written."""
    path = damage(CHECKED, folder, choose)
    outcomes = []
    if path.name == "checkpoint.pt":
        state = loaded(checkpoint.load, path)
        assert state is None or equal_states(state, sound_state()), f"{path.name}: another state"
        outcomes.append("refused" if state is None else "loaded as written")
    encoder = loaded(load_as_network, path)
    if encoder is not None:
        is_right = equal_states(dict(encoder.model.state_dict()), sound_state()["model"])
        assert is_right, f"{path.name}: other weights"
        assert encoder.architecture == ARCHITECTURE, f"{path.name}: {encoder.architecture}"
    return [*outcomes, "refused" if encoder is None else "loaded as written"]


def try_unchecked(folder: Path, choose: random.Random) -> str:
    """Load a damaged file that has no checksums. Raises AssertionError for weights that are not
    finite, or of other names or shapes."""
    path = damage(UNCHECKED, folder, choose)
    encoder = loaded(load_as_network, path)
    if encoder is None:
        return "refused"
    right, found = sound_state()["model"], dict(encoder.model.state_dict())
    assert right.keys() == found.keys(), f"{path.name}: {sorted(found)}"
    for key, value in found.items():
        assert value.shape == right[key].shape, f"{path.name}: {key} is {list(value.shape)}"
        assert value.isfinite().all(), f"{path.name}: {key} is not finite"
    return "loaded as written" if equal_states(found, right) else "loaded with other values"


def load_as_network(path: Path):
    return load_encoder(path, ARCHITECTURE)
