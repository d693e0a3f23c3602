"""What probes are trained on: standardised features of stored or of augmented images."""

# N samples, B images per batch, D features

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ffcv_ssl.evaluation.datasets import EvalDatasets, split_holdout
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.features import Features
from ffcv_ssl.evaluation.image_loaders import augmented_loader
from ffcv_ssl.loader import Loader
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.memory import spare_bytes
from ffcv_ssl.training.world import World, send

ROWS_AT_ONCE = 2048
"""Rows per step of a pass that only measures."""
ROWS_COPIED_AT_ONCE = 65536
MIN_RELATIVE_STD = 1e-5
"""A feature with less than this share of the largest standard deviation hardly varies."""

Batches = Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]
"""({depth: (B, D)}, labels (B,)) on the device."""


class ProbeData:
    """Standardised features by depth, and labels, of the parts `all` of the training samples, its
    division into `rest` and `holdout`, and `val`.

    config: a GridConfig of probe_training.
    """

    def __init__(
        self,
        config: Any,
        datasets: EvalDatasets,
        train: Features,
        val: Features,
        device: torch.device | str,
    ) -> None:
        self.device, self.num_classes = device, datasets.num_classes
        self.features = {"train": train, "val": val}
        labels = {"train": datasets.labels[train.ids], "val": datasets.val_labels[val.ids]}
        known = {name: np.flatnonzero(values >= 0) for name, values in labels.items()}
        self.rows = {"all": ("train", known["train"]), "val": ("val", known["val"])}
        self.labels = {name: torch.from_numpy(values) for name, values in labels.items()}
        self.norms = {
            depth: standardisation(train, depth, known["train"], not config.hidden, device)
            for depth in config.depths
        }
        self.hold_out(config.holdout if config.select == "holdout" else 0.0, config.seed)
        self.on_device = self._on_device()

    def _on_device(self) -> dict[str, dict[str, torch.Tensor]]:
        """The features by source and depth on the device, where they fit there; else {}. A copy
        of the rows of each step would take longer than the step."""
        rows = {source: len(features.ids) for source, features in self.features.items()}
        num_bytes = 4 * sum(rows.values()) * sum(self.widths.values())
        if num_bytes >= spare_bytes(torch.device(self.device)):
            return {}
        return {
            source: {depth: copy_to(self.device, features, depth) for depth in self.norms}
            for source, features in self.features.items()
        }

    def hold_out(self, share: float, seed: int) -> None:
        """Divide the training samples anew: a share of each class held out, the rest to learn."""
        held_out = np.empty(0, np.int64)
        if share:
            _, held_out = split_holdout(self.labels["train"].numpy(), share, seed)
        rest = np.setdiff1d(self.rows["all"][1], held_out)
        self.rows |= {"rest": ("train", rest), "holdout": ("train", held_out)}

    def __len__(self) -> int:
        return self.size("all")

    @property
    def widths(self) -> dict[str, int]:
        """D by depth."""
        return {depth: len(mean) for depth, (mean, _) in self.norms.items()}

    def ids(self, part: str) -> np.ndarray:
        """Sample ids of a part of the training samples."""
        return self.features["train"].ids[self.rows[part][1]]

    def size(self, part: str) -> int:
        """Rows in a part."""
        return len(self.rows[part][1])

    def batches(self, part: str, rows_per_step: int, order: np.ndarray | None = None) -> Batches:
        """Yield a part in nearly equal batches.

        order: a permutation of the part's rows; None: as they are stored.
        """
        source, rows = self.rows[part]
        rows = rows if order is None else rows[order]
        for chosen in np.array_split(rows, max(1, -(-len(rows) // rows_per_step))):
            index = torch.from_numpy(chosen)
            if source in self.on_device:
                rows_there = send(index, self.device)
                features = {d: values[rows_there] for d, values in self.on_device[source].items()}
            else:
                taken = {depth: self.features[source].take(depth, chosen) for depth in self.norms}
                features = {d: send(torch.from_numpy(x), self.device) for d, x in taken.items()}
            yield self.standardised(features), send(self.labels[source][index], self.device)

    def standardised(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features (B, D) by depth, standardised, on the device."""
        return {
            depth: (features[depth].to(self.device) - mean) * scale
            for depth, (mean, scale) in self.norms.items()
        }

    def epoch(self, part: str, rows_per_step: int, seed: int, epoch: int) -> tuple[int, Batches]:
        """(steps, batches) of one pass over a part in random order."""
        key = derive_seed(seed, f"probe epoch {epoch}")
        order = np.random.Generator(np.random.Philox(key)).permutation(self.size(part))
        steps = max(1, -(-self.size(part) // rows_per_step))
        return steps, self.batches(part, rows_per_step, order)


def copy_to(device: torch.device | str, features: Features, depth: str) -> torch.Tensor:
    """All features of a depth on a device, (N, D) float32, with little memory on the host."""
    rows = np.arange(len(features.ids))
    copied = torch.empty(features.rows[depth].shape, device=device)
    for part in np.array_split(rows, 1 + len(rows) // ROWS_COPIED_AT_ONCE):
        copied[part] = torch.from_numpy(features.take(depth, part)).to(device)
    return copied


def standardisation(
    features: Features,
    depth: str,
    rows: np.ndarray,
    to_unit_length: bool,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, scale), (D,) float32 each, that give `rows` of a depth mean 0 and variance 1.

    to_unit_length: variance 1 / D instead, so that a row's mean squared length is 1. A feature that
    hardly varies becomes 0 everywhere.
    """
    first = features.take(depth, rows[:1]).astype(np.float64)  # differences from it stay exact
    total, squares, count = np.zeros(first.shape[1]), np.zeros(first.shape[1]), 0
    for chosen in np.array_split(rows, max(1, len(rows) // ROWS_AT_ONCE)):
        values = features.take(depth, chosen) - first
        total, squares = total + values.sum(axis=0), squares + np.square(values).sum(axis=0)
        count += len(values)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    varies = std > MIN_RELATIVE_STD * std.max(initial=0)
    scale = np.where(varies, 1 / np.where(varies, std, 1), 0)
    scale = scale / np.sqrt(len(scale)) if to_unit_length else scale
    mean, scale = (mean + first[0]).astype(np.float32), scale.astype(np.float32)
    return torch.from_numpy(mean).to(device), torch.from_numpy(scale).to(device)


class AugmentedData:
    """Random crops and flips of the training samples, encoded anew in each epoch.

    data: the ProbeData of the clean images, by whose mean and deviation these are standardised.
    """

    def __init__(
        self, data: ProbeData, encoder: Encoder, datasets: EvalDatasets, world: World
    ) -> None:
        self.data, self.encoder, self.datasets, self.world = data, encoder, datasets, world

    def epoch(self, part: str, rows_per_step: int, seed: int, epoch: int) -> tuple[int, Batches]:
        """(steps, batches) of one pass over a part in random order."""
        ids = np.unique(self.data.ids(part))
        loader = augmented_loader(
            self.datasets.train, self.datasets, self.world, derive_seed(seed, "probe views"),
            indices=ids, batch_size=min(rows_per_step, len(ids)),
        )  # fmt: skip
        loader.set_epoch(epoch)
        return len(loader), self._batches(loader)

    def _batches(self, loader: Loader) -> Batches:
        with loader:
            for batch in loader:
                # not batch.label: the label of a corrupt sample's replacement may not be chosen
                labels = torch.from_numpy(self.datasets.labels[np.asarray(batch.indices)])
                known = torch.nonzero(labels >= 0)[:, 0].to(self.data.device)
                features = self.data.standardised(self.encoder.encode(batch.view_0))
                rows = {depth: values[known] for depth, values in features.items()}
                yield rows, labels.to(self.data.device)[known]
