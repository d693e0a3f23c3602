"""Two convolutions with batch-norm, for tests and for trying things out in seconds on a CPU."""

from __future__ import annotations

from torch import nn

WIDTH = 16


def make(stem: str) -> tuple[nn.Module, int]:
    """The backbone and its D; it has one stem (3x3, stride 2) whatever `stem` says."""
    layers = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, WIDTH, 3, stride=2, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), WIDTH
