"""Random blocks, random inside a window of blocks: for files larger than memory.

A block is one page of the file. Blocks are permuted; consecutive ones form a window, whose samples
are permuted together. So at any time only one window of the file is being read, and a rank reads
only its share of the window's blocks.
"""

import numpy as np

from ffcv_ssl.kernels.random import shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder


class QuasiRandom(TraversalOrder):
    """window_blocks: pages of the file whose samples are mixed with one another, at least 1."""

    def __init__(self, window_blocks=16):
        if window_blocks < 1:
            raise ValueError(f"QuasiRandom: window_blocks is {window_blocks}, must be at least 1")
        self.window_blocks = window_blocks

    def sequence(self, reader, indices, seed, epoch):
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

    def split(self, reader, samples, world_size):
        """A rank takes neighbouring blocks of the batch, its samples in the order of the
        sequence."""
        by_block = np.argsort(self._block_of(reader, samples), kind="stable")
        return [np.sort(part) for part in np.array_split(by_block, world_size)]

    @staticmethod
    def _block_of(reader, indices):
        """Page number of each sample's largest field; a file of scalars alone counts as blocks of
        1,024 samples."""
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
