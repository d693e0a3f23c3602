"""Histogram equalization of planar float32 views (3, H, W) in [0, 1], channel by channel, in place.

Equation: PIL.ImageOps.equalize, on levels taken as torchvision takes them from a float image:
floor(v * 255.999).
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined

_TO_LEVEL = np.float32(255.999)


@inlined
def _level(value):
    """Unsigned: numba would look whether a signed index is negative."""
    return np.uint32(np.int32(value * _TO_LEVEL))


@device
def equalize_(view, scratch):
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
