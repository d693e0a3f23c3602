"""Resize a crop box of an interleaved uint8 image, with antialiasing, to a planar float32 view;
optionally flip it.

The filter is torch's antialiased bilinear or bicubic (`interpolate(..., antialias=True)`), in
float32 throughout. Two passes: rows first, because rows of the source are contiguous; then columns.
The second pass takes TILE rows at once. It transposes them, so that one vector holds the same
number of all rows, and transposes the result back into the view's planes. This is 1.2x faster than
one vector per pixel. H W: view, in pixels; source rows are `width * 3` bytes.
"""

import numpy as np

from ffcv_ssl.kernels.color import flip_
from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.kernels.vectors import (
    BLOCK,
    ROW_LANES,
    TILE,
    blend_1,
    blend_2,
    blend_3,
    blend_4,
    blend_5,
    blend_bytes,
    blend_many,
    interleave,
    transpose,
)

BILINEAR, BICUBIC = 0, 1
_CUBIC_A = -0.5  # the coefficient of PIL and torch with antialiasing
_LINE = 16  # numbers in a cache line


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

    begin, extent: the box in input pixels, may be fractional. low, high: all taps lie in [low,
    high). gain: the sum of each output's weights. weights: float32 (out, taps), wide enough (see
    `max_taps`), zero after count[i]. Returns the largest count.
    """
    num_outputs, most = first.size, 0
    scale = extent / num_outputs
    stretch = max(scale, 1.0)
    shrink = 1.0 / stretch
    support = stretch * (2.0 if cubic else 1.0)
    for i in range(num_outputs):
        centre = begin + scale * (i + 0.5)
        start = max(int(np.floor(centre - support + 0.5)), low)
        stop = min(int(np.floor(centre + support + 0.5)), high)
        start = min(start, high - 1)
        taps = max(stop - start, 1)
        row = weights[i]
        total = 0.0
        for k in range(taps):
            weight = _filter((start + k + 0.5 - centre) * shrink, cubic)
            row[k] = weight
            total += weight
        if total == 0.0:  # a box thinner than a pixel at the border: take its nearest pixel
            row[0] = total = 1.0
        factor = np.float32(gain / total)
        for k in range(taps):
            row[k] *= factor
        for k in range(taps, row.size):
            row[k] = 0.0
        first[i], count[i] = start, taps
        most = max(most, taps)
    return most


def max_taps(max_input: int, output: int, cubic: bool) -> int:
    """Room for the taps of an output pixel when up to `max_input` pixels shrink to `output`; a
    multiple of four."""
    return 4 * (int(2 * np.ceil(max(max_input / output, 1.0) * (2 if cubic else 1)) + 5) // 4)


@device
def _blend_rows(pixels, at, stride, taps, weights, weight_at, rows, row_at, size):
    """rows[row_at + j] = sum over k < taps of weights[weight_at + k] * pixels[at + k * stride + j].

    On wide rows this is as fast as LLVM's own vectors. Views of 32 pixels gain 7 %, because a short
    row is mostly the start and the remainder of a loop.
    """
    if size < ROW_LANES:
        for j in range(size):
            total = np.float32(0.0)
            for k in range(taps):
                total += weights[weight_at + k] * np.float32(pixels[at + k * stride + j])
            rows[row_at + j] = total
        return
    for begin in range(0, size, ROW_LANES):
        j = min(begin, size - ROW_LANES)  # the last vector overlaps the one before it
        blend_bytes(pixels, at + j, stride, weights, weight_at, taps, rows, row_at + j)


@device
def _blend_columns(columns, begins, taps, weights, room, flip, x, tile):
    """Resize TILE rows to `tile` (3, TILE pixels, TILE rows): the pixels x, x + 1, ..., optionally
    mirrored.

    columns: the rows transposed. One vector holds the same number of all TILE rows, so one weight
    serves all of them and no lane is wasted. begins[x]: where the first tap of pixel x starts.
    room: distance between the weights of two pixels. taps: the same for every pixel (some weights
    are zero); this keeps the branches predicted, 3x faster than a count per pixel.
    """
    count = min(TILE, begins.size)
    place, step = (TILE * (count - 1), -TILE) if flip else (0, TILE)
    for pixel in range(x, x + count):
        at, weight_at = TILE * begins[pixel], pixel * room
        if taps == 2:
            blend_2(columns, at, weights, weight_at, tile, place, taps)
        elif taps == 3:
            blend_3(columns, at, weights, weight_at, tile, place, taps)
        elif taps == 1:
            blend_1(columns, at, weights, weight_at, tile, place, taps)
        elif taps == 4:
            blend_4(columns, at, weights, weight_at, tile, place, taps)
        elif taps == 5:
            blend_5(columns, at, weights, weight_at, tile, place, taps)
        else:
            blend_many(columns, at, weights, weight_at, tile, place, taps)
        place += step


@device
def _store_tile(tile, flat, height, width, y, x):
    """Write a tile to the `flat` planes of a view, its first pixel at row y, column x. Pixels
    outside the view are left out."""
    if height >= TILE and width >= TILE:
        for c in range(3):
            place = (c * height + y) * width + x
            transpose(tile, c * TILE * TILE, TILE, flat, place, width)
        return
    for c in range(3):
        for i in range(min(TILE, height)):
            for j in range(min(TILE, width)):
                place = (c * height + y + i) * width + x + j
                flat[place] = tile[(c * TILE + j) * TILE + i]


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
    # the parts of the scratch, one after the other
    weights_y, scratch = _take(scratch, out_height * taps_y)
    weights_x, scratch = _take(scratch, out_width * taps_x)
    index, scratch = _take(scratch, 2 * (out_height + out_width))
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
    step = _row_step(size)
    flat = view.reshape(-1)  # only once: it costs as much as transposing a tile
    tile, scratch = _take_lines(scratch, 3 * TILE * TILE)
    rows, scratch = _take_lines(scratch, TILE * step)
    columns, scratch = _take_lines(scratch, TILE * (size + TILE + 3 * taps_x))
    for y in range(0, out_height, TILE):
        y = max(min(y, out_height - TILE), 0)  # the last tiles overlap the tiles before them
        for i in range(TILE):
            source = min(y + i, out_height - 1)
            begin, weight_at = at + first_y[source] * stride + low_x * 3, source * taps_y
            taps = count_y[source]
            _blend_rows(pixels, begin, stride, taps, weights_y, weight_at, rows, i * step, size)
        for j in range(0, size, TILE):
            transpose(rows, j, step, columns, TILE * j, TILE)
        for j in range(TILE * size, TILE * (size + 3 * most)):
            columns[j] = 0.0  # taps of weight 0 read past the row's end, and 0 * NaN is not 0
        for x in range(0, out_width, TILE):
            x = max(min(x, out_width - TILE), 0)
            _blend_columns(columns, first_x, most, weights_x, taps_x, flip, x, tile)
            target = max(out_width - TILE, 0) - x if flip else x
            _store_tile(tile, flat, out_height, out_width, y, target)
    if cubic:  # bicubic overshoots, and later code expects [0, 1]
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


@inlined
def _take_lines(scratch, count):
    """Like `_take`, aligned to a cache line: no vector straddles two lines."""
    begin = -(scratch.ctypes.data // 4) % _LINE
    return scratch[begin : begin + count], scratch[begin + count :]


@inlined
def _row_step(size):
    """An odd number of cache lines for a row and its last tile: a tile of rows 4 KB apart would not
    fit into the L1 cache."""
    return ((size + TILE + _LINE - 1) // _LINE | 1) * _LINE


def scratch_floats(
    max_height: int, max_width: int, out_height: int, out_width: int, cubic: bool
) -> int:
    """Numbers of float32 scratch that `resample` needs for images up to this size."""
    taps_x = max_taps(max_width, out_width, cubic)
    weights = out_height * max_taps(max_height, out_height, cubic) + out_width * taps_x
    rows = TILE * (2 * (3 * max_width + TILE) + 2 * _LINE + 3 * taps_x) + 3 * _LINE
    return weights + 2 * (out_height + out_width) + 3 * TILE * TILE + rows


@device
def unpack(pixels, at, flip, view):
    """Convert an interleaved uint8 image of the view's size to planar float32 in [0, 1]."""
    height, width = view.shape[1], view.shape[2]
    size, scale = height * width, np.float32(1.0 / 255.0)
    flat, source = view.reshape(-1), pixels[at : at + 3 * size]
    red, green, blue = flat[:size], flat[size : 2 * size], flat[2 * size :]
    for i in range(size):
        red[i] = np.float32(source[3 * i]) * scale
        green[i] = np.float32(source[3 * i + 1]) * scale
        blue[i] = np.float32(source[3 * i + 2]) * scale
    if flip:
        flip_(view)


@device
def pack(view, out):
    """Convert planar float32 in [0, 1] to interleaved uint8 (H, W, 3), rounding half up. A view is
    rounded only here.

    Explicit vectors are 3.4x faster than LLVM's code for the plain loop.
    """
    size = view.shape[1] * view.shape[2]
    flat, levels = view.reshape(-1), out.reshape(-1)
    red, green, blue = flat[:size], flat[size : 2 * size], flat[2 * size :]
    if size < BLOCK:
        scale, half = np.float32(255.0), np.float32(0.5)
        for i in range(size):
            levels[3 * i] = np.uint8(np.int32(red[i] * scale + half))
            levels[3 * i + 1] = np.uint8(np.int32(green[i] * scale + half))
            levels[3 * i + 2] = np.uint8(np.int32(blue[i] * scale + half))
        return
    for begin in range(0, size, BLOCK):
        i = min(begin, size - BLOCK)  # the last block overlaps the one before it
        interleave(red, green, blue, i, levels, 3 * i)
