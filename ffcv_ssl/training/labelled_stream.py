"""The labelled stream's images: class-stratified batches beside those of all images.

It has an epoch of its own, a pass over the chosen labels, and may end for good after a number of
steps; from then on nothing of it is loaded.
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

    settings: a LabelledConfig; data: a DataConfig. ops: list of ops of each view by name. Raises
    UserError for labels that cannot be had.
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
            got = f"got {settings.classes_per_batch}, but {num_classes} classes have labels"
            raise UserError(f"labelled.classes_per_batch: {got}; at most so many fit in a batch")
        order = ClassStratified(
            labels, settings.classes_per_batch, settings.images_per_class,
            settings.unique_classes_per_rank,
        )  # fmt: skip
        self.loader = make_loader(
            dataset, data, ops, world, channels_last, drop_last=True, order=order,
            seed=derive_seed(seed, "labelled"), indices=np.flatnonzero(labels >= 0),
            batch_size=rank_share("labelled: classes x images", size, world),
        )  # fmt: skip
        self.batches: Iterator | None = None

    def __len__(self) -> int:
        """Steps of a pass over the labels."""
        return len(self.loader)

    def end_step(self, steps_per_epoch: int) -> float:
        """The first step without this stream."""
        if self.settings.supervised_passes is not None:
            return round(self.settings.supervised_passes * len(self.loader))
        epochs = self.settings.supervised_epochs
        return math.inf if epochs is None else round(epochs * steps_per_epoch)

    def start(self, sides_px: dict[str, int]) -> None:
        """Go on where the loader stands, with views of these sides by name."""
        state = self.loader.state_dict()
        set_resolution(self.loader, sides_px)
        self.loader.load_state_dict(state)
        self.batches = iter(self.loader)

    def next(self) -> Any:
        """The next batch; a new pass over the labels begins where one ends."""
        assert self.batches is not None, "start() comes first"
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def close(self) -> None:
        """Load nothing any more; a second call does nothing."""
        self.batches = None
        self.loader.close()
