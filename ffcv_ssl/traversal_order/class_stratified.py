"""Batches of C classes with m images each, for losses that need several images of a class.

A global batch holds `classes_per_batch` different classes and `images_per_class` images of each.
Classes come from permutations of all classes, and images from permutations of their class, so that
all classes are seen equally often, whatever their sizes.
Source: the class-stratified sampler of SuNCEt (Assran et al. 2020); not the same random stream.

    labelled = np.flatnonzero(labels >= 0)
    order = ClassStratified(labels, classes_per_batch=20, images_per_class=2)
    loader = Loader(path, order.batch_size // world_size, order=order, indices=labelled, ...)
"""

# N samples of the file, K classes with labels, C classes and m images a class in a batch, T batches

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.kernels.random import shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class ClassStratified(TraversalOrder):
    """labels: (N,) class numbers of the file's samples; -1 marks unlabelled samples, which never
    take part.

    classes_per_batch, images_per_class: of a *global* batch, at least 1. unique_classes_per_rank:
    ranks get different classes of the batch (as far as their number allows), instead of different
    images of all classes. `batch_size` is that of the global batch: the loader's batch size times
    the number of ranks must equal it, or the first batch raises ValueError.

    An epoch has the smallest number of whole batches that covers the labelled samples once. A class
    with fewer images than an epoch takes of it starts over, so an image may occur twice, even in
    one batch. Raises ValueError for numbers out of range and for too few classes with labels.
    """

    def __init__(
        self,
        labels: ArrayLike,
        classes_per_batch: int,
        images_per_class: int,
        unique_classes_per_rank: bool = False,
    ) -> None:
        for name, value in (
            ("classes_per_batch", classes_per_batch),
            ("images_per_class", images_per_class),
        ):
            if value != int(value) or value < 1:
                raise ValueError(f"ClassStratified: {name}: got {value!r}, expected at least 1")
        self.labels = np.array(labels, np.int64).reshape(-1)
        self._digest = xxh3_64(self.labels)
        self.classes_per_batch = int(classes_per_batch)
        self.images_per_class = int(images_per_class)
        self.unique_classes_per_rank = bool(unique_classes_per_rank)
        self._check_classes(len(np.unique(self.labels[self.labels >= 0])))

    @property
    def batch_size(self) -> int:
        """Samples of a global batch."""
        return self.classes_per_batch * self.images_per_class

    @property
    def name(self) -> str:
        unique = ", unique classes a rank" if self.unique_classes_per_rank else ""
        return (
            f"ClassStratified({self.classes_per_batch} classes x {self.images_per_class} images"
            f"{unique}, labels {self._digest:016x})"
        )

    def sequence(self, reader: Any, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Batches interleaved: one image of every class of the batch, then another of each..."""
        if len(indices) and indices.max() >= len(self.labels):
            raise ValueError(
                f"ClassStratified: got {len(self.labels)} labels, expected one for every sample of "
                f"the file; sample {indices.max()} has none"
            )
        labelled = indices[self.labels[indices] >= 0]
        classes, members = _group(self.labels[labelled], labelled)
        self._check_classes(len(classes))
        num_batches = max(1, -(-len(labelled) // self.batch_size))
        windows = self._class_windows(classes, num_batches, seed, epoch)
        samples = np.empty((windows.size, self.images_per_class), np.int64)
        _, turns_of = _group(windows.reshape(-1), np.arange(windows.size))
        for k, turns in enumerate(turns_of):
            key = (seed, "order", "class_stratified", "images", classes[k])
            images = _permutations(key, epoch, members[k], turns.size * self.images_per_class)
            samples[turns] = images.reshape(turns.size, self.images_per_class)
        shape = (num_batches, self.classes_per_batch, self.images_per_class)
        return samples.reshape(shape).transpose(0, 2, 1).reshape(-1)

    def _check_classes(self, num_classes: int) -> None:
        if num_classes < self.classes_per_batch:
            raise ValueError(
                f"ClassStratified: classes_per_batch: got {self.classes_per_batch}, expected at "
                f"most {num_classes}, the number of classes with labelled samples"
            )

    def _class_windows(self, classes, num_batches, seed, epoch):
        """Positions in `classes` of each batch, (T, C), all different within a row.

        A window that reaches into the next permutation skips the classes that it already holds; the
        next window starts with the skipped ones.
        """
        length = num_batches * self.classes_per_batch
        key = (seed, "order", "class_stratified", "classes")
        # One permutation more, because a window may skip classes of the last one.
        stream = _permutations(key, epoch, np.arange(len(classes)), length + len(classes))
        waiting, position = [], 0
        windows = np.empty((num_batches, self.classes_per_batch), np.int64)
        for window in windows:
            chosen, skipped = dict.fromkeys(waiting), []
            while len(chosen) < self.classes_per_batch:
                candidate = int(stream[position])
                position += 1
                if candidate in chosen:
                    skipped.append(candidate)
                else:
                    chosen[candidate] = None
            window[:], waiting = list(chosen), skipped
        return windows

    def split(self, reader: Any, samples: np.ndarray, world_size: int) -> list[np.ndarray]:
        """Equal parts: consecutive rows of the batch, or with unique_classes_per_rank consecutive
        classes. Each rank keeps the order of the batch."""
        if len(samples) != self.batch_size:
            raise ValueError(
                f"ClassStratified: got a global batch of {len(samples)} samples, expected "
                f"{self.classes_per_batch} classes x {self.images_per_class} images; the loader's "
                f"batch size times the number of ranks must be {self.batch_size}"
            )
        if not self.unique_classes_per_rank:
            return super().split(reader, samples, world_size)
        # classes in the order of the batch, not by number: a rank's classes change with the batch
        _, first, number = np.unique(self.labels[samples], return_index=True, return_inverse=True)
        by_class = np.argsort(first[number], kind="stable")
        return [np.sort(part) for part in np.array_split(by_class, world_size)]

    def replacements(self, sample: int) -> np.ndarray | None:
        """Labelled samples of the same class, whether or not they are in the loader's `indices`."""
        return np.flatnonzero(self.labels == self.labels[sample])


def _group(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct keys in ascending order, and the values of each, in the order given."""
    order = np.argsort(keys, kind="stable")
    distinct, begins = np.unique(keys[order], return_index=True)
    return distinct, np.split(values[order], begins[1:])


def _permutations(key: tuple, epoch: int, values: np.ndarray, length: int) -> np.ndarray:
    """The first `length` elements of an endless series of permutations of `values`."""
    parts = []
    for number in range(-(-length // len(values))):
        shuffled = np.array(values, np.int64)
        shuffle_(derive_key(*key, number), epoch, shuffled)
        parts.append(shuffled)
    return np.concatenate(parts)[:length]
