"""The loader's threads: they take tasks from one queue, each with scratch memory of its own.

They are daemons, ended by `stop()` (also at interpreter exit); an error in a task is handed to the
task, never lost.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_LINE_BYTES = 64


class Scratch:
    """A thread's private memory, grown when needed and then kept, and its share of the
    statistics."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray | None] = {}
        self.seconds = {"read": 0.0, "decode": 0.0, "render": 0.0}

    def take(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """A flat array of at least `size` numbers from the start of a cache line; what it held
        before is garbage. Vectors that straddle two lines made colour jitter 1.2x slower."""
        array = self._arrays.get(name)
        if array is None or array.size < size:
            self._arrays[name] = None  # free the old one first
            num_bytes = int(size) * np.dtype(dtype).itemsize
            memory = np.empty(num_bytes + _LINE_BYTES, np.uint8)
            begin = -memory.ctypes.data % _LINE_BYTES
            array = self._arrays[name] = memory[begin : begin + num_bytes].view(dtype)
        return array

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in list(self._arrays.values()) if a is not None)


class WorkerPool:
    """`num_workers` threads; `submit(task)` runs `task(scratch)` in one of them, first come, first
    served."""

    def __init__(self, num_workers: int, name: str) -> None:
        self.scratches = [Scratch() for _ in range(num_workers)]
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_work, args=(self._tasks, scratch), name=f"{name}-{i}", daemon=True
            )
            for i, scratch in enumerate(self.scratches)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[Scratch], None]) -> None:
        self._tasks.put(task)

    def stop(self) -> None:
        """End all threads after the tasks they are at; queued tasks run no more (they see their job
        cancelled)."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []


def _work(tasks: queue.SimpleQueue, scratch: Scratch) -> None:
    while True:
        task = tasks.get()
        if task is None:
            return
        task(scratch)
        del task  # keep nothing of a finished batch alive while waiting
