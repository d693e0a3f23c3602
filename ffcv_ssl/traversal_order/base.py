"""The contract of an order.

An order turns (indices, seed, epoch) into one global sequence of sample ids. The loader cuts this
sequence into global batches, so the *set* of samples in a batch depends on nothing else. `split`
only says which rank takes which part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class TraversalOrder(ABC):
    """Base class of orders. Users may give instances of their subclasses to `Loader(order=...)`."""

    @property
    def name(self) -> str:
        """What `state_dict` records: a resumed loader must have an order of the same name."""
        return type(self).__name__

    @abstractmethod
    def sequence(self, reader: Any, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The sample ids of an epoch in their order, int64; ids may repeat.

        indices: int64, the samples that take part. The result must depend on the arguments alone.
        """

    def split(self, reader: Any, samples: np.ndarray, world_size: int) -> list[np.ndarray]:
        """Positions in `samples` (one global batch) for each rank: `world_size` int64 arrays of
        sizes that differ by at most one, the larger ones first. Default: consecutive parts."""
        return np.array_split(np.arange(len(samples)), world_size)

    def replacements(self, sample: int) -> np.ndarray | None:
        """Ids that may stand in for a bad sample, or None for any sample of the loader."""
        return None


def stable_order(numbers: np.ndarray) -> np.ndarray:
    """np.argsort(numbers, kind="stable") of integers (N,). NumPy sorts 16 bits by radix: up to ten
    times faster, where the numbers are close together."""
    low = int(numbers.min(initial=np.iinfo(np.int64).max))
    if len(numbers) and int(numbers.max()) - low < 1 << 16:
        numbers = (numbers - low).astype(np.uint16)
    return np.argsort(numbers, kind="stable")
