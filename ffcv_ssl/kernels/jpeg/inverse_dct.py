"""The inverse DCT of 8 x 8 blocks, to the bit as libjpeg's accurate integer transform has it.

Source: Loeffler, Ligtenberg and Moschytz 1989, in the fixed-point form of libjpeg's jidctint: 13
bits of fraction, the columns first with 2 more bits kept between the passes.

The transform is sums of two products of 16 bits, for which x86 has an instruction (pmaddwd): so a
block is kept in four vectors, each of two rows whose coefficients alternate: rows 0 and 4, 2 and 6,
7 and 1, 3 and 5. Columns are in the same order, so the second pass finds its pairs side by side.

libjpeg-turbo's vector code keeps 16 bits where its C code keeps 32, so they agree only while
nothing overflows: `check` collects what tells.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from ffcv_ssl.kernels.jpeg.lanes import I8, I16, I32, I64, Lanes
from ffcv_ssl.kernels.jpeg.memory import ADDRESS

LARGEST_COLUMN = 2950
"""Of the sum of a column's coefficients (absolute, dequantized): up to it, all values between the
passes are below 2**14. Images of 8 bits stay below 2,897."""
OUTSIDE = -67044352
"""Bits that `check` must not have in its second half: samples are in [-512, 511]."""
_ORDER = (0, 4, 2, 6, 7, 1, 3, 5)


def _place(row: int, column: int) -> int:
    pair, member = divmod(_ORDER.index(row), 2)
    return 16 * pair + 2 * _ORDER.index(column) + member


PLACE_OF = np.array([_place(k // 8, k % 8) for k in range(64)])
"""Where the coefficient of row k // 8 and column k % 8 is kept in a block."""


def _has_avx2() -> bool:
    """Whether the code that numba makes may use AVX2 (its settings may ask for another CPU)."""
    name, features = (getattr(config, setting) for setting in ("CPU_NAME", "CPU_FEATURES"))
    if name or features:
        return "+avx2" in (features or "")
    return bool(llvm.get_host_cpu_features().get("avx2", False))


class _Pairs(Lanes):
    """Vectors of 16 numbers of 16 bits, as 8 pairs."""

    has_avx2 = _has_avx2()

    def products(self, pairs: Any, first: int, second: int) -> Any:
        """(8,) int32: first times one number of each pair plus second times the other."""
        factors = ir.Constant(pairs.type, [first, second] * 8)
        return self.products_with(pairs, factors)

    def products_with(self, pairs: Any, factors: Any) -> Any:
        """(8,) int32: the sum of two products for each pair."""
        if self.has_avx2:
            return self._call("llvm.x86.avx2.pmadd.wd", I32, 8, pairs, factors)
        wide = self.builder.mul(self.widen(pairs, I32), self.widen(factors, I32))
        evens, odds = (self.shuffle(wide, wide, range(k, 16, 2)) for k in (0, 1))
        return self.add(evens, odds)

    def packed(self, a: Any, b: Any) -> Any:
        """(8,) and (8,) int32 that 16 bits hold as (16,): four of a, four of b, then the rest."""
        if self.has_avx2:
            return self._call("llvm.x86.avx2.packssdw", I16, 16, a, b)
        order = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
        return self.narrow(self.shuffle(a, b, order), I16)

    def packed_bytes(self, a: Any, b: Any) -> Any:
        """(16,) and (16,) int16 as (32,) bytes, cut to [-128, 127], with 128 added: eight of a,
        eight of b, then the rest."""
        if self.has_avx2:
            found = self._call("llvm.x86.avx2.packsswb", I8, 32, a, b)
            return self.builder.xor(found, self.same(-128, found))
        order = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
        return self.as_bytes(self.add(self.shuffle(a, b, order), 128))

    def _call(self, name, element, count, *args):
        kind = ir.FunctionType(ir.VectorType(element, count), [a.type for a in args])
        code = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(code, args)


