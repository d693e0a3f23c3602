"""The batches of one epoch and one rank: which samples, in which order, and which are padding.

Guarantees: (seed, epoch, position, global batch size) determine the set of samples in global batch
k. Every rank has the same number of batches, of equal shape. Padding is marked, so that no sample
counts twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.kernels.sequences import count_occurrences_
from ffcv_ssl.reader import Reader
from ffcv_ssl.traversal_order import TraversalOrder


class EpochSchedule:
    """The batches of an epoch from global position `start` on.

    batch_size: per rank. Attributes: num_samples of the whole epoch; num_batches from `start` on.
    """

    def __init__(
        self,
        order: TraversalOrder,
        reader: Reader,
        sequence: np.ndarray,
        start: int,
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        self.order, self.reader = order, reader
        self.sequence, self.start = sequence, start
        self.rank, self.world_size = rank, world_size
        self.global_size = batch_size * world_size
        left = max(len(sequence) - start, 0)
        whole, rest = divmod(left, self.global_size)
        self.num_batches = whole + (rest > 0 and not drop_last)
        self.occurrences = count_occurrences(sequence)

    def handed_out(self, num_batches: int) -> int:
        """Global samples of the epoch handed out after `num_batches` of this schedule."""
        return min(self.start + num_batches * self.global_size, len(self.sequence))

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sample ids, their occurrences in the epoch, valid) of this rank's batch: int64, int64,
        bool, all (B,)."""
        begin = self.start + number * self.global_size
        stop = min(begin + self.global_size, len(self.sequence))
        samples = self.sequence[begin:stop]
        mine = self.order.split(self.reader, samples, self.world_size)[self.rank]
        size = -(-len(samples) // self.world_size)
        valid = np.arange(size) < len(mine)
        if len(mine) < size:  # a short rank repeats a sample, so that all ranks have equal shapes
            fill = mine[0] if len(mine) else 0
            mine = np.concatenate([mine, np.full(size - len(mine), fill, np.int64)])
        occurrences = self.occurrences[begin + mine].astype(np.int64)
        return samples[mine], occurrences, valid


def checked_sequence(order: TraversalOrder, reader: Reader, *arguments: Any) -> np.ndarray:
    """`order.sequence(reader, *arguments)`, int64, read-only. UserError for anything but whole
    numbers in one dimension, ValueError for ids out of range."""
    given = np.asarray(order.sequence(reader, *arguments))
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise UserError(
            f"{reader.path}: order {order.name} gave samples of type {given.dtype} and shape "
            f"{given.shape}, expected whole numbers in one dimension"
        )
    if len(given) and not (given.min() >= 0 and given.max() < reader.num_samples):
        raise ValueError(
            f"{reader.path}: order {order.name} gave samples from {given.min()} to "
            f"{given.max()}, expected 0 to {reader.num_samples - 1}, the samples of the file"
        )
    sequence = np.ascontiguousarray(given, np.int64).view()
    sequence.flags.writeable = False  # `len` and `iter` share it
    return sequence


def count_occurrences(sequence: np.ndarray) -> np.ndarray:
    """How often each id occurs earlier in the sequence, an integer type; all 0 where ids are
    unique. ids: from 0 on, int64."""
    occurrences = np.empty(len(sequence), np.int32)
    counts = np.zeros(int(sequence.max(initial=-1)) + 1, np.int32)
    if count_occurrences_(np.ascontiguousarray(sequence, np.int64), counts, occurrences):
        return occurrences
    return np.broadcast_to(np.int32(0), len(sequence))  # takes no memory
