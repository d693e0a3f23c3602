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
from ffcv_ssl.kernels.sequences import fill_windows_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder, stable_order

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
        classes, members, begins = _group(self.labels[labelled], labelled)
        self._check_classes(len(classes))
        num_batches = max(1, -(-len(labelled) // self.batch_size))
        windows = self._class_windows(len(classes), num_batches, seed, epoch).reshape(-1)
        # all turns of class 0, then all of class 1...; a short epoch may leave a class without
        turns = stable_order(windows)
        turn_begins = np.searchsorted(windows[turns], np.arange(len(classes) + 1))
        taken = np.empty((windows.size, self.images_per_class), np.int64)
        for k, label in enumerate(classes):
            key = (seed, "order", "class_stratified", "images", label)
            part = slice(turn_begins[k], turn_begins[k + 1])
            images = members[begins[k] : begins[k + 1]]
            taken[part] = _permutations(key, epoch, images, taken[part].size).reshape(
                -1, self.images_per_class
            )
        samples = np.empty_like(taken)
        samples[turns] = taken
        shape = (num_batches, self.classes_per_batch, self.images_per_class)
        return samples.reshape(shape).transpose(0, 2, 1).reshape(-1)

    def _check_classes(self, num_classes: int) -> None:
        if num_classes < self.classes_per_batch:
            raise ValueError(
                f"ClassStratified: classes_per_batch: got {self.classes_per_batch}, expected at "
                f"most {num_classes}, the number of classes with labelled samples"
            )

    def _class_windows(self, num_classes, num_batches, seed, epoch):
        """Numbers of the classes of each batch, (T, C), all different within a row.

        A window that reaches into the next permutation skips the classes that it already holds; the
        next window starts with the skipped ones.
        """
        length = num_batches * self.classes_per_batch
        key = (seed, "order", "class_stratified", "classes")
        # One permutation more, because a window may skip classes of the last one.
        stream = _permutations(key, epoch, np.arange(num_classes), length + num_classes)
        windows = np.empty((num_batches, self.classes_per_batch), np.int64)
        waiting = np.empty(num_classes + self.classes_per_batch, np.int64)
        fill_windows_(stream, np.full(num_classes, -1), waiting, windows)
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


def _group(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys (K,) in ascending order, the values group by group and in the order given
    within a group, where each group begins (K + 1,))."""
    order = stable_order(keys)
    ordered = keys[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[begins], values[order], np.append(begins, len(keys))


def _permutations(key: tuple, epoch: int, values: np.ndarray, length: int) -> np.ndarray:
    """The first `length` elements of an endless series of permutations of `values`."""
    values = np.ascontiguousarray(values, np.int64)
    if len(values) == 1:
        return np.repeat(values, length)
    stream = np.tile(values, -(-length // len(values)))
    for number, shuffled in enumerate(stream.reshape(-1, len(values))):
        shuffle_(derive_key(*key, number), epoch, shuffled)
    return stream[:length]
