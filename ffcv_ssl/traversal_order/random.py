"""A uniformly random permutation per epoch, from the library's own generator, because NumPy may
change its streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.kernels.random import shuffle_
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order.base import TraversalOrder


class Random(TraversalOrder):
    """Every sample once per epoch, every permutation equally likely. Reads all over the file, so it
    suits files that fit in memory."""

    def sequence(self, reader: Any, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        shuffled = indices.copy()
        shuffle_(derive_key(seed, "order", "random"), epoch, shuffled)
        return shuffled
