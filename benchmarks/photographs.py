"""The images for measurements: a folder of photographs, written as a `.beton` file, or an existing
file."""

from __future__ import annotations

import os

import numpy as np

from ffcv_ssl import DatasetWriter, Reader
from ffcv_ssl.fields import RGBImageField

MAX_SIDE_PX, QUALITY = 500, 90
_ENDINGS = (".jpg", ".jpeg", ".png")


class Photographs:
    """All image files below a folder, in sorted order, as RGB."""

    def __init__(self, root: str, limit: int) -> None:
        found = [os.path.join(d, f) for d, _, files in os.walk(root) for f in files]
        self.paths = sorted(p for p in found if p.lower().endswith(_ENDINGS))[:limit]
        if not self.paths:
            raise SystemExit(f"{root}: no {', '.join(_ENDINGS)} below it; give photographs")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        from PIL import Image

        return (Image.open(self.paths[i]).convert("RGB"),)


def write_photographs(root: str, path: str, limit: int) -> None:
    """Write photographs at max side 500, quality 90, 4:2:0, as in the FFCV-SSL paper's file."""
    field = RGBImageField(write_mode="jpg", max_resolution=MAX_SIDE_PX, jpeg_quality=QUALITY)
    DatasetWriter(path, {"image": field}).from_indexed_dataset(Photographs(root, limit))


class SmallRaw:
    """Generated 32 px images, stored raw, to measure data of CIFAR's size."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple:
        return (np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8),)


def write_small_raw(path: str, count: int) -> None:
    """Write `count` generated 32 px images."""
    field = RGBImageField(write_mode="raw")
    DatasetWriter(path, {"image": field}).from_indexed_dataset(SmallRaw(count))


class Files:
    """The JPEGs for measurements: their `.beton` file, and their bytes for peers that read single
    files."""

    def __init__(self, path: str, folder: str) -> None:
        self.path, self.folder = path, folder
        with Reader(path) as reader:
            metadata = reader.field_metadata("image")
            if (metadata["mode"] != 0).any():
                raise SystemExit(f"{path}: has raw images; this benchmark is about JPEGs")
            self.payloads = [reader.read(i, "image") for i in range(reader.num_samples)]
        self.max_pixels = int((metadata["height"].astype(np.int64) * metadata["width"]).max())
        self.facts = {
            "images": len(self.payloads),
            "mean_bytes": round(float(np.mean([len(p) for p in self.payloads]))),
            "mean_height_px": round(float(metadata["height"].mean())),
            "mean_width_px": round(float(metadata["width"].mean())),
        }

    def as_jpegs(self) -> list[str]:
        """Write the same bytes as single files; returns their paths."""
        folder = os.path.join(self.folder, "jpegs")
        os.makedirs(folder, exist_ok=True)
        paths = [os.path.join(folder, f"{i:07d}.jpg") for i in range(len(self.payloads))]
        for path, payload in zip(paths, self.payloads):
            if not os.path.exists(path):
                with open(path, "wb") as file:
                    file.write(payload)
        return paths
