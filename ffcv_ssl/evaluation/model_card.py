"""Model cards: what a backbone saw, what it is worth, and how others load it.

A card is a README.md with a YAML header as model hubs read it. It says only what is known: a line
whose facts are missing is left out, and nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ffcv_ssl.files import write_text
from ffcv_ssl.training.models import make_backbone

FILE = "README.md"
_METHODS = {
    "simclr": "SimCLR", "vicreg": "VICReg", "barlow": "Barlow Twins", "byol": "BYOL",
    "supervised": "supervised learning", "instance_simclr": "instance-wise SimCLR",
    "moco": "MoCo v2", "simsiam": "SimSiam",
}  # fmt: skip
_COUNTERS = {"epoch": "epochs", "updates": "updates", "images": "images", "views": "views"}

_LOAD = """## How to load it
Key names are torchvision's, and timm's. Without a classifier it gives {width} features an image:
```python
import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.{backbone}()
model.fc = torch.nn.Identity(){stem}
model.load_state_dict(load_file("{weights}"), strict=True)
model.eval()
```
```python
import timm

model = timm.create_model("{backbone}", num_classes=0){stem}
model.load_state_dict(load_file("{weights}"), strict=True)
model.eval()
```
"""
_CIFAR_STEM = """
# the stem for small images: a 3x3 convolution of stride 1, no pooling
model.conv1 = torch.nn.Conv2d(3, {channels}, 3, stride=1, padding=1, bias=False)
model.maxpool = torch.nn.Identity()"""


def write_card(
    folder: str | Path,
    backbone: str,
    stem: str,
    weights: str,
    config: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    metrics: Sequence[dict[str, Any]] = (),
) -> str:
    """Put the card of a backbone into `folder`, beside its file `weights`; returns the text.

    backbone: torchvision's name; stem: `imagenet` or `cifar`. config: the run's configuration as
    nested dicts, or None for weights that come from elsewhere. about: the run's counters by name
    (epoch, updates, images, views, flops, seconds). metrics: [{protocol, data, metric, value}],
    value in [0, 1].
    """
    network: Any
    network, width = make_backbone(backbone, stem)
    lines = ["# " + _title(backbone, config), ""]
    lines += _made(backbone, stem, config, about or {})
    lines += _table(metrics)
    stem_code = ""
    if stem == "cifar":
        stem_code = _CIFAR_STEM.format(channels=network.conv1.out_channels)
    lines += [_LOAD.format(backbone=backbone, width=width, stem=stem_code, weights=weights)]
    lines += _inputs(config)
    text = _header(backbone, config, metrics) + "\n".join(lines).rstrip("\n") + "\n"
    write_text(Path(folder) / FILE, text)
    return text


def _title(backbone: str, config: dict[str, Any] | None) -> str:
    return backbone if config is None else f"{backbone}, pretrained by {_method(config)}"


def _method(config: dict[str, Any]) -> str:
    """What trained the network, in words: `SimCLR + suncet on labels`."""
    labelled = config.get("labelled") or {}
    method = _METHODS.get(config["method"], _plain_name(config["method"]))
    if labelled.get("loss", "none") == "none":
        return method
    if labelled.get("unsupervised_batch_size") == 0:
        return f"{labelled['loss']} on labels alone"
    return f"{method} + {labelled['loss']} on labels"


def _plain_name(method: str) -> str:
    """A method's name, or the class of a user's own (`path/to/mine.py:Mine`)."""
    return method.rpartition(":")[2]


def _header(backbone: str, config: dict[str, Any] | None, metrics: Sequence[dict[str, Any]]) -> str:
    """The YAML between two lines of `---`."""
    header: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", "backbone", backbone],
    }
    if config is not None:
        header["tags"].append(_plain_name(config["method"]))
        header["datasets"] = [Path(config["data"]["train"]).stem]
    if metrics:
        header["metrics"] = ["accuracy"]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _made(
    backbone: str, stem: str, config: dict[str, Any] | None, about: dict[str, Any]
) -> list[str]:
    lines = [f"- Architecture: torchvision's `{backbone}`"]
    if stem == "cifar":
        lines[0] += " with a stem for small images (3x3, stride 1, no pooling)"
    if config is not None:
        lines += _training(config)
    counted = [f"{about[key]:,.6g} {what}" for key, what in _COUNTERS.items() if key in about]
    counted += [f"{about['flops']:.4g} FLOPs"] if "flops" in about else []
    counted += [f"{about['seconds'] / 3600:.4g} hours"] if "seconds" in about else []
    lines += [f"- Trained for: {', '.join(counted)}"] if counted else []
    return [*lines, ""]


def _training(config: dict[str, Any]) -> list[str]:
    data, optim, labelled = config["data"], config["optim"], config.get("labelled") or {}
    sizes = config["resolution"]
    side = f"{sizes['max']} px"
    if sizes["min"] != sizes["max"]:
        side = f"{sizes['min']} to {side}"
    batch = labelled.get("unsupervised_batch_size")
    batch = data["batch_size"] if batch is None else batch
    lines = [
        f"- Method: {_method(config)}",
        f"- Data: `{Path(data['train']).name}`",
        f"- Views: recipe `{config['views']['recipe']}` at {side}",
        f"- Optimiser: {optim['name']}, base rate {optim['lr']:g} ({optim['lr_scaling']} scaling), "
        f"weight decay {optim['weight_decay']:g}, batch {batch}, {config['epochs']} epochs planned",
        f"- Projector in training, left out here: `{config['model']['projector'] or 'none'}`",
        f"- Seed: {config['seed']}",
    ]
    if labelled.get("loss", "none") != "none":
        chosen = {key: value for key, value in labelled["labels"].items() if value is not None}
        lines.insert(2, f"- Labels: {json.dumps(chosen)}")
    return lines


def _table(metrics: Sequence[dict[str, Any]]) -> list[str]:
    if not metrics:
        return []
    rows = [
        f"| {m['protocol']} | {m['data']} | {m['metric']} | {m['value']:.2%} |" for m in metrics
    ]
    return ["## What it is worth", "| protocol | data | metric | value |", "|---|---|---|---|"] + [
        *rows, ""
    ]  # fmt: skip


def _inputs(config: dict[str, Any] | None) -> list[str]:
    """How pixels go in, where the run says it."""
    if config is None:
        return ["It takes images as it was trained on them; this file does not say how."]
    mean, std = ([f"{value:g}" for value in config["data"][key]] for key in ("mean", "std"))
    side = config.get("evaluation", {}).get("resolution") or config["resolution"]["max"]
    return [
        f"It takes RGB images (B, 3, H, W), evaluated here at {side} px: pixels in 0..255, minus "
        f"({', '.join(mean)}), divided by ({', '.join(std)}).",
    ]
