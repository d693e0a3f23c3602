"""What all protocols share: their common settings, the pair of datasets, and loaders of both.

Settings that are left open are the pretraining run's, so that images look here as they did there.
"""

# N samples, V views

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from ffcv_ssl import OrderOption
from ffcv_ssl.config import settings
from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation.confusion import draw_confusion
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.evaluation.results import make_record, report, settings_key
from ffcv_ssl.training.label_choice import choose_labels, class_counts
from ffcv_ssl.training.run_data import RunData, check_classes, make_loader, open_dataset, tell_once
from ffcv_ssl.transforms import CenterCrop, RandomHorizontalFlip, RandomResizedCrop


@dataclass(frozen=True)
class EvalData:
    """Which images, and how they are loaded; null: as in the checkpoint's run."""

    train: str | None = None
    """The `.beton` file to learn from."""
    val: str | None = None
    """The `.beton` file to measure on."""
    image_field: str | None = None
    """Name of the image field in both; null: the run's, or `image`."""
    label_field: str | None = None
    """Name of the field with the class in both; null: the run's, or `label`."""
    batch_size: PositiveInt = 256
    """Images a batch, over all ranks."""
    resolution_px: PositiveInt | None = None
    """Side of the crops; null: that of the run's evaluation, or 224."""
    center_ratio: PositiveFloat | None = None
    """Side of the centre crop as a share of the image's short side; null: 224/256, or 1 where the
    run's images were small."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the pixels, on the 0..255 scale; null: the run's, or ImageNet's."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Pixels are divided by this, on the 0..255 scale; null: the run's, or ImageNet's."""
    num_workers: settings.Workers = -1
    """Loader threads a rank; -1: all cores with a GPU, half of them where torch needs them too."""
    os_cache: bool = True
    """False for files larger than memory."""
    on_error: Literal["raise", "replace"] = "raise"
    """What a corrupt sample does: end the command, or be replaced by another (counted)."""

    def __post_init__(self):
        if self.center_ratio is not None and self.center_ratio > 1:
            raise UserError(f"data.center_ratio: got {self.center_ratio:g}, expected at most 1")


@dataclass(frozen=True)
class EvalLabels(settings.LabelsConfig):
    """Which labels of the training file may be used; all of them if nothing is given."""

    @property
    def is_all(self):
        """Whether no choice was asked for; a seed alone chooses nothing."""
        return replace(self, seed=0) == EvalLabels()


@dataclass(frozen=True)
class Architecture:
    """What a file of weights holds that does not say so itself."""

    backbone: str | None = None
    """A ResNet of torchvision by name; null: the file says it."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels."""

    def resolve(self):
        """A ModelConfig without projector, or None. Raises UserError for an unknown name."""
        if self.backbone is None:
            return None
        return settings.ModelConfig(self.backbone, self.stem, projector="")


@dataclass(frozen=True)
class Evaluation:
    """Settings of every protocol; a protocol's own dataclass adds to them."""

    checkpoint: str = ""
    """A run's folder, a checkpoint, or a file of weights; the command takes several."""
    out: str | None = None
    """Folder of the results; null: the checkpoint's."""
    seed: NonNegativeInt = 0
    """Decides everything that is drawn, but for the choice of labels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's forward pass; bf16 is autocast."""
    model: Architecture = field(default_factory=Architecture)
    data: EvalData = field(default_factory=EvalData)
    labels: EvalLabels = field(default_factory=EvalLabels)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)


@dataclass(frozen=True)
class Pair:
    """The datasets of an evaluation, and how their images become views."""

    train: RunData
    val: RunData
    labels: np.ndarray
    """(N,) int64: the training file's labels that may be used, -1 elsewhere."""
    num_classes: int
    class_names: tuple | None
    """The classes' names, where the training file has them."""
    loading: settings.DataConfig
    resolution_px: int
    center_ratio: float

    @property
    def chosen(self):
        """Indices of the training samples whose labels may be used, sorted."""
        return np.flatnonzero(self.labels >= 0)

    def describe(self):
        """The datasets for a record: paths, contents, and which labels were used."""
        return {
            "train": self.train.path,
            "val": self.val.path,
            "train_content": self.train.describe(),
            "val_content": self.val.describe(),
            "image_field": self.loading.image_field,
            "label_field": self.loading.label_field,
            "labels": class_counts(self.labels, self.num_classes),
            "labels_digest": labels_digest(self),
            "num_labels": len(self.chosen),
            "num_classes": self.num_classes,
            "resolution_px": self.resolution_px,
        }


