"""The inverse DCT of 8 x 8 blocks, to the bit as libjpeg's accurate integer transform has it.

Source: Loeffler, Ligtenberg and Moschytz 1989, in the fixed-point form of libjpeg's jidctint: 13
bits of fraction, the columns first with 2 more bits kept between the passes.

A block's coefficients are int16 in rows, 8 lanes each. libjpeg-turbo's vector code keeps 16 bits
where its C code keeps 32, so they agree only while nothing overflows: `check` collects what tells.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ffcv_ssl.kernels.jpeg.lanes import I16, I32, I64, Lanes
from ffcv_ssl.kernels.jpeg.memory import ADDRESS

LARGEST_COLUMN = 2950
"""Of the sum of a column's coefficients (absolute, dequantized): up to it, all values between the
passes are below 2**14. Images of 8 bits stay below 2,897."""
OUTSIDE = -67044352
"""Bits that `check` must not have in its second half: samples are in [-512, 511]."""


def _one_pass(lanes: Lanes, rows: list[Any], bits: int) -> list[Any]:
    """The transform of 8 vectors, lane by lane, rounded to `bits` fewer; None is a vector of 0."""
    zero, rounding = lanes.same(0, rows[0]), 1 << (bits - 1)

    def add(a, b):
        return b if a is None else a if b is None else lanes.add(a, b)

    def sub(a, b):
        return a if b is None else lanes.sub(zero if a is None else a, b)

    def times(a, number):
        return None if a is None else lanes.scale(a, number)

    in0, in1, in2, in3, in4, in5, in6, in7 = rows
    both = times(add(in2, in6), 4433)
    even2, even3 = add(both, times(in6, -15137)), add(both, times(in2, 6270))
    even0 = lanes.add(lanes.up(add(in0, in4), 13), rounding)
    even1 = lanes.add(lanes.up(sub(in0, in4), 13), rounding)
    evens = add(even0, even3), add(even1, even2), sub(even1, even2), sub(even0, even3)
    z1, z2 = times(add(in7, in1), -7373), times(add(in5, in3), -20995)
    z3, z4 = add(in7, in3), add(in5, in1)
    z5 = times(add(z3, z4), 9633)
    z3, z4 = add(times(z3, -16069), z5), add(times(z4, -3196), z5)
    odds = (
        add(times(in1, 12299), add(z1, z4)), add(times(in3, 25172), add(z2, z3)),
        add(times(in5, 16819), add(z2, z4)), add(times(in7, 2446), add(z1, z3)),
    )  # fmt: skip
    sums = [add(even, odd) for even, odd in zip(evens, odds)]
    differences = [sub(even, odd) for even, odd in zip(evens, odds)]
    return [lanes.down(value, bits) for value in [*sums, *differences[::-1]]]


def _transposed(lanes: Lanes, rows: list[Any]) -> list[Any]:
    """8 vectors of 8 lanes, transposed."""
    left, right = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    columns = []
    for half in (left, right):  # rows i and i + 4 side by side: shuffles stay in half vectors
        parts = [lanes.shuffle(rows[i], rows[i + 4], half) for i in range(4)]
        for order in (low, high):
            pairs = [lanes.shuffle(parts[i], parts[i + 1], order) for i in (0, 2)]
            columns += [lanes.shuffle(pairs[0], pairs[1], halves) for halves in (first, second)]
    return columns


def _store_columns(lanes: Lanes, columns: list[Any], out: Any, stride: Any) -> None:
    """Store 4 vectors of 16 bytes, each two columns of 8, as rows of 8 bytes."""
    builder = lanes.builder
    zipped = [n for i in range(8) for n in (i, 8 + i)]
    pairs = [lanes.as_lanes(lanes.shuffle(c, c, zipped), 8, I16) for c in columns]
    orders = [0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]
    for order in orders:  # rows 0 to 3, then 4 to 7
        fours = [lanes.shuffle(pairs[i], pairs[i + 1], order) for i in (0, 2)]
        left, right = (lanes.as_lanes(four, 4, I32) for four in fours)
        for quarter in ([0, 4, 1, 5], [2, 6, 3, 7]):
            two_rows = lanes.as_lanes(lanes.shuffle(left, right, quarter), 2, I64)
            for row in (0, 1):
                word = builder.extract_element(two_rows, ir.Constant(I32, row))
                builder.store(word, builder.inttoptr(out, I64.as_pointer())).align = 1
                out = builder.add(out, stride)


def _inverse_dct(size: int) -> Any:
    @intrinsic
    def inverse_dct(context, block, quantization, out, stride, check):
        """8 rows of 8 samples to `out`, `stride` bytes apart. block: coefficients, int16 (8, 8), 0
        outside the first `size` rows and columns; quantization: int32 (8, 8). check, 64 bytes: the
        largest sums of columns, int32 (8,), and the bits of all samples plus 512, int16 (16,)."""

        def codegen(context, builder, signature, args):
            lanes, rows, total = Lanes(builder), [None] * 8, None
            block, quantization, out, stride, check = args
            for row in range(size):
                coefficients = lanes.widen(lanes.load(block, 8, I16, 16 * row), I32)
                steps = lanes.load(quantization, 8, I32, 32 * row)
                rows[row] = builder.mul(coefficients, steps)
                magnitude = lanes.size(rows[row])
                total = magnitude if total is None else lanes.add(total, magnitude)
            lanes.store(lanes.larger(total, lanes.load(check, 8, I32)), check)
            columns = _transposed(lanes, _one_pass(lanes, rows, 11))
            kept = [column if k < size else None for k, column in enumerate(columns)]
            samples = _one_pass(lanes, kept, 18)
            pairs, bits = [], lanes.load(check, 16, I16, 32)
            for k in (0, 2, 4, 6):
                pair = lanes.shuffle(samples[k], samples[k + 1], range(16))
                pair = lanes.narrow(pair, I16)
                bits = builder.or_(bits, lanes.add(pair, 512))
                pairs.append(lanes.as_bytes(lanes.add(pair, 128)))
            lanes.store(bits, check, 32)
            _store_columns(lanes, pairs, out, stride)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 5), codegen

    return inverse_dct


inverse_dct, inverse_dct_4 = _inverse_dct(8), _inverse_dct(4)


@intrinsic
def clear_block(context, block):
    """64 coefficients of 0."""

    def codegen(context, builder, signature, args):
        lanes, zeros = Lanes(builder), ir.Constant(ir.VectorType(I16, 16), [0] * 16)
        for row in range(4):
            lanes.store(zeros, args[0], 32 * row)
        return context.get_dummy_value()

    return types.void(ADDRESS), codegen


@intrinsic
def fill_block(context, out, stride, sample):
    """8 rows of 8 equal samples to `out`, `stride` bytes apart."""

    def codegen(context, builder, signature, args):
        out, stride, sample = args
        word = builder.mul(sample, ir.Constant(I64, 0x0101010101010101))
        for _ in range(8):
            builder.store(word, builder.inttoptr(out, I64.as_pointer())).align = 1
            out = builder.add(out, stride)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 3), codegen
