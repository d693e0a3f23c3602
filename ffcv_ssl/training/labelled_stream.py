"""The labelled stream: class-stratified batches of labelled images, beside the unlabelled batches.

One epoch of this stream is a pass over the chosen labels. The stream may end after a number of
steps; from then on it loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ffcv_ssl.config.settings import DataConfig, LabelledConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.label_choice import choose_labels, class_counts
from ffcv_ssl.training.run_data import RunData, make_loader, rank_share, set_resolution
from ffcv_ssl.training.world import World
from ffcv_ssl.traversal_order import ClassStratified


class LabelledStream:
    """Batches of settings.classes_per_batch x images_per_class images, over all ranks.

    settings: a LabelledConfig; data: a DataConfig. ops: view name -> list of ops. Raises UserError
    where the file does not have the labels that the settings ask for.
    """

    def __init__(
        self,
        settings: LabelledConfig,
        dataset: RunData,
        data: DataConfig,
        ops: dict[str, list],
        seed: int,
        world: World,
        channels_last: bool,
    ) -> None:
        self.settings, chosen = settings, settings.labels
        labels = choose_labels(
            dataset.labels, dataset.num_classes, chosen.scheme, fraction=chosen.fraction,
            count=chosen.count, file=chosen.file, seed=chosen.seed, names=dataset.names,
        )  # fmt: skip
        self.description = class_counts(labels, dataset.num_classes)
        size = settings.classes_per_batch * settings.images_per_class
        num_classes = len(np.unique(labels[labels >= 0]))
        if settings.classes_per_batch > num_classes:
            raise UserError(
                f"labelled.classes_per_batch: got {settings.classes_per_batch}, expected at most "
                f"{num_classes}, the number of classes with labelled images; give "
                f"--labelled.classes_per_batch {num_classes}"
            )
        order = ClassStratified(
            labels, settings.classes_per_batch, settings.images_per_class,
            settings.unique_classes_per_rank,
        )  # fmt: skip
        self.loader = make_loader(
            dataset, data, ops, world, channels_last, drop_last=True, order=order,
            seed=derive_seed(seed, "labelled"), indices=np.flatnonzero(labels >= 0),
            batch_size=rank_share("labelled.classes_per_batch * images_per_class", size, world),
        )  # fmt: skip
        self.batches: Iterator | None = None

    def __len__(self) -> int:
        """Steps per pass over the labels."""
        return len(self.loader)

    def end_step(self, steps_per_epoch: int) -> float:
        """The first step without this stream."""
        if self.settings.supervised_passes is not None:
            return round(self.settings.supervised_passes * len(self.loader))
        epochs = self.settings.supervised_epochs
        return math.inf if epochs is None else round(epochs * steps_per_epoch)

    def start(self, sides_px: dict[str, int]) -> None:
        """Continue at the loader's position. sides_px: view name -> side in pixels."""
        state = self.loader.state_dict()
        set_resolution(self.loader, sides_px)
        self.loader.load_state_dict(state)
        self.batches = iter(self.loader)

    def next(self) -> Any:
        """The next batch; after the last batch of a pass, a new pass over the labels begins."""
        assert self.batches is not None, "start() comes first"
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def close(self) -> None:
        """Stop loading; a second call does nothing."""
        self.batches = None
        self.loader.close()
