"""The datasets of an evaluation: which files, which labels may be used, which are held out.

What the settings leave open is taken from the pretraining run.
"""

# N samples

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ffcv_ssl.config import settings
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.training.label_choice import choose_labels, class_counts, samples_by_class
from ffcv_ssl.training.run_data import RunData, check_classes, open_dataset, tell_once

CENTER_RATIO = 224 / 256
"""Side of ImageNet's usual centre crop as a share of the image's short side."""
RESOLUTION_PX = 224
"""Side of the crops for a checkpoint that is not from a run."""


@dataclass(frozen=True)
class EvalDatasets:
    """The training and validation files of an evaluation, and how their images become views."""

    train: RunData
    val: RunData
    labels: np.ndarray
    """(N,) int64: the labels of the training file that may be used, -1 elsewhere."""
    num_classes: int
    class_names: tuple | None
    """The classes' names, where the training file has them."""
    loading: settings.DataConfig
    resolution_px: int
    center_ratio: float

    @property
    def val_labels(self) -> np.ndarray:
        """(N,) int64: the labels of the validation file, -1: none."""
        assert self.val.labels is not None, "files with several labels per image have none here"
        return self.val.labels

    @property
    def chosen(self) -> np.ndarray:
        """Indices of the training samples whose labels may be used, sorted."""
        return np.flatnonzero(self.labels >= 0)

    def describe(self) -> dict[str, Any]:
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


def open_datasets(data: EvalData, labels: EvalLabels, encoder: Encoder) -> EvalDatasets:
    """The datasets that `data` names, with the labels that `labels` chooses.

    Where both files have the same content, a line on stderr says so. Raises UserError where a file
    or its labels are missing, or where the classes of the two files differ.
    """
    data = with_field_names(data, encoder)
    loading, resolution_px, center_ratio = resolve_loading(data, encoder)
    image_field, label_field = str(data.image_field), str(data.label_field)
    train, val = (
        open_dataset(_file(path, name, encoder), image_field, label_field)
        for path, name in ((data.train, "train"), (data.val, "val"))
    )
    for dataset in (train, val):
        if dataset.labels is None:
            raise UserError(
                f"{dataset.path}: no labels in field '{data.label_field}'; "
                "name another field with --data.label_field"
            )
    if train.fingerprint == val.fingerprint:
        tell_once(
            f"warning: {val.path} has the same content as {train.path}, "
            "so accuracies are measured on training images"
        )
    names = check_classes(train, val, label_field)
    return EvalDatasets(
        train, val, usable_labels(train, labels), train.num_classes, names, loading,
        resolution_px, center_ratio,
    )  # fmt: skip


def with_field_names(data: EvalData, encoder: Encoder) -> EvalData:
    """`data` with the names of its fields: the encoder's run gives those that it lacks."""
    of_run, default = (encoder.config or {}).get("data", {}), settings.DataConfig()
    names = ("image_field", "label_field")
    found = {key: getattr(data, key) or of_run.get(key) or getattr(default, key) for key in names}
    return replace(data, **found)


def resolve_loading(data: EvalData, encoder: Encoder) -> tuple[settings.DataConfig, int, float]:
    """(how images are loaded, side of the crops in pixels, ratio of the centre crop).

    data: with names of its fields. What it leaves open is taken from the encoder's run, or is
    ImageNet's where there is no run.
    """
    assert data.image_field is not None and data.label_field is not None
    run = encoder.config or {}
    of_run, default = run.get("data", {}), settings.DataConfig()
    has_small_images = run.get("views", {}).get("small_images", False)
    resolution_px = data.resolution_px or evaluation_px(run)
    center_ratio = data.center_ratio or (1.0 if has_small_images else CENTER_RATIO)
    loading = settings.DataConfig(
        image_field=data.image_field, label_field=data.label_field, batch_size=data.batch_size,
        num_workers=data.num_workers, os_cache=data.os_cache, on_error=data.on_error,
        mean=tuple(data.mean or of_run.get("mean", default.mean)),
        std=tuple(data.std or of_run.get("std", default.std)),
    )  # fmt: skip
    return loading, resolution_px, center_ratio


def evaluation_px(run: dict) -> int:
    """Side in pixels of the crops on which a run (its configuration) evaluated itself."""
    side = run.get("evaluation", {}).get("resolution")
    return side or run.get("resolution", {}).get("max", RESOLUTION_PX)


def usable_labels(dataset: RunData, labels: EvalLabels) -> np.ndarray:
    """(N,) int64: the labels of a dataset that `labels` chooses, -1 elsewhere. Raises UserError."""
    assert dataset.labels is not None
    if labels.is_all:
        return dataset.labels.copy()
    try:
        return choose_labels(
            dataset.labels, dataset.num_classes, labels.scheme, fraction=labels.fraction,
            count=labels.count, file=labels.file, seed=labels.seed, names=dataset.names,
        )  # fmt: skip
    except UserError as error:  # the trainer has this setting in its group `labelled`
        line = str(error).removeprefix("labelled.").replace("--labelled.labels.", "--labels.")
        raise UserError(line) from None


def labels_digest(datasets: EvalDatasets) -> str:
    """16 hex digits of the training labels that may be used, ids and classes: equal for equal
    choices, however they were made."""
    digest = hashlib.blake2b(digest_size=8)
    for values in (datasets.chosen, datasets.labels[datasets.chosen]):
        digest.update(np.ascontiguousarray(values, "<i8").data)
    return digest.hexdigest()


def split_holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rest, held out), both sorted, of the samples with a label.

    labels: (N,) int64, -1: none. Of each class a `share` is held out, rounded, at least one sample
    where the class has two. A pure function of labels, share and seed.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    parts = []
    by_class = samples_by_class(labels, int(labels.max(initial=0)) + 1)
    for members in map(generator.permutation, filter(len, by_class)):
        size = max(1, round(share * len(members))) if share > 0 else 0
        parts.append(members[: min(size, len(members) - 1)])
    held_out = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    return np.setdiff1d(np.flatnonzero(labels >= 0), held_out), held_out


def _file(path: str | None, name: str, encoder: Encoder) -> str:
    path = path or ((encoder.config or {}).get("data") or {}).get(name)
    if not path:
        raise UserError(
            f"data.{name}: got none, and {encoder.path} does not name one; "
            f"expected --data.{name} FILE.beton"
        )
    return path
