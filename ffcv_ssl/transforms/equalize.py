"""Random histogram equalization, channel by channel.

Equation: PIL.ImageOps.equalize, on levels taken as torchvision takes them from a float image:
floor(v * 255.999).
"""

from __future__ import annotations

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.transforms.base import ImageOp, check_probability, draw_switch, probability

_TO_LEVEL = np.float32(255.999)


class RandomEqualize(ImageOp):
    """Equalize each channel's histogram (PIL.ImageOps.equalize) with probability `prob`. Column:
    equalize (bool)."""

    columns = (("equalize", np.bool_),)
    view_name, place = "equalize", 60
    settings = (probability("equalize_prob", "prob", "Probability of histogram equalization."),)

    def __init__(self, prob: float = 0.2, link: str | None = None, seed: int | None = None) -> None:
        super().__init__(link, seed)
        self.prob = prob
        self.constants()

    def constants(self) -> tuple[float, ...]:
        return (check_probability(self, "prob", self.prob),)

    def scratch_floats(self, view_shape: tuple[int, int]) -> int:
        return 512

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            _equalize_(view, scratch)


@inlined
def _level(value):
    """Unsigned: numba would look whether a signed index is negative."""
    return np.uint32(np.int32(value * _TO_LEVEL))


@device
def _equalize_(view, scratch):
    """scratch: flat float32 of at least 512 numbers."""
    counts, table = scratch[:256].view(np.int32), scratch[256:512]
    for c in range(3):
        plane = view[c].reshape(-1)
        counts[:] = 0
        for i in range(plane.size):  # four histograms in turn, against waiting for a count: no gain
            counts[_level(plane[i])] += 1
        last = 255
        while counts[last] == 0:
            last -= 1
        step = (plane.size - counts[last]) // 255
        below = step // 2
        for level in range(256):
            target = min(below // step, 255) if step > 0 else level
            table[level] = np.float32(target) / np.float32(255.0)
            below += counts[level]
        for i in range(plane.size):
            plane[i] = table[_level(plane[i])]
