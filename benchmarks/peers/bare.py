"""The floor: every payload of the file decoded once, into a reused buffer, and nothing else."""

import threading

import numpy as np
import simplejpeg

from benchmarks.recipe import COLUMNS


class BareDecode:
    """Accurate DCT, full scale, RGB; as many threads as the others have."""

    name, columns = "bare decode", COLUMNS

    def setup(self, files, column, threads):
        self.payloads, self.threads = files.payloads, threads
        self.max_bytes = files.max_pixels * 3

    def _decode(self, payloads):
        buffer = np.empty(self.max_bytes, np.uint8)
        for payload in payloads:
            simplejpeg.decode_jpeg(payload, "RGB", buffer=buffer)

    def run(self):
        parts = [self.payloads[i :: self.threads] for i in range(self.threads)]
        workers = [threading.Thread(target=self._decode, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return len(self.payloads)

    def sample(self):
        return None

    def close(self):
        self.payloads = None
