"""What a training command needs to know of a `.beton` file before it loads it."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.fields.basics import IntDecoder
from ffcv_ssl.files import StrPath
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.reader import Reader
from ffcv_ssl.training.world import World
from ffcv_ssl.transforms import NormalizeImage, Squeeze, ToDevice, ToTensor, ToTorchImage

# Threads of a loader whose views go to a GPU, unless data.num_workers says otherwise. Two full
# views at 224 px take 1.5 to 2.5 ms of a core: 32 threads render more than a GPU trains on.
MAX_WORKERS = 32
MAX_CLASSES = 100_000  # more are identifiers, not classes


@dataclass(frozen=True)
class RunData:
    """A file with images and, optionally, labels."""

    path: str
    num_samples: int
    fingerprint: str
    field_names: tuple
    """Names of all fields, in the file's order."""
    labels: np.ndarray | None
    """(N,) int64, -1: unlabelled; None where no sample is labelled."""
    num_classes: int
    """From the file's class names, or the largest label + 1; 0 without labels."""

    def describe(self) -> str:
        """The dataset's content in a few words. Files with equal content give equal words."""
        return f"{self.fingerprint} ({self.num_samples} samples)"

    def names(self) -> tuple[str, ...] | None:
        """The samples' file names, (N,) texts, or None where the file has none. Each call reads
        the file."""
        with Reader(self.path) as reader:
            return reader.names

    def draw(self, size: int, seed: int) -> np.ndarray:
        """Sorted indices (<= size,) of labelled samples, of any samples where none is labelled. The
        same seed draws the same samples; a smaller size, some of these."""
        samples = np.arange(self.num_samples)
        if self.labels is not None:
            samples = np.flatnonzero(self.labels >= 0)
        generator = np.random.Generator(np.random.Philox(seed))
        return np.sort(generator.permutation(samples)[:size])

    def sample_views(
        self, ops: dict[str, list], image_field: str, seed: int, num_images: int = 8
    ) -> list[np.ndarray]:
        """The views of the first images in epoch 0, to look at: a uint8 (B, H, W, 3) array for each
        list of ops in the dict `ops`."""
        size = min(num_images, self.num_samples)
        pipelines: dict[str, Any] = dict.fromkeys(self.field_names)
        del pipelines[image_field]
        pipelines |= {name: (image_field, [*list_, ToTensor()]) for name, list_ in ops.items()}
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


def make_loader(
    dataset: RunData,
    data: Any,
    views: dict[str, list],
    world: World,
    channels_last: bool,
    **options: Any,
) -> Loader:
    """A loader of normalised float32 views (B, 3, H, W) on the rank's device, and of the labels.

    data: a DataConfig. views: name -> list of ops on the decoded image. options: arguments of
    `Loader`, such as order, seed, and batch_size (per rank).
    """
    finish: list = [ToTensor(), ToDevice(world.device), ToTorchImage(channels_last=channels_last)]
    finish += [NormalizeImage(np.array(data.mean), np.array(data.std), np.float32)]
    pipelines: dict[str, Any] = dict.fromkeys(dataset.field_names)
    del pipelines[data.image_field]
    for name, ops in views.items():
        pipelines[name] = (data.image_field, ops + finish)
    if dataset.labels is not None:
        pipelines[data.label_field] = [IntDecoder(), ToTensor(), Squeeze(), ToDevice(world.device)]
    return Loader(
        dataset.path, num_workers=num_loader_threads(data.num_workers, world),
        os_cache=data.os_cache, on_error=data.on_error,
        batches_ahead=data.batches_ahead, pipelines=pipelines,
        rank=world.rank, world_size=world.size, **options,
    )  # fmt: skip