def open_encoder(config, world):
    """The checkpoint of an Evaluation on the rank's device. Raises as `load_encoder`."""
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
    encoder = load_encoder(config.checkpoint, config.model.resolve(), world.device)
    encoder.precision = config.precision
    return encoder


def refuse_ranks(protocol, world):
    """Raise UserError where a protocol that runs on one device was started on several."""
    if world.size > 1:
        got = f"got {world.size} ranks"
        raise UserError(f"{protocol}: {got}, expected one; start it without torchrun")


def open_frozen(protocol, config, world):
    """The checkpoint of an Evaluation that has `depths`, for a protocol that trains none of it.

    Raises UserError where a depth is not there, or where it was started on several ranks.
    """
    refuse_ranks(protocol, world)
    encoder = open_encoder(config, world)
    encoder.check_depths(config.depths)
    if config.system.compile:
        encoder.model.backbone.compile()
    return encoder


def results_folder(config):
    """Where an Evaluation's results go: `out`, or the checkpoint's folder; made if need be."""
    path = Path(config.checkpoint)
    return writable_folder(config.out or (path if path.is_dir() else path.parent))


def writable_folder(folder):
    """A folder for results as a Path, made if need be. Raises UserError where it cannot be written,
    which is better known before anything is measured."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot hold results ({error.strerror}); use --out") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: results cannot be written there; use --out")
    return folder


def open_pair(data, labels, encoder):
    """The datasets of an EvalData, with the labels that EvalLabels choose.

    Where both files have the same content, a line on stderr says so. Raises UserError where a file
    or its labels are missing, or the classes of the two files differ.
    """
    data = with_fields(data, encoder)
    loading, resolution_px, center_ratio = resolve_data(data, encoder)
    train, val = (
        open_dataset(_given(path, name, encoder), data.image_field, data.label_field)
        for path, name in ((data.train, "train"), (data.val, "val"))
    )
    for dataset in (train, val):
        if dataset.labels is None:
            got = f"no labels in field '{data.label_field}'"
            raise UserError(f"{dataset.path}: {got}; name another with --data.label_field")
    if train.fingerprint == val.fingerprint:
        same = f"{val.path} has the same content as {train.path}"
        tell_once(f"warning: {same}: accuracies are those of training images")
    names = check_classes(train, val, data.label_field)
    return Pair(
        train, val, allowed_labels(train, labels), train.num_classes, names, loading,
        resolution_px, center_ratio,
    )  # fmt: skip


def with_fields(data, encoder):
    """An EvalData that names its fields: those of the encoder's run where it names none."""
    its, usual = (encoder.config or {}).get("data", {}), settings.DataConfig()
    names = ("image_field", "label_field")
    found = {key: getattr(data, key) or its.get(key) or getattr(usual, key) for key in names}
    return replace(data, **found)


def resolve_data(data, encoder):
    """(DataConfig, side of the crops in pixels, ratio of the centre crop): an EvalData that names
    its fields, with what it leaves open taken from the encoder's run, or ImageNet's where there is
    none."""
    run = encoder.config or {}
    its, usual = run.get("data", {}), settings.DataConfig()
    small = run.get("views", {}).get("small_images", False)
    side = run.get("evaluation", {}).get("resolution") or run.get("resolution", {}).get("max", 224)
    loading = settings.DataConfig(
        image_field=data.image_field, label_field=data.label_field, batch_size=data.batch_size,
        num_workers=data.num_workers, os_cache=data.os_cache, on_error=data.on_error,
        mean=tuple(data.mean or its.get("mean", usual.mean)),
        std=tuple(data.std or its.get("std", usual.std)),
    )  # fmt: skip
    return loading, data.resolution_px or side, data.center_ratio or (1.0 if small else 224 / 256)


