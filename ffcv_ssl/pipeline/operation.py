"""FFCV's interface for users' batch ops: an `Operation` makes code that runs on a whole batch.

`generate_code()` returns `f(batch, destination)`; it is compiled with numba when the state's
`jit_mode` is set. With `f.with_indices = True` it is called as `f(batch, destination, indices)`. An
Operation may stand anywhere, also between two image ops; there it gets and returns uint8 (N, H, W,
C).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np


@dataclass(frozen=True)
class State:
    """What a batch is at some place of a pipeline: jit_mode, device, shape without N, dtype."""

    jit_mode: bool
    device: Any
    shape: tuple
    dtype: Any


@dataclass(frozen=True)
class AllocationQuery:
    """Memory an Operation wants as its destination: shape without N, dtype."""

    shape: tuple
    dtype: Any
    device: Any = None


class Operation(ABC):
    """Subclass it as with FFCV."""

    def __init__(self) -> None:
        self.metadata: Any = None
        self.field: Any = None

    def accept_field(self, field: Any) -> None:
        self.field = field

    def accept_globals(self, metadata: Any, memory_read: Any) -> None:
        self.metadata = metadata
        self.memory_read = memory_read

    @abstractmethod
    def generate_code(self) -> Callable:
        """The function to run on each batch."""

    @abstractmethod
    def declare_state_and_memory(
        self, previous_state: State
    ) -> tuple[State, AllocationQuery | None]:
        """(State after this op, AllocationQuery or None)."""


class CompiledOperation:
    """An Operation ready to run: `run(batch, indices) -> batch`. It is compiled for one thread,
    because the loader's workers are threads already."""

    def __init__(self, operation: Operation, field: Any, metadata: Any, state: State) -> None:
        operation.accept_field(field)
        operation.accept_globals(metadata, None)
        self.operation = operation
        self.state, self.allocation = operation.declare_state_and_memory(state)
        code = operation.generate_code()
        self.with_indices = getattr(code, "with_indices", False)
        self.code = numba.njit(code, nogil=True) if self.state.jit_mode else code

    def run(self, batch: np.ndarray, indices: np.ndarray) -> np.ndarray:
        destination = None
        if self.allocation is not None:
            shape = (len(batch), *self.allocation.shape)
            destination = np.empty(shape, self.allocation.dtype)
        arguments = (batch, destination, indices) if self.with_indices else (batch, destination)
        return self.code(*arguments)
