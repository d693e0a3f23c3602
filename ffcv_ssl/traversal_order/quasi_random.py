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
from ffcv_ssl.traversal_order.base import TraversalOrder


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
        by_block = np.argsort(self._block_of(reader, samples), kind="stable")
        return [np.sort(part) for part in np.array_split(by_block, world_size)]

    @staticmethod
    def _block_of(reader, indices):
        """Page of each sample's payload in the largest field. In a file without payloads, 1,024
        samples make a block."""
        extents = [reader.extents(name) for name in reader.fields]
        extents = [e for e in extents if e is not None and len(e.size)]
        if not extents:
            return indices // 1024
        largest = max(extents, key=lambda e: int(e.size.sum()))
        return (largest.pointer[indices] // np.uint64(reader.page_size)).astype(np.int64)

    @staticmethod
    def _group(block_of_sample):
        """Distinct blocks in ascending order, and for each the positions of its samples."""
        order = np.argsort(block_of_sample, kind="stable")
        blocks, begins = np.unique(block_of_sample[order], return_index=True)
        return blocks, np.split(order, begins[1:])
