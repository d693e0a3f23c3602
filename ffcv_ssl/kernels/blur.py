"""Separable Gaussian blur of planar float32 views (3, H, W), in place.

Equation: torchvision's gaussian_blur; borders are reflected without repeating the edge. Weights
exp(-d**2 / 2 sigma**2), normalised over the taps used. Taps lighter than 1/4096 of the middle tap
are left out. At sigma 1 this leaves 9 taps of 23 and changes no pixel by 0.1/255.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.kernels.vectors import LANES, symmetric_taps

_LIGHTEST = 1.0 / 4096.0
_LINE = 16  # numbers in a cache line


@inlined
def _reflect(i, size):
    """Index in the mirrored image, for any distance outside and any size, 1 included."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    i = abs(i) % period
    return period - i if i >= size else i


@device
def gaussian_taps(sigma, kernel_size, weights):
    """Fill weights[d] for distances d = 0 .. radius; returns the radius."""
    radius = kernel_size // 2
    total = 1.0
    weights[0] = 1.0
    for distance in range(1, radius + 1):
        weight = np.exp(-0.5 * (distance / sigma) ** 2)
        if weight < _LIGHTEST:
            radius = distance - 1
            break
        weights[distance] = weight
        total += 2.0 * weight
    for distance in range(radius + 1):
        weights[distance] = weights[distance] / total
    return radius


@device
def _pad(plane, radius, padded):
    """padded (H + 2 radius, at least W + 2 radius) = the plane with reflected borders."""
    height, width = plane.shape
    for y in range(height + 2 * radius):
        source = plane[_reflect(y - radius, height)]
        inner = padded[y, radius : radius + width]
        for x in range(width):  # a slice assignment is not vectorised: 4x slower
            inner[x] = source[x]
        row = padded[y]
        if radius < width:  # the usual case, without divisions
            for x in range(1, radius + 1):
                row[radius - x] = source[x]
                row[radius + width - 1 + x] = source[width - 1 - x]
        else:
            for x in range(1, radius + 1):
                row[radius - x] = source[_reflect(-x, width)]
                row[radius + width - 1 + x] = source[_reflect(width - 1 + x, width)]


@device
def _blur_rows(padded, stride, radius, weights, sums, row, plane):
    """For each row: the vertical pass from flat `padded` into `sums`, then the horizontal pass.

    All taps of a number are summed in registers: 2x faster than several passes over a row with two
    distances each.
    """
    height, width = plane.shape
    flat = plane.reshape(-1)
    for y in range(height):
        begin = (y + radius) * stride
        for x in range(0, width + 2 * radius, LANES):
            symmetric_taps(padded, begin + x, stride, weights, radius, sums, x)
        if width >= LANES:
            for begin in range(0, width, LANES):
                x = min(begin, width - LANES)  # the last vector overlaps the one before it
                symmetric_taps(sums, radius + x, 1, weights, radius, flat, y * width + x)
        else:
            symmetric_taps(sums, radius, 1, weights, radius, row, 0)
            for x in range(width):
                flat[y * width + x] = row[x]


@device
def blur_(view, sigma, kernel_size, scratch):
    """Blur in place. scratch: flat float32 of `scratch_floats(...)` numbers."""
    height, width = view.shape[1], view.shape[2]
    weights, rest = scratch[:kernel_size], scratch[kernel_size:]
    radius = gaussian_taps(sigma, kernel_size, weights)
    if radius == 0:
        return
    # Rows of whole cache lines: no vector of the vertical pass straddles two lines (1.3x faster).
    stride = _round_up(width + 2 * radius)
    sums, rest = rest[: stride + LANES], rest[stride + LANES :]
    row, rest = rest[:LANES], rest[LANES:]
    padded = rest[-(rest.ctypes.data // 4) % _LINE :]
    rows = padded[: (height + 2 * radius) * stride].reshape((height + 2 * radius, stride))
    for c in range(3):
        _pad(view[c], radius, rows)
        _blur_rows(padded, stride, radius, weights, sums, row, view[c])


@inlined
def _round_up(count):
    return (count + _LINE - 1) // _LINE * _LINE


def scratch_floats(height: int, width: int, kernel_size: int) -> int:
    """Numbers of float32 scratch that `blur_` needs."""
    width = width + kernel_size + _LINE
    padded = (height + kernel_size) * width + _LINE + LANES  # the last vector may end after it
    return kernel_size + width + 2 * LANES + padded
