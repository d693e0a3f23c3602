"""Memory of batches: allocated once, reused when the last array or tensor on it is gone.

A slot is lent as one root array. Every view of a batch is a slice of the root and keeps it alive;
so does every tensor or slice that the user derives from a view. When the root dies, its slot is
free again.
"""

from __future__ import annotations

import collections
import weakref
from typing import Any

import numpy as np
import torch

_ALIGN = 64  # bytes, a cache line


class _Loan(weakref.ref):
    """A slot that is lent, as a weak reference to its root. Its callback must be no Python code:
    what a signal's handler raises there, such as KeyboardInterrupt, Python prints and drops."""

    memory: torch.Tensor | None = None


class SlotPool:
    """Slots for batches of given arrays.

    specs: key -> (shape without the batch dimension, dtype). base_slots: the usual number of slots.
    When the consumer holds all slots, the pool grows (`grown` counts this); when they return, it
    shrinks back. pinned: page-locked memory, for CUDA.
    """

    def __init__(
        self,
        specs: dict[Any, tuple[tuple, Any]],
        batch_size: int,
        base_slots: int,
        pinned: bool = False,
    ) -> None:
        self.specs, self.batch_size = specs, batch_size
        self.base_slots, self.pinned = base_slots, pinned
        self.grown = 0
        self._live: dict[int, _Loan] = {}
        # Any thread may append, even during a garbage collection.
        self._returned: collections.deque[_Loan] = collections.deque()
        self._total = 0
        self._layout, self.slot_bytes = self._lay_out()

    def _lay_out(self) -> tuple[dict[Any, tuple[int, tuple, np.dtype]], int]:
        layout, used = {}, 0
        for key, (shape, dtype) in self.specs.items():
            num_bytes = (
                self.batch_size * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            )
            layout[key] = (used, shape, np.dtype(dtype))
            used += -(-num_bytes // _ALIGN) * _ALIGN
        return layout, max(used, 1)

    @property
    def num_slots(self) -> int:
        return self._total

    def lend(self, count: int) -> dict[Any, np.ndarray]:
        """Arrays (count, *shape) by key, on one free slot, with undefined contents."""
        memory = self._free_memory()
        root = memory.numpy()  # a new array object each time: its death returns the slot
        loan = _Loan(root, self._returned.append)
        loan.memory = memory
        self._live[id(loan)] = loan
        arrays = {}
        for key, (begin, shape, dtype) in self._layout.items():
            size = count * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            arrays[key] = root[begin : begin + size].view(dtype).reshape((count, *shape))
        return arrays

    def _free_memory(self) -> torch.Tensor:
        self.shrink()
        try:
            loan = self._returned.popleft()
        except IndexError:
            self._total += 1
            self.grown += self._total > self.base_slots
        else:
            self._live.pop(id(loan), None)
            if loan.memory is not None:  # an interrupted `lend` may leave less than a whole loan
                return loan.memory
        return torch.empty(self.slot_bytes, dtype=torch.uint8, pin_memory=self.pinned)

    def shrink(self) -> None:
        """Free the unused slots beyond the base number."""
        while self._total > self.base_slots and self._returned:
            self._live.pop(id(self._returned.popleft()), None)
            self._total -= 1
