"""What several ops need on planar float32 views (3, H, W) in [0, 1]: clamp, luma, mirror."""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined

_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # ITU-R 601
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def clamp(value):
    return min(max(value, _ZERO), _ONE)


@inlined
def luma(r, g, b):
    return _RED * r + _GREEN * g + _BLUE * b


@device
def flip_(view):
    """Mirror left and right."""
    for c in range(3):
        for y in range(view.shape[1]):
            row = view[c, y]
            for x in range(row.size // 2):
                row[x], row[row.size - 1 - x] = row[row.size - 1 - x], row[x]
