"""A baseline JPEG's pixels, or those of a box: row by row of blocks, in memory for two such rows.

Shapes: H W pixels of the image. An MCU is the group of blocks that a scan repeats: 8 or 16 pixels a
side.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from ffcv_ssl.kernels.compile import device, inlined, kernel
from ffcv_ssl.kernels.jpeg import headers, huffman, inverse_dct
from ffcv_ssl.kernels.jpeg.chroma import (
    PIXELS,
    SUMS,
    blend_rows,
    grey_to_rgb,
    spread_blended,
    spread_row,
    to_rgb,
    widen_row,
)
from ffcv_ssl.kernels.jpeg.headers import (
    AC_TABLE,
    ACROSS,
    COMPONENTS,
    DC_TABLE,
    DOWN,
    FALLBACK,
    HEIGHT,
    INTERVAL,
    OK,
    QUANTIZATION,
    SCAN,
    TABLE_BYTES,
    WIDTH,
    read_headers,
)
from ffcv_ssl.kernels.jpeg.huffman import (
    PLACES,
    WRONG,
    long_difference,
    make_ac_table,
    make_dc_table,
    read_coefficients,
    window,
)
from ffcv_ssl.kernels.jpeg.inverse_dct import LARGEST_COLUMN, OUTSIDE, clear_block, fill_block
from ffcv_ssl.kernels.jpeg.memory import U, load16, load32, load64, signed16, store16, store64
from ffcv_ssl.kernels.jpeg.scan import MAX_RESTARTS, PADDING, unstuff

MARGIN = 128
"""Bytes behind a row of samples, and behind the pixels: vectors reach beyond what counts."""
_MAX_BLOCKS = 6
_LEAST_CHROMA_WIDTH = 3  # below it libjpeg repeats samples instead of blending them
_BLOCK_ROOM = 128  # int16: a block, and the place of stores that lead nowhere

# What each block of an MCU needs, addresses and numbers, uint64 (2 _MAX_BLOCKS, 8): the samples'
# place in the MCU, bytes a row, quantization, DC table, AC table, their numbers, and the predictor;
# in the second half: rows of samples in an MCU, columns.
_PLACE, _STRIDE, _STEPS, _DC, _AC, _DC_NUMBER, _AC_NUMBER, _PREDICTOR = (8 * i for i in range(8))
_ROWS, _COLUMNS = 64 * _MAX_BLOCKS, 64 * _MAX_BLOCKS + 8


@device
def _make_tables(header, raw, made, codes, limits, dc_tables, ac_tables):
    """Huffman tables for raw, unless they are those that were `made` last; a status. made: uint8
    (4, TABLE_BYTES + 1), the last byte says whether a row counts."""
    for row in range(4):
        slot, is_dc, used = row & 1, row < 2, False
        for c in range(header[COMPONENTS]):
            used = used or slot == header[(DC_TABLE if is_dc else AC_TABLE) + c]
        if not used:
            continue
        is_same = made[row, TABLE_BYTES] == 1
        for i in range(TABLE_BYTES):
            is_same = is_same and made[row, i] == raw[row, i]
        if is_same:
            continue
        made[row, TABLE_BYTES] = 0
        if is_dc:
            status = make_dc_table(raw[row], codes[row], limits[row], dc_tables[slot])
        else:
            status = make_ac_table(raw[row], codes[row], limits[row], ac_tables[slot])
        if status != OK:
            return FALLBACK
        made[row, :TABLE_BYTES] = raw[row]
        made[row, TABLE_BYTES] = 1
    return OK


@inlined
def _address(array):
    return U(array.ctypes.data)


@device
def _emit(y, left, right, header, luma, blue, red, stride, chroma_stride, sums, rows, pixels):
    """Write pixels left..right of row y. luma, blue, red: addresses of two rows of MCUs, in turns;
    sums, rows: addresses of memory for one row; pixels: address of the row."""
    across, down = header[ACROSS], header[DOWN]
    luma += U((y % (16 * down)) * stride)
    if header[COMPONENTS] == 1:
        for x in range(left, right, PIXELS):
            grey_to_rgb(luma + U(x), pixels + U(3 * x))
        return
    own = y // down
    if across == 1:
        blue += U((own & 15) * chroma_stride)
        red += U((own & 15) * chroma_stride)
    else:
        height = (header[HEIGHT] + down - 1) // down
        width = (header[WIDTH] + 1) // 2
        far = own
        if down == 2:
            far = min(max(own + (1 if y & 1 else -1), 0), height - 1)
        first, last = left // 2, (right - 1) // 2
        for c in range(2):
            plane = red if c else blue
            out = rows + U(c * (chroma_stride * 2 + MARGIN))
            near_row = plane + U((own & 15) * chroma_stride)
            far_row = plane + U((far & 15) * chroma_stride)
            begin, end = max(first - 1, 0), min(last + 1, width - 1) + 1
            for x in range(begin, end, SUMS):
                if down == 2:
                    blend_rows(near_row + U(x), far_row + U(x), sums + U(2 * x))
                else:
                    widen_row(near_row + U(x), sums + U(2 * x))
            # the image's edges repeat
            store16(sums - U(2), load16(sums))
            store16(sums + U(2 * width), load16(sums + U(2 * width - 2)))
            for x in range(first, last + 1, SUMS):
                if down == 2:
                    spread_blended(sums + U(2 * x), out + U(2 * x))
                else:
                    spread_row(sums + U(2 * x), out + U(2 * x))
        blue, red = rows, rows + U(chroma_stride * 2 + MARGIN)
    for x in range(left, right, PIXELS):
        to_rgb(luma + U(x), blue + U(x), red + U(x), pixels + U(3 * x))


@device
def _plan_blocks(
    header, quantization, dc_tables, ac_tables, predictors, luma, blue, red, stride, chroma_stride,
    plan,
):  # fmt: skip
    """Fill the plan of an MCU's blocks; returns how many there are. luma, blue, red: addresses of
    the samples; stride, chroma_stride: bytes in a row of them."""
    count, across, down = header[COMPONENTS], header[ACROSS], header[DOWN]
    num_luma, num_blocks = across * down, across * down + count - 1
    if count == 1:
        num_luma, num_blocks = 1, 1
    for j in range(num_blocks):
        c = max(0, j - num_luma + 1)
        place, row_bytes = luma, stride
        if c == 0:
            place += U(8 * (j // across) * stride + 8 * (j % across))
        else:
            place, row_bytes = (blue if c == 1 else red), chroma_stride
        plan[j, 0], plan[j, 1] = place, U(row_bytes)
        plan[j, 2] = _address(quantization) + U(128 * header[QUANTIZATION + c])
        dc, ac = header[DC_TABLE + c], header[AC_TABLE + c]
        plan[j, 3] = _address(dc_tables) + U(4 * huffman.SIZE * dc)
        plan[j, 4] = _address(ac_tables) + U(8 * huffman.SIZE * ac)
        plan[j, 5], plan[j, 6] = U(dc), U(2 + ac)
        plan[j, 7] = _address(predictors) + U(8 * c)
        plan[_MAX_BLOCKS + j, 0] = U(8 * down if c == 0 else 8)
        plan[_MAX_BLOCKS + j, 1] = U(8 * across if c == 0 else 8)
    return num_blocks


@device
def _needed_mcus(header, num_across, num_down, top, left, bottom, right):
    """(first row, first column, last row, last column) of the MCUs that a box needs: blended chroma
    reaches one sample further than the box."""
    across, down = header[ACROSS], header[DOWN]
    first_row, last_row = top // (8 * down), (bottom - 1) // (8 * down)
    first_column, last_column = left // (8 * across), (right - 1) // (8 * across)
    if down == 2:
        first_row = max(0, top // 2 - 1) // 8
        last_row = min(num_down - 1, ((bottom - 1) // 2 + 1) // 8)
    if across == 2:
        first_column = max(0, left // 2 - 1) // 8
        last_column = min(num_across - 1, ((right - 1) // 2 + 1) // 8)
    return first_row, first_column, last_row, last_column


@inlined
def _read_block(scan, bit, step, target, look, codes, limits, raw):
    """(bit behind, DC coefficient, number of the last one; WRONG) of a block; stores its AC
    coefficients at `target`. All but `bit` are addresses; step: of the block's part of the plan."""
    bits = window(scan, bit)
    entry = load32(load64(step + U(_DC)) + ((bits >> U(64 - huffman.BITS)) << U(2)))
    length, difference = entry >> U(16), signed16(entry)
    if length:
        bit += length
        bits <<= length
    else:
        number = load64(step + U(_DC_NUMBER))
        bit, difference = long_difference(scan, bit, number, codes, limits, raw)
        if bit == U(0):
            return bit, 0, WRONG
        bits = window(scan, bit)
    predictor = load64(step + U(_PREDICTOR))
    dc = np.int64(load64(predictor)) + difference
    store64(predictor, U(dc))
    table, number = load64(step + U(_AC)), load64(step + U(_AC_NUMBER))
    bit, last = read_coefficients(scan, bit, bits, table, look, target, number, codes, limits, raw)
    return bit, dc, last


