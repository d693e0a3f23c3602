"""Separable Gaussian blur of planar float32 views (3, H, W), in place, reflected borders (101: the edge not repeated).

Equation: torchvision's gaussian_blur. Weights exp(-d**2 / 2 sigma**2), normalised over the taps used. Taps lighter than
1/4096 of the middle one are left out: at sigma 1 that is 9 taps instead of 23, and moves no pixel by 0.1/255.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined

_LIGHTEST = 1.0 / 4096.0


@inlined
def _reflect(i, size):
    """Index of the mirrored image, for any distance outside and any size, 1 included."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    i = abs(i) % period
    return period - i if i >= size else i


@device
def gaussian_taps(sigma, kernel_size, weights):
    """Fill weights[d] for distances d = 0 .. radius; returns the radius that is used."""
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
def _blur_columns(plane, y, radius, weights, row):
    """row = output row y of the vertical pass."""
    height = plane.shape[0]
    middle, weight = plane[y], weights[0]
    for x in range(row.size):
        row[x] = weight * middle[x]
    distance = 1
    while distance < radius:  # two distances, four source rows, for one pass over `row`
        w0, w1 = weights[distance], weights[distance + 1]
        a, b = plane[_reflect(y - distance, height)], plane[_reflect(y + distance, height)]
        c = plane[_reflect(y - distance - 1, height)]
        d = plane[_reflect(y + distance + 1, height)]
        for x in range(row.size):
            row[x] += w0 * (a[x] + b[x]) + w1 * (c[x] + d[x])
        distance += 2
    if distance == radius:
        weight = weights[distance]
        a, b = plane[_reflect(y - distance, height)], plane[_reflect(y + distance, height)]
        for x in range(row.size):
            row[x] += weight * (a[x] + b[x])


@device
def _blur_row(padded, radius, weights, row):
    """row = horizontal pass over `padded`, which is the source row with `radius` reflected pixels at both ends."""
    size = row.size
    middle, weight = padded[radius : radius + size], weights[0]
    for x in range(size):
        row[x] = weight * middle[x]
    distance = 1
    while distance < radius:
        w0, w1 = weights[distance], weights[distance + 1]
        a = padded[radius - distance : radius - distance + size]
        b = padded[radius + distance : radius + distance + size]
        c = padded[radius - distance - 1 : radius - distance - 1 + size]
        d = padded[radius + distance + 1 : radius + distance + 1 + size]
        for x in range(size):
            row[x] += w0 * (a[x] + b[x]) + w1 * (c[x] + d[x])
        distance += 2
    if distance == radius:
        weight = weights[distance]
        a = padded[radius - distance : radius - distance + size]
        b = padded[radius + distance : radius + distance + size]
        for x in range(size):
            row[x] += weight * (a[x] + b[x])


@device
def blur_(view, sigma, kernel_size, scratch):
    """Blur in place. scratch: flat float32 of at least H * W + W + 2 * kernel_size numbers."""
    height, width = view.shape[1], view.shape[2]
    weights = scratch[:kernel_size]
    radius = gaussian_taps(sigma, kernel_size, weights)
    if radius == 0:
        return
    padded = scratch[kernel_size : kernel_size + width + 2 * radius]
    used = kernel_size + width + 2 * radius
    blurred = scratch[used : used + height * width].reshape((height, width))
    for c in range(3):
        plane = view[c]
        for y in range(height):
            _blur_columns(plane, y, radius, weights, blurred[y])
        for y in range(height):
            source = blurred[y]
            for x in range(width):
                padded[radius + x] = source[x]
            for x in range(radius):
                padded[x] = source[_reflect(x - radius, width)]
                padded[radius + width + x] = source[_reflect(width + x, width)]
            _blur_row(padded, radius, weights, plane[y])


def scratch_floats(height, width, kernel_size):
    """Numbers of float32 scratch that `blur_` needs."""
    return height * width + width + 2 * kernel_size + 2
