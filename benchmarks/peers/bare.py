"""The floor: every payload of the file decoded once, into a reused buffer, and nothing else: by
simplejpeg, as the rate that all shares are of, and by this library's own decoder."""

from __future__ import annotations

import threading

import numpy as np
import simplejpeg

from benchmarks.photographs import Files
from benchmarks.recipe import COLUMNS
from ffcv_ssl.kernels.jpeg import MARGIN, JpegDecoder, work_bytes


class BareDecode:
    """Accurate DCT, full scale, RGB; as many threads as the others have."""

    name, columns = "bare decode", COLUMNS

    def setup(self, files: Files, column: str, threads: int) -> None:
        self.payloads, self.threads = files.payloads, threads
        self.max_bytes = files.max_pixels * 3

    def _decode(self, payloads: list[bytes]) -> None:
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


class OurBareDecode(BareDecode):
    """Whole images, as far as the decoder takes them; simplejpeg decodes the others."""

    name = "bare decode, ours"

    def _decode(self, payloads: list[bytes]) -> None:
        pixels, decoder = np.empty(self.max_bytes + MARGIN, np.uint8), JpegDecoder()
        shapes = [simplejpeg.decode_jpeg_header(payload)[:2] for payload in payloads]
        sizes = [work_bytes(len(payload), *shape) for payload, shape in zip(payloads, shapes)]
        work = np.empty(max(sizes, default=0), np.uint8)
        for payload, shape in zip(payloads, shapes):
            data = np.frombuffer(payload, np.uint8)
            if not decoder.decode(data, shape, (0, 0, *shape), True, pixels, work):
                simplejpeg.decode_jpeg(payload, "RGB", buffer=pixels)
