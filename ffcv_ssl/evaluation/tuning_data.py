"""The data of fine-tuning and transfer: one class per sample, or several labels per sample."""

# N samples, K classes or labels

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.datasets import (
    EvalDatasets,
    open_datasets,
    resolve_loading,
    split_holdout,
)
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.image_loaders import augmented_loader, clean_loader
from ffcv_ssl.evaluation.protocol_settings import EvalData, EvalLabels
from ffcv_ssl.evaluation.tuning import ClassTargets, MultiTargets
from ffcv_ssl.fields import NDArrayField
from ffcv_ssl.loader import Loader
from ffcv_ssl.reader import Reader
from ffcv_ssl.training.label_choice import class_counts
from ffcv_ssl.training.machine_choice import fitting_batch
from ffcv_ssl.training.run_data import RunData, open_dataset, rank_share
from ffcv_ssl.training.world import World


@dataclass(frozen=True)
class TuningData:
    """What a run trains, selects and measures on."""

    datasets: EvalDatasets
    train: ClassTargets | MultiTargets
    """Targets of the training file's samples."""
    val: ClassTargets | MultiTargets
    """Targets of the validation file's samples."""
    labels: str
    """The labels that may be used, in words."""

    def split(self, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (rest, held out) of the training samples that may be used. Raises UserError
        where nothing can be selected on the held-out ones."""
        rest, held_out = split_holdout(self.datasets.labels, share, seed)
        if len(held_out) == 0:
            raise UserError("holdout: every class has fewer than two labels; choose more labels")
        has_several = isinstance(self.train, MultiTargets)
        if has_several and not (self.train.labels[held_out] == 1).any():
            raise UserError(
                f"holdout: none of the {len(held_out)} held-out images has a label of 1; "
                "use a larger --holdout or another --seed"
            )
        return rest, held_out

    def train_loader(self, indices: np.ndarray, batch_size: int, seed: int, world: World) -> Loader:
        """Random crops and flips of the training samples `indices`. Raises UserError for a batch
        size that leaves no batch, or a rank with a single image."""
        share = rank_share("data.batch_size", batch_size, world)
        if share == 1:
            raise UserError(
                f"data.batch_size: got {batch_size} for {world.size} ranks, expected at least "
                f"{2 * world.size}: batch-norm needs two images per rank"
            )
        loader = augmented_loader(
            self.datasets.train, self.datasets, world, seed, indices=indices, batch_size=share
        )
        if len(loader) == 0:
            loader.close()
            fitting = fitting_batch(batch_size, len(indices), world.size)
            remedy = f"give --data.batch_size {fitting}"
            if fitting > len(indices):
                remedy = "give more labels"
            raise UserError(
                f"{self.datasets.train.path}: got {len(indices)} labelled samples, expected at "
                f"least one batch of {batch_size}; {remedy}"
            )
        return loader

    def clean_loader(self, part: str, world: World, indices: np.ndarray | None = None) -> Loader:
        """Centre crops of samples of `train` or `val`, by default of all that have a label."""
        dataset = getattr(self.datasets, part)
        if indices is None and dataset.labels is not None:
            indices = np.flatnonzero(dataset.labels >= 0)
        return clean_loader(dataset, self.datasets, world, indices)

    def describe(self) -> dict[str, Any]:
        """The data for a record."""
        return {**self.datasets.describe(), "labels": self.labels}


def open_tuning_data(
    data: EvalData, labels: EvalLabels, encoder: Encoder, world: World
) -> TuningData:
    """The data that `data` (with names of its fields) and `labels` say: one class per sample, or
    several labels where the label field is an array.

    Raises UserError where a file or its labels are missing, or the two files' labels differ.
    """
    if data.train and _is_array(data.train, data.label_field):
        return _open_several_labels(data, labels, encoder, world)
    datasets = open_datasets(data, labels, encoder)
    train, val = (
        ClassTargets(classes, datasets.num_classes, world.device)
        for classes in (datasets.labels, datasets.val_labels)
    )
    words = class_counts(datasets.labels, datasets.num_classes)
    return TuningData(datasets, train, val, words)


def _is_array(path: str, field_name: str | None) -> bool:
    if not Path(path).is_file():
        return False
    with Reader(path) as reader:
        return isinstance(reader.fields.get(field_name or ""), NDArrayField)


def _open_several_labels(
    data: EvalData, labels: EvalLabels, encoder: Encoder, world: World
) -> TuningData:
    """The data of files whose label field is an array of K numbers, 1, 0 or -1."""
    if not labels.is_all:
        raise UserError("labels: got a choice, expected all for images with several labels")
    if not data.val:
        raise UserError("data.val: got none, expected --data.val FILE.beton")
    image_field, label_field = str(data.image_field), str(data.label_field)
    train_set, val_set = (
        open_dataset(str(path), image_field, label_field) for path in (data.train, data.val)
    )
    train, val = (_read_labels(dataset, label_field) for dataset in (train_set, val_set))
    if train.shape[1] != val.shape[1]:
        raise UserError(
            f"{data.val}: field '{data.label_field}': got {val.shape[1]} labels per image, "
            f"expected {train.shape[1]} as in {data.train}"
        )
    if not (val == 1).any():
        raise UserError(
            f"{data.val}: field '{data.label_field}': no image has a label of 1; name another "
            "field with --data.label_field"
        )
    loading, resolution_px, center_ratio = resolve_loading(data, encoder)
    one_class = np.zeros(len(train), np.int64)  # so that any sample may be held out
    datasets = EvalDatasets(
        train_set, val_set, one_class, train.shape[1], None, loading, resolution_px, center_ratio
    )
    words = f"{len(train)} images, {train.shape[1]} labels each"
    targets = (MultiTargets(train, world.device), MultiTargets(val, world.device))
    return TuningData(datasets, *targets, words)


def _read_labels(dataset: RunData, field_name: str) -> np.ndarray:
    """(N, K) int8. Raises UserError for other values than 1, 0 and -1."""
    where = f"{dataset.path}: field '{field_name}'"
    with Reader(dataset.path) as reader:
        shape = getattr(reader.fields.get(field_name), "shape", ())
        if len(shape) != 1:
            raise UserError(f"{where}: expected an array field of shape (K,), one number per label")
        labels = np.stack([reader.decode(i, field_name) for i in range(dataset.num_samples)])
    bad = np.argwhere(~np.isin(labels, (-1, 0, 1)))
    if len(bad):
        sample, label = bad[0]
        raise UserError(
            f"{where}: sample {sample} has {labels[sample, label]} for label {label}, "
            "expected 1, 0 or -1 (left out)"
        )
    return labels.astype(np.int8)