def _one_pass(lanes: _Pairs, pairs: list[Any], bits: int) -> list[Any]:
    """The transform of 8 rows, in the four vectors of pairs above; 8 vectors (8,) int32, rounded to
    `bits` fewer."""
    rows04, rows26, rows71, rows35 = pairs
    rounding = 1 << (bits - 1)
    even0 = lanes.add(lanes.products(rows04, 8192, 8192), rounding)
    even1 = lanes.add(lanes.products(rows04, 8192, -8192), rounding)
    even2, even3 = lanes.products(rows26, 4433, -10704), lanes.products(rows26, 10703, 4433)
    evens = (
        lanes.add(even0, even3), lanes.add(even1, even2), lanes.sub(even1, even2),
        lanes.sub(even0, even3),
    )  # fmt: skip
    sums = lanes.add(rows71, rows35)  # rows 7 + 3 and 1 + 5
    z3, z4 = lanes.products(sums, -6436, 9633), lanes.products(sums, 9633, 6437)
    odds = (
        lanes.add(lanes.products(rows71, -7373, 4926), z4),
        lanes.add(lanes.products(rows35, 4177, -20995), z3),
        lanes.add(lanes.products(rows35, -20995, -4176), z4),
        lanes.add(lanes.products(rows71, -4927, -7373), z3),
    )  # fmt: skip
    first = [lanes.add(even, odd) for even, odd in zip(evens, odds)]
    last = [lanes.sub(even, odd) for even, odd in zip(evens, odds)]
    return [lanes.down(value, bits) for value in [*first, *last[::-1]]]


def _transposed(lanes: _Pairs, rows: list[Any]) -> list[Any]:
    """8 rows of 8 columns in the order above, int32 -> the columns' pairs, four vectors of 16."""
    packed = [lanes.as_lanes(lanes.packed(rows[k], rows[k + 1]), 8, I32) for k in (0, 2, 4, 6)]
    halves = []
    for k in (0, 2):  # rows 0 to 3, then 4 to 7
        for at in (0, 1):  # pairs 0 and 2, then 1 and 3
            order = [at, at + 2, at + 8, at + 10, at + 4, at + 6, at + 12, at + 14]
            halves.append(lanes.shuffle(packed[k], packed[k + 1], order))
    lows, highs = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    whole = [
        lanes.shuffle(halves[at], halves[at + 2], order) for order in (lows, highs) for at in (0, 1)
    ]
    return [lanes.as_lanes(pairs, 16, I16) for pairs in whole]


def _store_rows(lanes: _Pairs, pairs: list[Any], out: Any, stride: Any) -> None:
    """Store columns 0 and 1, 2 and 3..., as `packed` gives them, as 8 rows of 8 bytes."""
    builder = lanes.builder
    quarters = [4 * k + n for n in range(4) for k in range(4)]
    order = [16 * half + n for half in (0, 1) for n in quarters]
    left, right = (
        lanes.as_lanes(lanes.shuffle(four, four, order), 8, I32)
        for four in (lanes.packed_bytes(*pairs[:2]), lanes.packed_bytes(*pairs[2:]))
    )
    rows: dict[int, Any] = {}
    for first, order in ((0, [0, 8, 1, 9, 4, 12, 5, 13]), (2, [2, 10, 3, 11, 6, 14, 7, 15])):
        words = lanes.as_lanes(lanes.shuffle(left, right, order), 4, I64)
        for k, row in enumerate((first, first + 1, first + 4, first + 5)):
            rows[row] = builder.extract_element(words, ir.Constant(I32, k))
    for row in range(8):
        builder.store(rows[row], builder.inttoptr(out, I64.as_pointer())).align = 1
        out = builder.add(out, stride)


@intrinsic
def inverse_dct(context, block, quantization, out, stride, check):
    """8 rows of 8 samples to `out`, `stride` bytes apart. block, quantization: int16 (64,), at
    PLACE_OF. check, 64 bytes: the largest sums of columns, int32 (8,), and the bits of all samples
    plus 512, int16 (16,)."""

    def codegen(context, builder, signature, args):
        lanes, pairs, total = _Pairs(builder), [], None
        block, quantization, out, stride, check = args
        for k in range(4):
            coefficients = lanes.load(block, 16, I16, 32 * k)
            steps = lanes.load(quantization, 16, I16, 32 * k)
            pairs.append(builder.mul(coefficients, steps))
            magnitudes = lanes.products_with(lanes.size(coefficients), steps)
            total = magnitudes if total is None else lanes.add(total, magnitudes)
        lanes.store(lanes.larger(total, lanes.load(check, 8, I32)), check)
        samples = _one_pass(lanes, _transposed(lanes, _one_pass(lanes, pairs, 11)), 18)
        packed = [lanes.packed(samples[k], samples[k + 1]) for k in (0, 2, 4, 6)]
        bits = lanes.load(check, 16, I16, 32)
        for pair in packed:
            bits = builder.or_(bits, lanes.add(pair, 512))
        lanes.store(bits, check, 32)
        _store_rows(lanes, packed, out, stride)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), codegen


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