@inlined
def _write_block(dc, last, step, turn, mcu, coefficients, room):
    """Write a block's samples to their place in the row of MCUs, and clear its coefficients. dc,
    last: as of `_read_block`. Returns a status."""
    if abs(dc) > 32767:
        return FALLBACK
    quants, row_bytes = load64(step + U(_STEPS)), load64(step + U(_STRIDE))
    out = load64(step + U(_PLACE)) + turn * row_bytes * load64(step + U(_ROWS))
    out += U(mcu) * load64(step + U(_COLUMNS))
    if last == U(0):
        level = dc * signed16(load16(quants))
        if abs(level) > LARGEST_COLUMN:
            return FALLBACK
        fill_block(out, row_bytes, U(min(max(((level + 4) >> 3) + 128, 0), 255)))
        return OK
    store16(coefficients, U(dc))
    inverse_dct.inverse_dct(coefficients, quants, out, row_bytes, room)
    clear_block(coefficients)
    return OK


@kernel(
    "int64(Array(uint8, 1, 'C', readonly=True), int64[::1], uint8[::1], uint8[::1], int64[::1], "
    "int16[:, ::1], uint8[:, ::1], uint8[:, ::1], uint32[:, ::1], int64[:, :, ::1], "
    "uint32[:, ::1], uint64[:, ::1], int64[::1], uint64[:, ::1], int64[::1], int16[::1], "
    "int32[::1], uint8[::1])"
)
def decode_box(
    data, wanted, pixels, work, header, quantization, raw, made, codes, limits, dc_tables,
    ac_tables, restarts, plan, predictors, block, check, places,
):  # fmt: skip
    """Decode a box of a JPEG, uint8 (N,), to pixels, uint8 (3 H W + MARGIN,) of the whole image, of
    which only those in the box count. Returns a status.

    wanted, int64 (7,): H and W that the image must have; the box's top, left, bottom and right; 1:
    read the scan to its end, as the image's damage anywhere is to be noticed. work: memory for
    `work_bytes(N, H, W)`. All else: as `JpegDecoder` makes it.
    """
    if read_headers(data, header, quantization, raw) != OK:
        return FALLBACK
    height, width = header[HEIGHT], header[WIDTH]
    top, left, bottom, right = wanted[2], wanted[3], wanted[4], wanted[5]
    if height != wanted[0] or width != wanted[1]:
        return FALLBACK
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        return FALLBACK
    across, down = header[ACROSS], header[DOWN]
    if across == 2 and (width + 1) // 2 < _LEAST_CHROMA_WIDTH:
        return FALLBACK
    if _make_tables(header, raw, made, codes, limits, dc_tables, ac_tables) != OK:
        return FALLBACK
    num_across = (width + 8 * across - 1) // (8 * across)
    num_down = (height + 8 * down - 1) // (8 * down)
    stride, chroma_stride = 8 * across * num_across + MARGIN, 8 * num_across + MARGIN
    scan = work[: data.size + PADDING + 16]
    status, num_bytes, num_restarts = unstuff(data, header[SCAN], scan, restarts)
    interval, num_mcus = header[INTERVAL], num_across * num_down
    if status != OK or num_restarts != ((num_mcus - 1) // interval if interval else 0):
        return FALLBACK

    at = _address(scan)
    luma = at + U((data.size + PADDING + 16 + 63) & -64)
    blue = luma + U(stride * 16 * down)
    red = blue + U(chroma_stride * 16)
    sums = red + U(chroma_stride * 16 + 64)
    rows = sums + U(2 * chroma_stride)
    num_blocks = _plan_blocks(
        header, quantization, dc_tables, ac_tables, predictors, luma, blue, red, stride,
        chroma_stride, plan,
    )  # fmt: skip
    predictors[:], check[:], block[:] = 0, 0, 0

    first_row, first_column, last_row, last_column = _needed_mcus(
        header, num_across, num_down, top, left, bottom, right
    )

    to_end = wanted[6] == 1
    kept, ignored = _address(block), _address(block) + U(2 * _BLOCK_ROOM)
    steps, room, look = _address(plan), _address(check), _address(places)
    all_codes, all_limits, all_raw = _address(codes), _address(limits), _address(raw)
    bit, limit = U(0), U(8) * num_bytes
    until_restart, number, y = interval, 0, top
    for mcu_row in range(num_down if to_end else last_row + 1):
        turn, is_row = U(mcu_row & 1), first_row <= mcu_row <= last_row
        for mcu in range(num_across):
            if interval:
                if until_restart == 0:
                    if (bit + U(7)) >> U(3) != U(restarts[number]):
                        return FALLBACK
                    bit, number = U(8) * U(restarts[number]), number + 1
                    predictors[:] = 0
                    until_restart = interval
                until_restart -= 1
            is_wanted = is_row and first_column <= mcu <= last_column
            for j in range(num_blocks):
                step = steps + U(64 * j)
                target = kept if is_wanted else ignored
                bit, dc, last = _read_block(
                    at, bit, step, target, look, all_codes, all_limits, all_raw
                )
                if last == WRONG:
                    return FALLBACK
                if is_wanted and _write_block(dc, last, step, turn, mcu, target, room) != OK:
                    return FALLBACK
            if bit > limit:
                return FALLBACK
        if not is_row:
            continue
        ready = height
        if mcu_row < num_down - 1:  # the last row waits for the chroma below it
            ready = 8 * down * (mcu_row + 1) - (1 if down == 2 else 0)
        while y < min(ready, bottom):
            _emit(
                y, left, right, header, luma, blue, red, stride, chroma_stride, sums, rows,
                _address(pixels) + U(3 * width * y),
            )  # fmt: skip
            y += 1
    if to_end and (bit + U(7)) >> U(3) != num_bytes:
        return FALLBACK
    for i in range(8):
        if check[i] > LARGEST_COLUMN or check[8 + i] & OUTSIDE:
            return FALLBACK
    return OK


@functools.cache
def is_fast_here() -> bool:
    """Whether this decoder is used on this processor: where it has AVX2. Without it, this is 1.1
    times as fast as libjpeg-turbo, but that was measured on one processor alone (docs/log.md)."""
    return bool(llvm.get_host_cpu_features().get("avx2", False))


def work_bytes(num_bytes: int, height: int, width: int) -> int:
    """Bytes of memory that `decode_box` works in, for a JPEG of `num_bytes`."""
    columns = ((width + 15) & -16) + MARGIN  # more than a row of samples of any component has
    rows = 32 + 2 * 16 + 2 + 2 * 2  # luma, two of chroma, their sums (of 2 bytes), two spread rows
    return num_bytes + PADDING + 256 + columns * rows + 4 * MARGIN


class JpegDecoder:
    """Tables and memory of one thread."""

    def __init__(self) -> None:
        size = huffman.SIZE
        self._arrays: tuple[Any, ...] = (
            np.zeros(headers.HEADER_SIZE, np.int64), np.zeros((4, 64), np.int16),
            np.zeros((4, TABLE_BYTES), np.uint8), np.zeros((4, TABLE_BYTES + 1), np.uint8),
            np.zeros((4, size), np.uint32), np.zeros((4, 2, huffman.LENGTHS), np.int64),
            np.zeros((2, size), np.uint32), np.zeros((2, size), np.uint64),
            np.zeros(MAX_RESTARTS, np.int64), np.zeros((2 * _MAX_BLOCKS, 8), np.uint64),
            np.zeros(3, np.int64), np.zeros(2 * _BLOCK_ROOM, np.int16), np.zeros(16, np.int32),
            PLACES,
        )  # fmt: skip
        self._wanted = np.zeros(7, np.int64)

    def decode(
        self,
        data: np.ndarray,
        shape: tuple[int, int],
        box: tuple[int, int, int, int],
        to_end: bool,
        pixels: np.ndarray,
        work: np.ndarray,
    ) -> bool:
        """Decode the box (top, left, bottom, right) of a JPEG of `shape` (H, W) to its place in
        pixels, uint8 (>= 3 H W + MARGIN,). False: not a JPEG for this decoder, a damaged one, or no
        box inside the image.

        to_end: notice damage behind the box, too. work: uint8 (>= work_bytes(len(data), H, W),).
        """
        self._wanted[:] = (*shape, *box, to_end)
        return decode_box(data, self._wanted, pixels, work, *self._arrays) == OK
