"""A crop box of an interleaved uint8 image, resized with antialiasing to a planar float32 view,
flipped if asked.

The filter is torch's antialiased bilinear or bicubic (`interpolate(..., antialias=True)`), in
float32 throughout. Two passes: rows first, because rows of the source are contiguous and a short
row buffer stays in the first cache; then columns. H W: view, in pixels; source rows are `width * 3`
bytes.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.kernels.vectors import (
    BLOCK,
    add_blend_4,
    blend_1,
    blend_2,
    blend_3,
    blend_4,
    blend_5,
    interleave,
    split_planes,
)

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
    """Weights of one axis: output i is the sum over k < count[i] of weights[i, k] * input[first[i]
    + k].

    begin, extent: the box in input pixels, may be fractional. low, high: no tap lies outside [low,
    high).
    gain: every output's weights sum to it. weights: float32 (out, taps), wide enough (see
    `max_taps`), zero behind count[i]. Returns the largest count.
    """
    num_outputs, most = first.size, 0
    scale = extent / num_outputs
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if cubic else 1.0)
    for i in range(num_outputs):
        centre = begin + scale * (i + 0.5)
        start = max(int(np.floor(centre - support + 0.5)), low)
        stop = min(int(np.floor(centre + support + 0.5)), high)
        start = min(start, high - 1)
        stop = max(stop, start + 1)
        weights[i, :] = 0.0
        total = 0.0
        for k in range(stop - start):
            weight = _filter((start + k + 0.5 - centre) / stretch, cubic)
            weights[i, k] = weight
            total += weight
        if total == 0.0:  # a box thinner than a pixel at the border: its nearest pixel
            weights[i, :] = 0.0
            weights[i, 0] = total = 1.0
        for k in range(stop - start):
            weights[i, k] = weights[i, k] * gain / total
        first[i], count[i] = start, stop - start
        most = max(most, stop - start)
    return most


def max_taps(max_input, output, cubic):
    """Room for an output pixel's taps when up to `max_input` pixels shrink to `output`: a multiple
    of four."""
    return 4 * (int(2 * np.ceil(max(max_input / output, 1.0) * (2 if cubic else 1)) + 5) // 4)


@device
def _blend_rows(pixels, at, stride, num_taps, weights, row):
    """row[j] = sum over taps of weights[k] * pixels[at + k * stride + j].

    Two taps a pass halve the traffic of `row`; three or four a pass gain 5 % more, explicit vectors
    nothing.
    """
    size = row.size
    w0 = weights[0]
    s0 = pixels[at : at + size]
    if num_taps == 1:
        for j in range(size):
            row[j] = w0 * np.float32(s0[j])
        return
    w1 = weights[1]
    s1 = pixels[at + stride : at + stride + size]
    for j in range(size):
        row[j] = w0 * np.float32(s0[j]) + w1 * np.float32(s1[j])
    for k in range(2, num_taps - 1, 2):
        w0, w1 = weights[k], weights[k + 1]
        s0 = pixels[at + k * stride : at + k * stride + size]
        s1 = pixels[at + (k + 1) * stride : at + (k + 1) * stride + size]
        for j in range(size):
            row[j] += w0 * np.float32(s0[j]) + w1 * np.float32(s1[j])
    if num_taps % 2:
        w0, begin = weights[num_taps - 1], at + (num_taps - 1) * stride
        s0 = pixels[begin : begin + size]
        for j in range(size):
            row[j] += w0 * np.float32(s0[j])


@device
def _blend_columns(rows, step, begins, taps, weights, flip, blended):
    """Resize two interleaved rows, `step` apart in `rows`, into two rows of four numbers a pixel in
    `blended`.

    begins[x]: where in a row pixel x's first tap starts. taps: of every pixel, some of weight zero.
    The same number for all, and at most five at once, keeps them in registers and the branches
    predicted: 3x faster than a loop to each pixel's own count; two rows at a time share the
    weights: 1.25x.
    """
    width, room = begins.size, weights.size // begins.size
    out_step = 4 * width
    for x in range(width):
        at, weight_at = begins[x], x * room
        target = 4 * (width - 1 - x) if flip else 4 * x
        if taps == 2:
            blend_2(rows, at, step, weights, weight_at, blended, target, out_step)
        elif taps == 3:
            blend_3(rows, at, step, weights, weight_at, blended, target, out_step)
        elif taps == 1:
            blend_1(rows, at, step, weights, weight_at, blended, target, out_step)
        elif taps == 5:
            blend_5(rows, at, step, weights, weight_at, blended, target, out_step)
        else:
            blend_4(rows, at, step, weights, weight_at, blended, target, out_step)
            for k in range(4, taps, 4):  # up to three taps too many, of weight zero
                add_blend_4(
                    rows, at + 3 * k, step, weights, weight_at + k, blended, target, out_step
                )


@device
def _split_row(blended, red, green, blue):
    """One row of four numbers a pixel to three planes; explicit vectors are 4x faster than LLVM's
    own."""
    width = red.size
    if width < BLOCK:
        for x in range(width):
            red[x], green[x], blue[x] = blended[4 * x], blended[4 * x + 1], blended[4 * x + 2]
        return
    for begin in range(0, width, BLOCK):
        x = min(begin, width - BLOCK)  # the last block overlaps the one before it
        split_planes(blended, 4 * x, red, green, blue, x)


@device
def resample(pixels, at, height, width, box, cubic, flip, view, scratch):
    """Render `box` (top, left, height, width; pixels of this image, may be fractional) into `view`
    (3, H, W) in [0, 1].

    pixels: flat uint8, the image's rows from byte `at`. scratch: flat float32 of
    `scratch_floats(...)` numbers.
    """
    top, left, box_height, box_width = box
    out_height, out_width = view.shape[1], view.shape[2]
    low_y, low_x = max(int(np.floor(top)), 0), max(int(np.floor(left)), 0)
    high_y = min(int(np.ceil(top + box_height)), height)
    high_x = min(int(np.ceil(left + box_width)), width)
    taps_y = _tap_room(box_height, out_height, cubic)
    taps_x = _tap_room(box_width, out_width, cubic)
    # the scratch's parts, one behind the other
    weights_y, scratch = _take(scratch, out_height * taps_y)
    weights_x, scratch = _take(scratch, out_width * taps_x)
    index, scratch = _take(scratch, 2 * (out_height + out_width))
    blended, scratch = _take(scratch, 8 * out_width)
    index = index.view(np.int32)
    first_y, count_y = index[:out_height], index[out_height : 2 * out_height]
    first_x = index[2 * out_height : 2 * out_height + out_width]
    count_x = index[2 * out_height + out_width :]
    by_row = weights_y.reshape((out_height, taps_y))
    by_column = weights_x.reshape((out_width, taps_x))
    axis_taps(top, box_height, low_y, high_y, cubic, 1.0 / 255.0, first_y, count_y, by_row)
    most = axis_taps(left, box_width, low_x, high_x, cubic, 1.0, first_x, count_x, by_column)
    for x in range(out_width):
        first_x[x] = 3 * (first_x[x] - low_x)
    size, stride = 3 * (high_x - low_x), width * 3
    step = size + 3 * taps_x + 1
    rows = scratch[: 2 * step]
    rows[:] = 0.0  # taps of weight zero reach behind a row: 0 * NaN would not be zero
    for y in range(0, out_height, 2):
        for i in range(2):
            source = min(y + i, out_height - 1)
            begin = at + first_y[source] * stride + low_x * 3
            row = rows[i * step : i * step + size]
            _blend_rows(pixels, begin, stride, count_y[source], by_row[source], row)
        _blend_columns(rows, step, first_x, most, weights_x, flip, blended)
        for i in range(min(2, out_height - y)):
            pixels_of_row = blended[4 * out_width * i : 4 * out_width * (i + 1)]
            _split_row(pixels_of_row, view[0, y + i], view[1, y + i], view[2, y + i])
    if cubic:  # it overshoots, and what follows expects [0, 1]
        for c in range(3):
            for y in range(out_height):
                for x in range(out_width):
                    view[c, y, x] = min(max(view[c, y, x], np.float32(0.0)), np.float32(1.0))


@inlined
def _tap_room(extent, output, cubic):
    return 4 * (int(2 * np.ceil(max(extent / output, 1.0) * (2 if cubic else 1)) + 5) // 4)


@inlined
def _take(scratch, count):
    return scratch[:count], scratch[count:]


def scratch_floats(max_height, max_width, out_height, out_width, cubic):
    """Numbers of float32 scratch that `resample` needs for images up to this size."""
    taps_x = max_taps(max_width, out_width, cubic)
    weights = out_height * max_taps(max_height, out_height, cubic) + out_width * taps_x
    rows = 2 * (3 * max_width + 3 * taps_x + 1)
    return weights + 2 * (out_height + out_width) + 8 * out_width + rows


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
    """Planar float32 in [0, 1] to interleaved uint8 (H, W, 3): the one rounding of a view, half up.

    Explicit vectors: 3.4x faster than what LLVM makes of the plain loop.
    """
    height, width = view.shape[1], view.shape[2]
    scale, half = np.float32(255.0), np.float32(0.5)
    for y in range(height):
        red, green, blue, row = view[0, y], view[1, y], view[2, y], out[y].reshape(-1)
        if width < BLOCK:
            for x in range(width):
                row[3 * x] = np.uint8(np.int32(red[x] * scale + half))
                row[3 * x + 1] = np.uint8(np.int32(green[x] * scale + half))
                row[3 * x + 2] = np.uint8(np.int32(blue[x] * scale + half))
            continue
        for begin in range(0, width, BLOCK):
            x = min(begin, width - BLOCK)  # the last block overlaps the one before it
            interleave(red, green, blue, x, row, 3 * x)
