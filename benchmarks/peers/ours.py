"""This library: integrity checks on, on_error='raise'."""

from __future__ import annotations

import itertools

import numpy as np

from benchmarks import recipe as r
from benchmarks.photographs import Files
from ffcv_ssl import Loader, OrderOption
from ffcv_ssl import transforms as t


def our_ops(column, size_px=r.SIZE_PX, scale=r.SCALE):
    """One view of a column of the recipe."""
    ops = [t.RandomResizedCrop(size_px, scale, r.RATIO), t.RandomHorizontalFlip(r.FLIP)]
    if r.has(column, "+ jitter"):
        strengths = (r.BRIGHTNESS, r.CONTRAST, r.SATURATION, r.HUE)
        ops.append(t.RandomColorJitter(r.JITTER, *strengths))
    if r.has(column, "+ grey"):
        ops.append(t.RandomGrayscale(r.GREY))
    if r.has(column, "+ blur"):
        ops.append(t.GaussianBlur(r.BLUR, r.TAPS, r.SIGMA))
    if r.has(column, "+ solarize"):
        ops.append(t.RandomSolarization(r.SOLARIZE, r.THRESHOLD))
    return [*ops, t.ToTensor(), t.ToTorchImage()]


class Ours:
    name, columns, decoder = "ffcv-ssl", r.COLUMNS, "auto"

    def setup(self, files: Files, column: str, threads: int) -> None:
        views = {f"view_{i}": ("image", our_ops(column)) for i in range(r.NUM_VIEWS)}
        self.loader = Loader(
            files.path,
            r.BATCH_SIZE,
            num_workers=threads,
            order=OrderOption.RANDOM,
            seed=0,
            pipelines=views,
            drop_last=False,
            decoder=self.decoder,
        )

    def run(self) -> int:
        return sum(len(batch.indices) for batch in self.loader)

    def sample(self) -> np.ndarray | None:
        batches = itertools.islice(self.loader, 4)
        return np.concatenate([b.view_0.permute(0, 2, 3, 1).numpy() for b in batches])

    def close(self) -> None:
        self.loader.close()


class OursWithSimplejpeg(Ours):
    """Without this library's own decoder of JPEGs."""

    name, decoder = "ffcv-ssl, decoder simplejpeg", "simplejpeg"
