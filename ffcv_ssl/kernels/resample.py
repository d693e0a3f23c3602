"""A crop box of an interleaved uint8 image, resized with antialiasing to a planar float32 view, flipped if asked.

The filter is torch's antialiased bilinear or bicubic (`interpolate(..., antialias=True)`), in float32 throughout.
Two passes: rows first, because rows of the source are contiguous and a short row buffer stays in the first cache;
then columns. H W: view, in pixels; source rows are `width * 3` bytes.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined

BILINEAR, BICUBIC = 0, 1
_CUBIC_A = -0.5  # PIL's and torch's coefficient when antialiasing


@inlined
def _filter(distance, cubic):
    x = abs(distance)
    if cubic:
        if x < 1.0:
            return ((_CUBIC_A + 2.0) * x - (_CUBIC_A + 3.0)) * x * x + 1.0
        if x < 2.0:
            return (((x - 5.0) * x + 8.0) * x - 4.0) * _CUBIC_A
        return 0.0
    return 1.0 - x if x < 1.0 else 0.0


@device
def axis_taps(begin, extent, low, high, cubic, gain, first, count, weights):
    """Weights of one axis: output i is the sum over k < count[i] of weights[i, k] * input[first[i] + k].

    begin, extent: the box in input pixels, may be fractional. low, high: no tap lies outside [low, high).
    gain: every output's weights sum to it. weights: float32 (out, taps), wide enough (see `max_taps`).
    """
    num_outputs = first.size
    scale = extent / num_outputs
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if cubic else 1.0)
    for i in range(num_outputs):
        centre = begin + scale * (i + 0.5)
        start = max(int(np.floor(centre - support + 0.5)), low)
        stop = min(int(np.floor(centre + support + 0.5)), high)
        start = min(start, high - 1)
        stop = max(stop, start + 1)
        total = 0.0
        for k in range(stop - start):
            weight = _filter((start + k + 0.5 - centre) / stretch, cubic)
            weights[i, k] = weight
            total += weight
        first[i], count[i] = start, stop - start
        if total == 0.0:  # a box thinner than a pixel at the border: its nearest pixel
            weights[i, :count[i]] = 0.0
            weights[i, 0] = total = 1.0
        for k in range(stop - start):
            weights[i, k] = weights[i, k] * gain / total


def max_taps(max_input, output, cubic):
    """Most taps an output pixel can have when up to `max_input` pixels shrink to `output`."""
    return int(2 * np.ceil(max(max_input / output, 1.0) * (2 if cubic else 1))) + 2


@device
def _blend_rows(pixels, at, stride, num_taps, weights, row):
    """row[j] = sum over taps of weights[k] * pixels[at + k * stride + j]; two taps a pass halve the traffic of `row`."""
    size = row.size
    weight = weights[0]
    source = pixels[at : at + size]
    for j in range(size):
        row[j] = weight * np.float32(source[j])
    k = 1
    while k + 1 < num_taps:
        w0, w1 = weights[k], weights[k + 1]
        s0 = pixels[at + k * stride : at + k * stride + size]
        s1 = pixels[at + (k + 1) * stride : at + (k + 1) * stride + size]
        for j in range(size):
            row[j] += w0 * np.float32(s0[j]) + w1 * np.float32(s1[j])
        k += 2
    if k < num_taps:
        weight = weights[k]
        source = pixels[at + k * stride : at + k * stride + size]
        for j in range(size):
            row[j] += weight * np.float32(source[j])


@device
def _blend_columns(row, offset, first, count, weights, flip, red, green, blue):
    """Resize one interleaved row (its first pixel is column `offset`) into one row of each plane."""
    width = red.size
    for x in range(width):
        begin = (first[x] - offset) * 3
        r, g, b = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for k in range(count[x]):
            weight = weights[x, k]
            r += weight * row[begin]
            g += weight * row[begin + 1]
            b += weight * row[begin + 2]
            begin += 3
        target = width - 1 - x if flip else x
        red[target], green[target], blue[target] = r, g, b


@device
def resample(pixels, at, height, width, box, cubic, flip, view, scratch):
    """Render `box` (top, left, height, width; pixels of this image, may be fractional) into `view` (3, H, W) in [0, 1].

    pixels: flat uint8, the image's rows from byte `at`. scratch: flat float32 of `scratch_floats(...)` numbers.
    """
    top, left, box_height, box_width = box
    out_height, out_width = view.shape[1], view.shape[2]
    low_y, low_x = max(int(np.floor(top)), 0), max(int(np.floor(left)), 0)
    high_y = min(int(np.ceil(top + box_height)), height)
    high_x = min(int(np.ceil(left + box_width)), width)
    taps_y = _tap_room(box_height, out_height, cubic)
    taps_x = _tap_room(box_width, out_width, cubic)
    # the scratch's parts, one behind the other
    used = 0
    weights_y = scratch[used : used + out_height * taps_y].reshape((out_height, taps_y))
    used += out_height * taps_y
    weights_x = scratch[used : used + out_width * taps_x].reshape((out_width, taps_x))
    used += out_width * taps_x
    index = scratch[used : used + 2 * (out_height + out_width)].view(np.int32)
    used += 2 * (out_height + out_width)
    row = scratch[used : used + 3 * (high_x - low_x)]
    first_y, count_y = index[:out_height], index[out_height : 2 * out_height]
    first_x = index[2 * out_height : 2 * out_height + out_width]
    count_x = index[2 * out_height + out_width :]
    axis_taps(top, box_height, low_y, high_y, cubic, 1.0 / 255.0, first_y, count_y, weights_y)
    axis_taps(left, box_width, low_x, high_x, cubic, 1.0, first_x, count_x, weights_x)
    stride = width * 3
    for y in range(out_height):
        begin = at + first_y[y] * stride + low_x * 3
        _blend_rows(pixels, begin, stride, count_y[y], weights_y[y], row)
        _blend_columns(
            row, low_x, first_x, count_x, weights_x, flip, view[0, y], view[1, y], view[2, y]
        )
    if cubic:  # it overshoots, and what follows expects [0, 1]
        for c in range(3):
            for y in range(out_height):
                for x in range(out_width):
                    view[c, y, x] = min(max(view[c, y, x], np.float32(0.0)), np.float32(1.0))


@inlined
def _tap_room(extent, output, cubic):
    return int(2 * np.ceil(max(extent / output, 1.0) * (2 if cubic else 1))) + 2


def scratch_floats(max_height, max_width, out_height, out_width, cubic):
    """Numbers of float32 scratch that `resample` needs for images up to this size."""
    taps = out_height * max_taps(max_height, out_height, cubic)
    taps += out_width * max_taps(max_width, out_width, cubic)
    return taps + 2 * (out_height + out_width) + 3 * max_width


@device
def unpack(pixels, at, flip, view):
    """An interleaved uint8 image of the view's own size to planar float32 in [0, 1]."""
    height, width = view.shape[1], view.shape[2]
    scale = np.float32(1.0 / 255.0)
    for y in range(height):
        source = pixels[at + y * width * 3 : at + (y + 1) * width * 3]
        red, green, blue = view[0, y], view[1, y], view[2, y]
        for x in range(width):
            target = width - 1 - x if flip else x
            red[target] = np.float32(source[3 * x]) * scale
            green[target] = np.float32(source[3 * x + 1]) * scale
            blue[target] = np.float32(source[3 * x + 2]) * scale


@device
def pack(view, out):
    """Planar float32 in [0, 1] to interleaved uint8 (H, W, 3): the one rounding of a view, half up."""
    height, width = view.shape[1], view.shape[2]
    scale, half = np.float32(255.0), np.float32(0.5)
    for y in range(height):
        red, green, blue, row = view[0, y], view[1, y], view[2, y], out[y]
        for x in range(width):
            row[x, 0] = np.uint8(np.int32(red[x] * scale + half))
            row[x, 1] = np.uint8(np.int32(green[x] * scale + half))
            row[x, 2] = np.uint8(np.int32(blue[x] * scale + half))
