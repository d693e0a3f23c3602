"""FFCV 1.0.2 on the same file: it renders one view a loader, so two loaders run side by side; crops
and flips only.

It runs in an interpreter of its own (FFCV_SSL_INTEROP_PYTHON, or what `.ci/install_ffcv` makes)
that this program drives line by line; left out where there is none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np

from benchmarks import recipe as r
from benchmarks.photographs import Files

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
PYTHON = Path(os.environ.get("FFCV_SSL_INTEROP_PYTHON", _CACHE / "ffcv-ssl/ffcv-1.0.2/bin/python"))

# Told "run", it makes one pass and answers with the number of images; told "sample FILE", it saves
# views.
SERVER = """
import sys
import numpy as np
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor

path, batch_size, threads, size_px, flip, *box = (eval(a) for a in sys.argv[1:])

def make():
    crop = RandomResizedCropRGBImageDecoder((size_px, size_px), *box)
    pipelines = {"image": [crop, RandomHorizontalFlip(flip), ToTensor()]}
    settings = {"order": OrderOption.RANDOM, "pipelines": pipelines, "drop_last": False}
    return Loader(path, batch_size, threads, **settings)

loaders = [make(), make()]
for line in sys.stdin:
    command, *rest = line.split()
    if command == "run":
        print(sum(len(first) for (first, *_), _ in zip(*loaders)), flush=True)
    else:
        views = [batch[0].numpy().copy() for batch, _ in zip(loaders[0], range(4))]
        np.save(rest[0], np.concatenate(views))
        print("saved", flush=True)
"""


class Ffcv:
    name = "FFCV 1.0.2, two loaders"
    columns = r.COLUMNS[:1] if PYTHON.exists() else ()

    def setup(self, files: Files, column: str, threads: int) -> None:
        workers = max(1, threads // r.NUM_VIEWS)  # a loader's; both run at once
        settings = (files.path, r.BATCH_SIZE, workers, r.SIZE_PX, r.FLIP, r.SCALE, r.RATIO)
        command = [str(PYTHON), "-c", SERVER, *map(repr, settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.folder = files.folder

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()}")
        return answer

    def run(self) -> int:
        return int(self._ask("run"))

    def sample(self) -> np.ndarray | None:
        path = os.path.join(self.folder, "ffcv_views.npy")
        self._ask(f"sample {path}")
        return np.load(path)

    def close(self) -> None:
        self.process.kill()  # left alone, its loaders' threads keep the process from ending
        self.process.wait()
