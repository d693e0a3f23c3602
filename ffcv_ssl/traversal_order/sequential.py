"""Samples in the order of `indices`, the same every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.traversal_order.base import TraversalOrder


class Sequential(TraversalOrder):
    """File order, or the order of the `indices` given to the loader."""

    def sequence(self, reader: Any, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        return indices.copy()
