"""The labelled stream's images: class-stratified batches beside those of all images.

It has an epoch of its own, a pass over the chosen labels, and may end for good after a number of
steps; from then on nothing of it is loaded.
"""

from __future__ import annotations

import math

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.label_choice import choose_labels, class_counts
from ffcv_ssl.training.run_data import make_loader, rank_share, set_resolution
from ffcv_ssl.traversal_order import ClassStratified


class LabelledStream:
    """Batches of settings.classes_per_batch x images_per_class images, over all ranks.

    settings: a LabelledConfig; data: a DataConfig. ops: list of ops of each view by name. Raises
    UserError for labels that cannot be had.
    """

    def __init__(self, settings, dataset, data, ops, seed, world, channels_last):
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
        self.batches = None

    def __len__(self):
        """Steps of a pass over the labels."""
        return len(self.loader)

    def end_step(self, steps_per_epoch):
        """The first step without this stream."""
        if self.settings.supervised_passes is not None:
            return round(self.settings.supervised_passes * len(self.loader))
        epochs = self.settings.supervised_epochs
        return math.inf if epochs is None else round(epochs * steps_per_epoch)

    def start(self, sides_px):
        """Go on where the loader stands, with views of these sides by name."""
        state = self.loader.state_dict()
        set_resolution(self.loader, sides_px)
        self.loader.load_state_dict(state)
        self.batches = iter(self.loader)

    def next(self):
        """The next batch; a new pass over the labels begins where one ends."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def close(self):
        """Load nothing any more; a second call does nothing."""
        self.batches = None
        self.loader.close()
