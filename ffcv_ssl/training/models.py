"""Encoders: a backbone and an MLP on top, which hand out the features of every depth.

Shapes: B images a batch, D features, H W pixels.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import nn

from ffcv_ssl.config.settings import ModelConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import backbones
from ffcv_ssl.training.meters import meta_twin

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Parts of a ResNet, by torchvision's names, whose outputs are (B, D, H, W)."""


def make_backbone(name: str, stem: str) -> tuple[nn.Module, int]:
    """A backbone without classifier, (B, 3, H, W) -> (B, D), and its D.

    name: that of a file in `backbones/`, or of a torchvision ResNet.
    """
    if importlib.util.find_spec(f"{backbones.__name__}.{name}") is not None:
        return importlib.import_module(f"{backbones.__name__}.{name}").make(stem)
    import torchvision  # imports torch.compile's parts too: two fifths of a command's start

    backbone = torchvision.models.get_model(name, weights=None)
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == "cifar":
        channels = backbone.conv1.out_channels
        backbone.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone, width


def make_mlp(widths: str, in_features: int, norm: str = "hidden") -> nn.ModuleList:
    """Blocks of an MLP given as `2048-512`: Linear, batch-norm as `norm` says, and ReLU each, the
    last a Linear without bias, perhaps batch-norm, and no ReLU."""
    *hidden, last = (int(width) for width in widths.split("-"))
    blocks = nn.ModuleList()
    for width in hidden:
        layers: list[nn.Module] = [nn.Linear(in_features, width, bias=norm == "none")]
        layers += [nn.BatchNorm1d(width)] if norm != "none" else []
        blocks.append(nn.Sequential(*layers, nn.ReLU()))
        in_features = width
    blocks.append(nn.Sequential(nn.Linear(in_features, last, bias=False)))
    if norm == "all":
        scale_only = nn.BatchNorm1d(last)
        scale_only.bias.requires_grad_(False)  # stays 0
        blocks[-1].append(scale_only)  # type: ignore[operator]
    return blocks


def forward_stages(
    backbone: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a torchvision ResNet's forward pass does, by the same operations in the same order:
    (features (B, D), {stage: its output (B, C, H, W)}). A backbone of our own may have a method of
    this name instead."""
    if (own := getattr(backbone, "forward_stages", None)) is not None:
        return own(images)
    maps, values = {}, images
    for name, part in backbone.named_children():
        values = part(values.flatten(1) if name == "fc" else values)
        if name in STAGES:
            maps[name] = values
    return values, maps


def has_stages(backbone: nn.Module) -> bool:
    """Whether `forward_stages` takes a backbone."""
    is_resnet = all(hasattr(backbone, part) for part in (*STAGES, "avgpool", "fc"))
    return is_resnet or hasattr(backbone, "forward_stages")


def stage_widths(backbone: nn.Module) -> dict[str, int]:
    """The number of channels of each stage of a backbone that has stages."""
    image = torch.empty(1, 3, 64, 64, device="meta")
    _, maps = forward_stages(meta_twin(backbone).eval(), image)
    return {stage: values.shape[1] for stage, values in maps.items()}


class Model(nn.Module):
    """Backbone and projector. `widths` maps the name of each depth to its D.

    stages: hand out the backbone's stages too, averaged over pixels and detached; `stage_widths`
    maps their names to their D. Raises UserError for a backbone without stages.
    """

    def __init__(self, config: ModelConfig, stages: bool = False) -> None:
        super().__init__()
        self.backbone, width = make_backbone(config.backbone, config.stem)
        self.projector: nn.ModuleList = nn.ModuleList()
        self.widths = {"backbone": width}
        if config.projector:
            self.projector = make_mlp(config.projector, width, config.projector_norm)
        for depth, block in enumerate(self.projector, start=1):
            self.widths[f"projector_{depth}"] = block[0].out_features  # type: ignore[index,union-attr]
        if stages and not has_stages(self.backbone):
            raise UserError(
                f"probes.stages: got true, but the backbone {config.backbone} has no stages "
                f"{STAGES[0]} to {STAGES[-1]}; leave it out, or take a ResNet such as resnet18"
            )
        self.stage_widths = stage_widths(self.backbone) if stages else {}

    @property
    def last(self) -> str:
        """Name of the depth that the loss sees."""
        return next(reversed(self.widths))

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) -> {"backbone": (B, D), "projector_1": (B, D), ...}; before them {"layer1":
        (B, D), ...} where the model hands out stages."""
        stages: dict[str, torch.Tensor] = {}
        if self.stage_widths:
            first, maps = forward_stages(self.backbone, images)
            stages = {name: values.detach().mean(dim=(2, 3)) for name, values in maps.items()}
        else:
            first = self.backbone(images)
        features = [first]
        for block in self.projector:
            features.append(block(features[-1]))
        return {**stages, **dict(zip(self.widths, features))}

    def forward(self, views: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """A list of (B, 3, H, W), of any B -> a list of dicts as of `encode`, in the same order.

        Views of one size share one pass, and so their batch-norm statistics, as in SimCLR.
        """
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in views]
        for side in sorted({view.shape[-1] for view in views}, reverse=True):
            members = [v for v, view in enumerate(views) if view.shape[-1] == side]
            layers = self.encode(torch.cat([views[v] for v in members]))
            rows = [len(views[v]) for v in members]
            parts = {name: features.split(rows) for name, features in layers.items()}
            for position, v in enumerate(members):
                outputs[v] = {name: chunks[position] for name, chunks in parts.items()}
        return outputs
