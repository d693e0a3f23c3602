"""The loader's threads. They take tasks from one queue; each thread has its own scratch memory.

They are daemon threads; `stop()` ends them (also at interpreter exit). A task keeps its error; no
error is lost.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from ffcv_ssl.kernels.jpeg import JpegDecoder

_LINE_BYTES = 64


class Scratch:
    """A thread's private memory, which grows when needed and never shrinks, and the thread's part
    of the statistics."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray | None] = {}
        self.seconds = {"read": 0.0, "decode": 0.0, "render": 0.0}
        self.decoded = {"ours": 0, "simplejpeg": 0}
        """JPEGs by decoder."""

    def take(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """A flat array of at least `size` numbers with undefined contents, aligned to a cache line.
        Vectors that straddle two lines made colour jitter 1.2x slower."""
        array = self._arrays.get(name)
        if array is None or array.size < size:
            self._arrays[name] = None  # free the old array first
            num_bytes = int(size) * np.dtype(dtype).itemsize
            memory = np.empty(num_bytes + _LINE_BYTES, np.uint8)
            begin = -memory.ctypes.data % _LINE_BYTES
            array = self._arrays[name] = memory[begin : begin + num_bytes].view(dtype)
        return array

    @cached_property
    def jpeg_decoder(self) -> JpegDecoder:
        """The thread's decoder."""
        return JpegDecoder()

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in list(self._arrays.values()) if a is not None)


class WorkerPool:
    """`num_workers` threads; `submit(task)` runs `task(scratch)` in one of them, in the order of
    submission. A process that is forked later has the pool without its threads."""

    def __init__(self, num_workers: int, name: str) -> None:
        self.process = os.getpid()
        self._scratches = [Scratch() for _ in range(num_workers)]
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for i, scratch in enumerate(self._scratches):
                arguments = self._tasks, scratch
                thread = threading.Thread(
                    target=_work, args=arguments, name=f"{name}-{i}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:  # no room for another thread: those before it must not stay
            self.stop()
            raise

    def submit(self, task: Callable[[Scratch], None]) -> None:
        self._tasks.put(task)

    def stats(self) -> dict[str, float]:
        """Of all threads together: seconds in each part of the work, JPEGs by decoder, and bytes of
        private memory."""
        threads = self._scratches
        return {
            **{f"{k}_s": sum(s.seconds[k] for s in threads) for k in threads[0].seconds},
            **{f"decoded_by_{k}": sum(s.decoded[k] for s in threads) for k in threads[0].decoded},
            "scratch_bytes": sum(s.num_bytes for s in threads),
        }

    def stop(self) -> None:
        """End all threads after their current tasks. Queued tasks do nothing: their job is
        cancelled. In a forked process there is nothing to end."""
        threads, self._threads = self._threads, []
        if os.getpid() != self.process:
            return
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()


def _work(tasks: queue.SimpleQueue, scratch: Scratch) -> None:
    while True:
        task = tasks.get()
        if task is None:
            return
        task(scratch)
        del task  # keep nothing of a finished batch alive while waiting