def num_loader_threads(setting: int, world: World) -> int:
    """Threads of a rank's loader. setting: data.num_workers; -1: the rank's cores, at most
    MAX_WORKERS, or half of them where torch computes on the same cores."""
    if setting != -1:
        return setting
    if world.device.type == "cuda":
        return min(world.cores, MAX_WORKERS)
    return max(1, world.cores // 2)


def rank_share(what: str, size: int, world: World) -> int:
    """Images per rank of a batch of `size`. Raises UserError where ranks do not divide `size`."""
    share, rest = divmod(size, world.size)
    if rest:
        raise UserError(f"{what}: got {size}, expected a multiple of {world.size} ranks")
    return share


def set_resolution(loader: Loader, sides_px: dict[str, int]) -> None:
    """Set the sides in pixels of a loader's views (by name), from its next `iter()` on."""
    for name, side in sides_px.items():
        loader.set_resolution(side, name)


def open_dataset(
    path: StrPath,
    image_field: str = "image",
    label_field: str = "label",
    setting: str = "data.train or data.val",
) -> RunData:
    """Read what training needs to know of a file. setting: what names it, for a message. Raises
    UserError where the file does not fit a training run, and BetonError where it is damaged."""
    if not Path(path).is_file():
        is_folder = str(path) and Path(path).is_dir()
        how = f" --source imagefolder --root {path} --out train.beton" if is_folder else ""
        raise UserError(
            f"{setting}: no file '{path}'; write one with write_dataset.py{how}, and "
            "give --data.train FILE.beton; --data.val FILE.beton, or --data.val null for no "
            "evaluation"
        )
    with Reader(path) as reader:
        if not isinstance(reader.fields.get(image_field), RGBImageField):
            raise UserError(
                f"{path}: no image field '{image_field}'; the file has: {', '.join(reader.fields)}"
            )
        labels = None
        if isinstance(reader.fields.get(label_field), IntField):
            labels = _labels(path, reader, label_field)
        num_classes = 0
        if labels is not None:
            class_names = reader.class_names.get(label_field) or ()
            num_classes = max(len(class_names), int(labels.max()) + 1)
        return RunData(
            path=str(path),
            num_samples=reader.num_samples,
            fingerprint=reader.fingerprint,
            field_names=tuple(reader.fields),
            labels=labels,
            num_classes=num_classes,
        )


def check_classes(train: RunData, val: RunData, label_field: str) -> tuple[str, ...] | None:
    """The training file's class names (a tuple, or None).

    Raises UserError where `val` has more classes, and, if both files have class names, where a name
    or their number differs. Where only one file has names, a line on stderr says so.
    """
    names = []
    for dataset in (train, val):
        with Reader(dataset.path) as reader:
            names.append(tuple(reader.class_names.get(label_field) or ()))
    if all(names) and len(names[0]) == len(names[1]) and names[0] != names[1]:
        label = next(i for i, pair in enumerate(zip(*names)) if pair[0] != pair[1])
        raise UserError(
            f"{val.path}: class {label} is {names[1][label]!r}, expected {names[0][label]!r} as in "
            f"{train.path}; write both files from one source"
        )
    if val.num_classes > train.num_classes or (all(names) and len(names[0]) != len(names[1])):
        raise UserError(
            f"{val.path}: got {val.num_classes} classes in field '{label_field}', expected the "
            f"{train.num_classes} classes of {train.path}; write both files from one source"
        )
    if any(names) and not all(names):
        without, having = (val, train) if names[0] else (train, val)
        tell_once(
            f"note: {without.path}: no class names in field '{label_field}', so they could not be "
            f"compared with the class names in {having.path}"
        )
    return names[0] or None


@functools.cache
def tell_once(line: str) -> None:
    """Print a line on stderr, once per process and only in the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _labels(path, reader, field):
    labels = np.array(reader.field_metadata(field), dtype=np.int64).reshape(-1)
    if len(labels) and labels.min() < -1:
        raise UserError(f"{path}: field '{field}': got label {labels.min()}, expected -1 or more")
    if len(labels) and labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{path}: field '{field}': got label {labels.max()}, expected at most "
            f"{MAX_CLASSES - 1}; is this a field of identifiers? name another with "
            "--data.label_field"
        )
    return labels if len(labels) and labels.max() >= 0 else None