def allowed_labels(dataset, labels):
    """(N,) int64 labels of a RunData that EvalLabels choose, -1 elsewhere. Raises UserError."""
    if labels.is_all:
        return dataset.labels.copy()
    try:
        return choose_labels(
            dataset.labels, dataset.num_classes, labels.scheme, fraction=labels.fraction,
            count=labels.count, file=labels.file, seed=labels.seed, names=dataset.names,
        )  # fmt: skip
    except UserError as error:  # the setting has another place in a training run
        raise UserError(str(error).removeprefix("labelled.")) from None


def labels_digest(pair):
    """16 hex digits of the training labels that a Pair may use, ids and classes: equal for equal
    choices, however they were made."""
    digest = hashlib.blake2b(digest_size=8)
    for values in (pair.chosen, pair.labels[pair.chosen]):
        digest.update(np.ascontiguousarray(values, "<i8").data)
    return digest.hexdigest()


def clean_ops(pair):
    """The ops of a centre crop: what recipe `evaluation` makes."""
    return [CenterCrop(pair.resolution_px, pair.center_ratio)]


def augmented_ops(pair):
    """The ops of crop and flip: what recipe `supervised` makes."""
    return [RandomResizedCrop(pair.resolution_px), RandomHorizontalFlip()]


def clean_loader(dataset, pair, world, indices=None):
    """Centre crops of a RunData in the order of `indices` (default: all), none left out.

    Batches have `view_0`, float32 (B, 3, H, W), the label field, `indices` and `valid` (False where
    a rank's last batch is padded).
    """
    batch_size = max(1, pair.loading.batch_size // world.size)
    return make_loader(
        dataset, pair.loading, {"view_0": clean_ops(pair)}, world, True, indices=indices,
        batch_size=batch_size, order=OrderOption.SEQUENTIAL, drop_last=False, seed=0,
    )  # fmt: skip


def augmented_loader(dataset, pair, world, seed, num_views=1, **options):
    """Random crops and flips of a RunData, `view_0` to `view_V-1`, in random order.

    options: of `Loader`, over the defaults: batch_size (a rank's), indices, order, drop_last...
    """
    views = {f"view_{index}": augmented_ops(pair) for index in range(num_views)}
    batch_size = max(1, pair.loading.batch_size // world.size)
    options = {
        "batch_size": batch_size, "order": OrderOption.RANDOM, "drop_last": True, "seed": seed,
        **options,
    }  # fmt: skip
    return make_loader(dataset, pair.loading, views, world, True, **options)


def split_holdout(labels, fraction, seed):
    """Indices (rest, held out), both sorted, of the samples with a label.

    labels: (N,) int64, -1: none. Of each class a share `fraction` is held out, rounded, at least
    one sample where the class has two. A pure function of labels, fraction and seed.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    held = []
    for label in np.unique(labels[labels >= 0]):
        members = generator.permutation(np.flatnonzero(labels == label))
        size = max(1, round(fraction * len(members))) if fraction > 0 else 0
        held.append(members[: min(size, len(members) - 1)])
    held = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return np.setdiff1d(np.flatnonzero(labels >= 0), held), held


def finish(protocol, config, encoder, pair, metrics, folder, world):
    """Draw the confusion matrices, write the record and return it.

    metrics: dict by depth; each has top1 and confusion (K, K), which becomes its picture's name.
    """
    record = make_record(protocol, encoder, pair.describe(), config, metrics)
    for depth, result in metrics.items():
        title = f"{protocol} on {encoder.name}, {depth}: {result['top1']:.1%}"
        early = f", early stopping {result['best_top1']:.1%}" if "best_top1" in result else ""
        picture = f"confusion_{protocol}_{depth}_{settings_key(record)}.png"
        draw_confusion(result["confusion"], folder / picture, title, pair.class_names)
        result["confusion"] = picture
        world.say(f"{title}{early}; {folder / picture}")
    return report(record, folder)


def stop_if_asked(stop):
    """Raise Interrupted where a signal asked a command to stop that has nothing to save."""
    if stop is not None and stop.asked:
        raise Interrupted("evaluation: interrupted; start it again")


def _given(path, name, encoder):
    path = path or ((encoder.config or {}).get("data") or {}).get(name)
    if not path:
        expected = f"expected --data.{name} FILE.beton"
        raise UserError(f"data.{name}: got none, and {encoder.path} does not name one; {expected}")
    return path
