"""Gaussian noise on planar float32 views (3, H, W) in [0, 1], in place; a pure function of its key.

Source: Box and Muller's transform of Philox words; pixel i of a view (over C, H, W) takes number i of the key's stream.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import philox

_TO_UNIT = np.float32(2.0**-24)
_TWO_PI = np.float32(2.0 * np.pi)


@device
def _normal_pair(word_0, word_1):
    """Two independent standard normals of the top 24 bits of two 32-bit words."""
    u = (np.float32(word_0 >> np.uint64(8)) + np.float32(0.5)) * _TO_UNIT
    angle = np.float32(word_1 >> np.uint64(8)) * _TO_UNIT * _TWO_PI
    radius = np.sqrt(np.float32(-2.0) * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


@device
def add_noise_(view, std, key):
    """v -> clamp(v + std * n) with n ~ N(0, 1) for every number of the view."""
    flat = view.reshape(-1)
    zero, deviation = np.uint64(0), np.float32(std)
    for block in range((flat.size + 3) // 4):
        w0, w1, w2, w3 = philox(key, np.uint64(block), zero, zero, zero)
        n0, n1 = _normal_pair(w0, w1)
        n2, n3 = _normal_pair(w2, w3)
        for i, normal in enumerate((n0, n1, n2, n3)):
            at = 4 * block + i
            if at < flat.size:
                value = flat[at] + deviation * normal
                flat[at] = min(max(value, np.float32(0.0)), np.float32(1.0))
