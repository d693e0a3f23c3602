"""Flip, colour jitter, greyscale and solarization on planar float32 views (3, H, W) in [0, 1], in
place.

Equations: torchvision's functional ops on float images (brightness, contrast and saturation blend
and clamp; hue turns in HSV). All steps of the jitter are done to a chunk of pixels while it is in
the first cache.
"""

import numba
import numpy as np

from ffcv_ssl.kernels.compile import SAFE_MATH, device, inlined

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # ITU-R 601
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_TWO, _THREE, _FOUR, _SIX = np.float32(2.0), np.float32(3.0), np.float32(4.0), np.float32(6.0)
_TINY = np.float32(1e-30)
_CHUNK = 1024  # pixels


@inlined
def _clamp(value):
    return min(max(value, _ZERO), _ONE)


@inlined
def _luma(r, g, b):
    return _RED * r + _GREEN * g + _BLUE * b


@device
def flip_(view):
    """Mirror left and right."""
    for c in range(3):
        for y in range(view.shape[1]):
            row = view[c, y]
            for x in range(row.size // 2):
                row[x], row[row.size - 1 - x] = row[row.size - 1 - x], row[x]


# The only sum in these kernels: its order may change (vector lanes), per chunk and in float32, the
# same on every run.
@numba.njit(nogil=True, fastmath=SAFE_MATH | {"reassoc"}, error_model="numpy")
def _luma_sum(red, green, blue):
    total = _ZERO
    for x in range(red.size):
        total += _luma(red[x], green[x], blue[x])
    return total


@device
def _blend(red, green, blue, factor, other):
    """v -> clamp(factor * v + other), `other` the same for all pixels: brightness (0) and contrast.

    All loads stand before all stores: the planes of a view of 224 or 32 pixels lie a multiple of
    4 KB apart, where a load seems to depend on the store before it (1.3x slower).
    """
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        red[x] = _clamp(factor * r + other)
        green[x] = _clamp(factor * g + other)
        blue[x] = _clamp(factor * b + other)


@device
def _saturate(red, green, blue, factor):
    rest = _ONE - factor
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        grey = rest * _luma(r, g, b)
        red[x] = _clamp(factor * r + grey)
        green[x] = _clamp(factor * g + grey)
        blue[x] = _clamp(factor * b + grey)


@device
def _turn_hue(red, green, blue, turns):
    """Add `turns` (of the colour circle, -0.5 to 0.5) to the hue; value and saturation stay.

    With the new hue h in [0, 6), value v and chroma c: R = v - c * clamp(2 - |h - 3|), G = v - c *
    clamp(|h - 2| - 1), B = v - c * clamp(|h - 4| - 1), which is the usual table of six cases
    without branches. No result needs a clamp: it is a rounding of a number between v - c and v.
    """
    # The old hue is in [-1, 5]; a shift in [1, 7) makes the sum at least 0, so one turn back is
    # enough.
    shift = _SIX * turns
    shift = shift + _SIX if shift < _ONE else shift
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        scale = _ONE / max(chroma, _TINY)
        hue = _FOUR + (r - g) * scale
        hue = _TWO + (b - r) * scale if value == g else hue
        hue = (g - b) * scale if value == r else hue
        hue = hue + shift
        hue = hue - _SIX if hue >= _SIX else hue
        red[x] = value - chroma * _clamp(_TWO - abs(hue - _THREE))
        green[x] = value - chroma * _clamp(abs(hue - _TWO) - _ONE)
        blue[x] = value - chroma * _clamp(abs(hue - _FOUR) - _ONE)


@inlined
def _step(step, red, green, blue, brightness, saturation, hue):
    if step == BRIGHTNESS:
        if brightness != _ONE:
            _blend(red, green, blue, brightness, _ZERO)
    elif step == SATURATION:
        if saturation != _ONE:
            _saturate(red, green, blue, saturation)
    elif step == HUE:
        if hue != _ZERO:
            _turn_hue(red, green, blue, hue)


@device
def jitter_(view, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter with given factors; `order` packs the four steps, two bits each,
    the first lowest.

    Contrast needs the mean luma of the whole image as the steps before it left it, so the view is
    walked twice: up to contrast while summing, then the rest.
    """
    b, c = np.float32(brightness), np.float32(contrast)
    s, h = np.float32(saturation), np.float32(hue)
    position = 0
    while (order >> (2 * position)) & 3 != CONTRAST:
        position += 1
    size, total = view.shape[1] * view.shape[2], 0.0
    for begin in range(0, size, _CHUNK):
        red, green, blue = _chunk(view, begin)
        for i in range(position):
            _step((order >> (2 * i)) & 3, red, green, blue, b, s, h)
        if c != _ONE:
            total += _luma_sum(red, green, blue)
    other = np.float32((1.0 - contrast) * total / size)
    if c == _ONE and position == 3:
        return
    for begin in range(0, size, _CHUNK):
        red, green, blue = _chunk(view, begin)
        if c != _ONE:
            _blend(red, green, blue, c, other)
        for i in range(position + 1, 4):
            _step((order >> (2 * i)) & 3, red, green, blue, b, s, h)


@inlined
def _chunk(view, begin):
    """Up to _CHUNK pixels of the three planes."""
    size, flat = view.shape[1] * view.shape[2], view.reshape(-1)
    stop = min(begin + _CHUNK, size)
    return (
        flat[begin:stop],
        flat[size + begin : size + stop],
        flat[2 * size + begin : 2 * size + stop],
    )


@device
def grayscale_(view):
    """All channels become the luma 0.2989 R + 0.587 G + 0.114 B."""
    size, flat = view.shape[1] * view.shape[2], view.reshape(-1)
    red, green, blue = flat[:size], flat[size : 2 * size], flat[2 * size :]
    for i in range(size):
        luma = _luma(red[i], green[i], blue[i])
        red[i], green[i], blue[i] = luma, luma, luma


@device
def solarize_(view, threshold):
    """v -> 1 - v where v >= threshold; both in [0, 1]."""
    limit, flat = np.float32(threshold), view.reshape(-1)
    for i in range(flat.size):
        value = flat[i]
        flat[i] = _ONE - value if value >= limit else value
