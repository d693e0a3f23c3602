"""torchvision with torch's DataLoader: the classic transforms on Pillow images, and v2 on
tensors."""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch
from PIL import Image

from benchmarks import recipe as r
from benchmarks.photographs import Files

_STRENGTHS = (r.BRIGHTNESS, r.CONTRAST, r.SATURATION, r.HUE)


class _Dataset:
    """The same JPEG bytes; decoded once, then two views."""

    def __init__(self, payloads, decode, transform):
        self.payloads, self.decode, self.transform = payloads, decode, transform

    def __len__(self):
        return len(self.payloads)

    def __getitem__(self, i):
        image = self.decode(self.payloads[i])
        return tuple(self.transform(image) for _ in range(r.NUM_VIEWS))


class _DataLoaderPeer:
    columns = r.COLUMNS

    def setup(self, files: Files, column: str, threads: int) -> None:
        self.loader = torch.utils.data.DataLoader(
            _Dataset(files.payloads, self.decode, self.make_ops(column)),
            r.BATCH_SIZE,
            shuffle=True,
            num_workers=threads,
            persistent_workers=True,
            prefetch_factor=3,
        )

    def run(self) -> int:
        return sum(len(views[0]) for views in self.loader)

    def sample(self) -> np.ndarray | None:
        batches = itertools.islice(self.loader, 4)
        return np.concatenate([views[0].permute(0, 2, 3, 1).numpy() for views in batches])

    def close(self) -> None:
        del self.loader


def _ops(t, column):
    """The recipe in torchvision's terms; `t` is its classic or its v2 module."""
    ops = [t.RandomHorizontalFlip(r.FLIP)]
    if r.has(column, "+ jitter"):
        ops.append(t.RandomApply([t.ColorJitter(*_STRENGTHS)], p=r.JITTER))
    if r.has(column, "+ grey"):
        ops.append(t.RandomGrayscale(r.GREY))
    if r.has(column, "+ blur"):
        ops.append(t.RandomApply([t.GaussianBlur(r.TAPS, r.SIGMA)], p=r.BLUR))
    if r.has(column, "+ solarize"):
        ops.append(t.RandomSolarize(r.THRESHOLD, p=r.SOLARIZE))
    return ops


class TorchvisionV1(_DataLoaderPeer):
    name = "torchvision (Pillow) + DataLoader"

    @staticmethod
    def decode(payload):
        return Image.open(io.BytesIO(payload)).convert("RGB")

    @staticmethod
    def make_ops(column):
        from torchvision import transforms as t

        crop = t.RandomResizedCrop(r.SIZE_PX, r.SCALE, r.RATIO)
        return t.Compose([crop, *_ops(t, column), t.PILToTensor()])


class TorchvisionV2(_DataLoaderPeer):
    name = "torchvision v2 (tensors) + DataLoader"

    @staticmethod
    def decode(payload):
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(
            torch.frombuffer(bytearray(payload), dtype=torch.uint8), ImageReadMode.RGB
        )

    @staticmethod
    def make_ops(column):
        from torchvision.transforms import v2 as t

        crop = t.RandomResizedCrop(r.SIZE_PX, r.SCALE, r.RATIO, antialias=True)
        return t.Compose([crop, *_ops(t, column)])
