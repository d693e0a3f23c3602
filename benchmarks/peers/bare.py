"""The floor: every payload of the file decoded once, into a reused buffer, and nothing else."""

from __future__ import annotations

import threading

import numpy as np
import simplejpeg

from benchmarks.photographs import Files
from benchmarks.recipe import COLUMNS


class BareDecode:
    """Accurate DCT, full scale, RGB; as many threads as the others have."""

    name, columns = "bare decode", COLUMNS

    def setup(self, files: Files, column: str, threads: int) -> None:
        self.payloads, self.threads = files.payloads, threads
        self.max_bytes = files.max_pixels * 3

    def _decode(self, payloads):
        buffer = np.empty(self.max_bytes, np.uint8)
        for payload in payloads:
            simplejpeg.decode_jpeg(payload, "RGB", buffer=buffer)

    def run(self) -> int:
        parts = [self.payloads[i :: self.threads] for i in range(self.threads)]
        workers = [threading.Thread(target=self._decode, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return len(self.payloads)

    def sample(self) -> np.ndarray | None:
        return None

    def close(self) -> None:
        self.payloads = None
