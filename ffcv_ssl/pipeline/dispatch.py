"""A view's ops as tables of numbers, and the two kernels that run them: draw, then render.

One compiled pair serves every pipeline, resolution, probability and range: changing them changes
table entries and never compiles. The chains of `if` below are the only places that know all ops.

Table `ops`, int64 (ops, 4): opcode | first raw column | linked (1: the draw is copied from another
view) | flip column of a crop that also mirrors (-1: none). Table `constants`, float64 (ops, 8): the
op's settings. `keys`, uint64 (ops,). N samples, K raw columns, H W pixels of the view.
"""

import numpy as np

from ffcv_ssl.kernels.blur import blur_
from ffcv_ssl.kernels.color import flip_, grayscale_, jitter_, solarize_
from ffcv_ssl.kernels.compile import device, kernel
from ffcv_ssl.kernels.equalize import equalize_
from ffcv_ssl.kernels.noise import add_noise_
from ffcv_ssl.kernels.resample import pack, resample, unpack
from ffcv_ssl.transforms.color_jitter import draw_jitter
from ffcv_ssl.transforms.crop import draw_center_crop, draw_random_crop
from ffcv_ssl.transforms.flip import draw_switch
from ffcv_ssl.transforms.gaussian_blur import draw_sigma
from ffcv_ssl.transforms.gaussian_noise import draw_noise_key

OPCODES = range(10)
WHOLE, RANDOM_CROP, CENTER_CROP, FLIP, JITTER, GRAY, BLUR, SOLARIZE, EQUALIZE, NOISE = OPCODES
FOLDED = -1  # opcode of a flip that the crop before it carries out


@kernel(
    "void(int64[:, ::1], float64[:, ::1], uint64[::1], uint64, int64[::1], int64[::1], "
    "int64[::1], int64[::1], float64[:, ::1])"
)
def draw_view(ops, constants, keys, epoch, samples, occurrences, heights, widths, raw):
    """Fill raw (N, K) with the parameters of samples (N,) in images of heights x widths (N,)."""
    for n in range(samples.size):
        sample, turn = np.uint64(samples[n]), np.uint64(occurrences[n])
        for i in range(ops.shape[0]):
            if ops[i, 2]:
                continue
            opcode, key, settings, row = ops[i, 0], keys[i], constants[i], raw[n, ops[i, 1] :]
            if opcode == RANDOM_CROP:
                draw_random_crop(key, epoch, sample, turn, settings, heights[n], widths[n], row)
            elif opcode == CENTER_CROP:
                draw_center_crop(settings, heights[n], widths[n], row)
            elif opcode == JITTER:
                draw_jitter(key, epoch, sample, turn, settings, row)
            elif opcode == BLUR:
                draw_sigma(key, epoch, sample, turn, settings, row)
            elif opcode == NOISE:
                draw_noise_key(key, epoch, sample, turn, settings, row)
            elif opcode in (FLIP, GRAY, SOLARIZE, EQUALIZE):
                draw_switch(key, epoch, sample, turn, settings, row)


@device
def _start(opcode, settings, row, flip, pixels, at, height, width, factor, view, scratch):
    """The first op of a segment: from interleaved bytes to a planar float view. `factor`: the image
    was decoded at 1/factor."""
    if opcode == RANDOM_CROP or opcode == CENTER_CROP:
        box = (row[0] / factor, row[1] / factor, row[2] / factor, row[3] / factor)
        resample(pixels, at, height, width, box, settings[4] != 0.0, flip, view, scratch)
    else:
        unpack(pixels, at, flip, view)


@device
def _apply(opcode, settings, row, view, scratch):
    """Any later op, in place."""
    if opcode == FLIP:
        if row[0] != 0.0:
            flip_(view)
    elif opcode == JITTER:
        if row[0] != 0.0:
            jitter_(view, row[1], row[2], row[3], row[4], int(row[5]))
    elif opcode == GRAY:
        if row[0] != 0.0:
            grayscale_(view)
    elif opcode == BLUR:
        if row[0] != 0.0:
            blur_(view, row[0], int(settings[3]), scratch)
    elif opcode == SOLARIZE:
        if row[0] != 0.0:
            solarize_(view, settings[1])
    elif opcode == EQUALIZE:
        if row[0] != 0.0:
            equalize_(view, scratch)
    elif opcode == NOISE:
        if row[0] != 0.0:
            add_noise_(view, settings[1], np.uint64(row[0]))


@kernel(
    "void(int64[:, ::1], float64[:, ::1], float64[:, ::1], uint8[::1], int64[::1], int64[::1], "
    "int64[::1], int64[::1], float32[::1], uint8[:, :, :, ::1], int64, int64)"
)
def render_view(
    ops, constants, raw, pixels, offsets, heights, widths, factors, scratch, out, begin, stop
):
    """For n in begin .. stop - 1: out[n] (H, W, 3) uint8 = the view of the image at byte offsets[n]
    of `pixels`, for the parameters raw[n].

    heights, widths (N,): of the decoded image, rows of width * 3 bytes. factors (N,): 1, or 2, 4, 8
    where the image was decoded at a fraction of the size that raw's boxes refer to. scratch: 3 H W
    floats for the view in work, then what the ops need.
    """
    height, width = out.shape[1], out.shape[2]
    view = scratch[: 3 * height * width].reshape((3, height, width))
    scratch = scratch[3 * height * width :]
    for n in range(begin, stop):
        row, flip_column = raw[n], ops[0, 3]
        flip = flip_column >= 0 and row[max(flip_column, 0)] != 0.0
        _start(
            ops[0, 0],
            constants[0],
            row[ops[0, 1] :],
            flip,
            pixels,
            offsets[n],
            heights[n],
            widths[n],
            factors[n],
            view,
            scratch,
        )
        for i in range(1, ops.shape[0]):
            _apply(ops[i, 0], constants[i], row[ops[i, 1] :], view, scratch)
        pack(view, out[n])
