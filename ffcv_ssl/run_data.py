"""What a training command needs to know of a `.beton` file before it loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_ssl import Loader, OrderOption
from ffcv_ssl.command import UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.reader import Reader


@dataclass(frozen=True)
class RunData:
    """A file with images and, perhaps, labels."""

    path: str
    num_samples: int
    fingerprint: str
    field_names: tuple
    """Names of all fields, in the file's order."""
    labels: np.ndarray | None
    """(N,) int64, -1: unlabelled; None where no sample is labelled."""
    num_classes: int
    """From the file's class names, or the largest label + 1; 0 without labels."""

    def describe(self):
        """The dataset's content in a few words, equal for equal content wherever the file lies."""
        return f"{self.fingerprint} ({self.num_samples} samples)"

    def names(self):
        """The samples' file names, (N,) texts, or None where the file has none; read anew."""
        with Reader(self.path) as reader:
            return reader.names

    def draw_labelled(self, size, seed):
        """Indices (<= size,) of labelled samples, sorted, the same ones for one seed."""
        labelled = np.flatnonzero(self.labels >= 0)
        generator = np.random.Generator(np.random.Philox(seed))
        return np.sort(generator.permutation(labelled)[:size])

    def sample_views(self, ops, image_field, seed, num_images=8):
        """The first images' views in epoch 0, to look at: for each list of ops in the dict `ops`, a
        uint8 (B, H, W, 3) array."""
        size = min(num_images, self.num_samples)
        pipelines = dict.fromkeys(self.field_names)
        del pipelines[image_field]
        pipelines |= {name: (image_field, list_) for name, list_ in ops.items()}
        with Loader(
            self.path,
            size,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            seed=seed,
            indices=np.arange(size),
            pipelines=pipelines,
            rank=0,
            world_size=1,
        ) as loader:
            batch = next(iter(loader))
            return [getattr(batch, name).numpy().copy() for name in ops]


def open_dataset(path, image_field="image", label_field="label"):
    """Read a file's description. Raises UserError where the file cannot serve a training run, and
    BetonError where it is damaged."""
    if not Path(path).is_file():
        raise UserError(f"data.train or data.val: no file '{path}'; make one: write_dataset.py")
    with Reader(path) as reader:
        if not isinstance(reader.fields.get(image_field), RGBImageField):
            names = ", ".join(reader.fields)
            raise UserError(f"{path}: no image field '{image_field}'; the file has: {names}")
        labels = None
        if isinstance(reader.fields.get(label_field), IntField):
            labels = _labels(path, reader, label_field)
        num_classes = 0
        if labels is not None:
            names = reader.class_names.get(label_field) or ()
            num_classes = max(len(names), int(labels.max()) + 1)
        return RunData(
            path=str(path),
            num_samples=reader.num_samples,
            fingerprint=reader.fingerprint,
            field_names=tuple(reader.fields),
            labels=labels,
            num_classes=num_classes,
        )


def _labels(path, reader, field):
    labels = np.array(reader.field_metadata(field), dtype=np.int64).reshape(-1)
    if len(labels) and labels.min() < -1:
        raise UserError(f"{path}: field '{field}': got label {labels.min()}, expected -1 or more")
    return labels if len(labels) and labels.max() >= 0 else None
