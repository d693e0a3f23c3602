"""Where the repository is, and small `.beton` files of generated images."""

from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
SOUND_SAMPLES = 6
"""Samples of the file that the fixture `sound` writes."""


class SmallImages:
    """Generated images of many sizes, some smooth, some noisy; item: (image, label, weight,
    name)."""

    def __init__(self, count, fixed_size=None):
        self.count, self.fixed_size = count, fixed_size

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        height, width = self.fixed_size or rng.integers(20, 90, 2)
        ramps = np.add.outer(np.arange(height) * 2.0, np.arange(width))[..., None]
        image = ramps * rng.uniform(0.3, 1.5, 3) + rng.uniform(0, 60, 3)
        image += rng.normal(0, 8, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8), i % 7, i / 3, f"sample {i}".encode()


def write_small(path, count, fixed_size=None, mode="smart", page_size=None):
    """A small `.beton` with fields image, label, weight, name; half of its images JPEG, half raw
    (mode "proportion")."""
    from ffcv_ssl import DatasetWriter
    from ffcv_ssl.fields import BytesField, FloatField, IntField, RGBImageField

    image = RGBImageField(write_mode=mode, compress_probability=0.5)
    fields = {"image": image, "label": IntField(), "weight": FloatField(), "name": BytesField()}
    extra = {} if page_size is None else {"page_size": page_size}
    writer = DatasetWriter(str(path), fields, num_workers=1, **extra)
    writer.from_indexed_dataset(SmallImages(count, fixed_size))
    return str(path)
