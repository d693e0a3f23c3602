"""Random blocks, random inside a window of blocks: for files larger than memory.

A block is one page of the file. The blocks are permuted; consecutive blocks form a window, and the
samples of a window are permuted together. So only one window of the file is read at a time, and
each rank reads only its share of the window's blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.kernels.random import shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder, stable_order


class QuasiRandom(TraversalOrder):
    """window_blocks: number of blocks in a window, at least 1."""

    def __init__(self, window_blocks: int = 16) -> None:
        if window_blocks < 1:
            raise ValueError(
                f"QuasiRandom: window_blocks: got {window_blocks}, expected at least 1"
            )
        self.window_blocks = window_blocks

    def sequence(self, reader: Any, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        blocks, samples_of_block = self._group(self._block_of(reader, indices))
        order = np.arange(len(blocks))
        shuffle_(derive_key(seed, "order", "blocks"), epoch, order)
        parts = []
        for begin in range(0, len(order), self.window_blocks):
            window = order[begin : begin + self.window_blocks]
            samples = np.concatenate([samples_of_block[b] for b in window]).astype(np.int64)
            shuffle_(derive_key(seed, "order", "window", begin), epoch, samples)
            parts.append(indices[samples])
        return np.concatenate(parts) if parts else indices.copy()

    def split(self, reader: Any, samples: np.ndarray, world_size: int) -> list[np.ndarray]:
        """Each rank takes neighbouring blocks of the batch, in the order of the sequence."""
        if world_size == 1:
            return [np.arange(len(samples))]
        by_block = np.argsort(self._block_of(reader, samples), kind="stable")
        return [np.sort(part) for part in np.array_split(by_block, world_size)]

    @staticmethod
    def _block_of(reader, indices):
        """Page of each sample's payload in the largest field. In a file without payloads, 1,024
        samples make a block."""
        # a Reader works it out once: the sum of 14 million sizes takes 10 ms, and a batch splits
        name = reader.once("largest field", lambda: _largest_field(reader))
        if name is None:
            return indices // 1024
        pointer = reader.extents(name).pointer[indices]
        page_bits = int(reader.page_size).bit_length() - 1  # a power of two; shifting is faster
        return (pointer >> np.uint64(page_bits)).view(np.int64)

    @staticmethod
    def _group(block_of_sample):
        """Distinct blocks in ascending order, and for each the positions of its samples."""
        order, ordered = np.arange(len(block_of_sample)), block_of_sample
        if np.any(ordered[1:] < ordered[:-1]):  # samples seldom lie in another order in the file
            order = stable_order(block_of_sample)
            ordered = block_of_sample[order]
        begins = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        begins = np.concatenate([np.arange(min(1, len(ordered))), begins])
        return ordered[begins], np.split(order, begins[1:]) if len(order) else []


def _largest_field(reader: Any) -> str | None:
    """The field whose payloads have the most bytes, or None where no field has payloads."""
    extents = {name: reader.extents(name) for name in reader.fields}
    bytes_of = {n: int(e.size.sum()) for n, e in extents.items() if e is not None and len(e.size)}
    return max(bytes_of, key=bytes_of.__getitem__, default=None)
