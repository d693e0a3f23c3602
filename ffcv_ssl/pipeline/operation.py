"""FFCV's interface for ops of one's own: an `Operation` generates code that runs on a whole batch.

`generate_code()` returns `f(batch, destination)`, compiled with numba when the state says so
(`jit_mode`), with
`f.with_indices = True` called as `f(batch, destination, indices)`. It may stand anywhere, between
two image ops too; there it gets and returns uint8 (N, H, W, C).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class State:
    """What a batch is at some place of a pipeline: jit_mode, device, shape without N, dtype."""

    jit_mode: bool
    device: object
    shape: tuple
    dtype: object


@dataclass(frozen=True)
class AllocationQuery:
    """Memory an Operation wants as its destination: shape without N, dtype."""

    shape: tuple
    dtype: object
    device: object = None


class Operation(ABC):
    """Subclass it as with FFCV."""

    def __init__(self):
        self.metadata = None
        self.field = None

    def accept_field(self, field):
        self.field = field

    def accept_globals(self, metadata, memory_read):
        self.metadata = metadata
        self.memory_read = memory_read

    @abstractmethod
    def generate_code(self):
        """The function to run on each batch."""

    @abstractmethod
    def declare_state_and_memory(self, previous_state):
        """(State after this op, AllocationQuery or None)."""


class CompiledOperation:
    """An Operation ready to run: `run(batch, indices) -> batch`. Compiled without threads of its
    own: workers are threads."""

    def __init__(self, operation, field, metadata, state):
        operation.accept_field(field)
        operation.accept_globals(metadata, None)
        self.operation = operation
        self.state, self.allocation = operation.declare_state_and_memory(state)
        code = operation.generate_code()
        self.with_indices = getattr(code, "with_indices", False)
        self.code = numba.njit(code, nogil=True) if self.state.jit_mode else code

    def run(self, batch, indices):
        destination = None
        if self.allocation is not None:
            shape = (len(batch), *self.allocation.shape)
            destination = np.empty(shape, self.allocation.dtype)
        arguments = (batch, destination, indices) if self.with_indices else (batch, destination)
        return self.code(*arguments)
