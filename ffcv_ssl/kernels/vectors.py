"""Explicit LLVM vectors, for the few loops that LLVM does not vectorise on its own.

Each intrinsic is the body of a loop in `resample` or `blur`: it reads and writes a fixed number of
neighbouring numbers of flat arrays at given positions, unchecked. LLVM lowers the vectors to what
the CPU has, so nothing here asks for a CPU feature. A product and a sum may fuse, in the order
written, so a number's value does not depend on its lane.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROW_LANES = 16  # numbers that `blend_bytes` makes at once
LANES = 32  # numbers that `symmetric_taps` makes at once
BLOCK = 8  # pixels that `planes` and `interleave` take at once

_INT32, _INT64, _BYTE, _FLOAT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.FloatType()
_FUSE = ("contract",)


class _Body:
    """What the bodies below share: typed loads and stores at positions of the arguments' arrays."""

    def __init__(self, context, builder, signature, args):
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args

    def at(self, array, position=None, offset=0):
        """Pointer into argument number `array`, at the index that argument number `position`
        holds."""
        make = self.context.make_array(self.types[array])
        data = make(self.context, self.builder, value=self.args[array]).data
        return self.step(data if position is None else self.step(data, self.args[position]), offset)

    def step(self, pointer, offset):
        offset = ir.Constant(_INT64, offset) if isinstance(offset, int) else offset
        return self.builder.gep(pointer, [offset])

    def load(self, pointer, lanes=None):
        if lanes is None:
            return self.builder.load(pointer)
        element = pointer.type.pointee
        pointer = self.builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())
        value = self.builder.load(pointer)
        value.align = 1 if element == _BYTE else 4
        return value

    def store(self, values, pointer):
        pointer = self.builder.bitcast(pointer, values.type.as_pointer())
        self.builder.store(values, pointer).align = 1 if values.type.element == _BYTE else 4

    def spread(self, scalar, lanes):
        undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
        return self.shuffle(single, undefined, [0] * lanes)

    def shuffle(self, a, b, lanes):
        mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, mask)

    def multiply_add(self, a, b, total):
        product = self.builder.fmul(a, b, flags=_FUSE)
        return product if total is None else self.builder.fadd(product, total, flags=_FUSE)


def _made_by(build, *arguments):
    """What an intrinsic returns: its signature, without a result, and the code that `build`
    emits."""

    def codegen(context, builder, signature, args):
        build(_Body(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(*arguments), codegen


def _blend_pixels(taps, add):
    """The body `blend` for a fixed number of taps, which adds to `out` where `add` is set."""

    def build(body):
        source, row_step = body.at(0, 1), body.args[2]
        target, out_step = body.at(5, 6), body.args[7]
        scalars = [body.load(body.at(3, 4, k)) for k in range(taps)]
        weights = [body.spread(scalar, 4) for scalar in scalars]
        totals = []
        for _ in range(2):
            total = body.load(target, 4) if add else None
            for k, weight in enumerate(weights):
                total = body.multiply_add(weight, body.load(body.step(source, 3 * k), 4), total)
            totals.append((total, target))
            source, target = body.step(source, row_step), body.step(target, out_step)
        for total, target in totals:
            body.store(total, target)

    @intrinsic
    def blend(context, rows, at, row_step, weights, weight_at, out, out_at, out_step):
        """out = (out +) sum over k < taps of weights[k] * rows[3 k ...], one pixel of two rows.

        A step leads to the second row. Four numbers are made: the pixel's three and one without
        meaning, so `rows` is read one number too far.
        """
        n = types.intp
        return _made_by(build, rows, n, n, weights, n, out, n, n)

    return blend


blend_1, blend_2, blend_3 = (_blend_pixels(taps, add=False) for taps in (1, 2, 3))
blend_4, blend_5 = (_blend_pixels(taps, add=False) for taps in (4, 5))
add_blend_4 = _blend_pixels(4, add=True)


@intrinsic
def blend_bytes(context, pixels, at, stride, weights, weight_at, taps, row, row_at):
    """ROW_LANES numbers: row = sum over k < taps of weights[k] * pixels[at + k stride ...]."""

    def build(body):
        builder, source, weights = body.builder, body.at(0, 1), body.at(3, 4)
        start = ir.Constant(ir.VectorType(_FLOAT, ROW_LANES), [0.0] * ROW_LANES)
        total = cgutils.alloca_once_value(builder, start)
        with cgutils.for_range(builder, body.args[5]) as loop:
            offset = builder.mul(loop.index, body.args[2])
            values = body.load(body.step(source, offset), ROW_LANES)
            values = builder.uitofp(values, ir.VectorType(_FLOAT, ROW_LANES))
            weight = body.spread(body.load(body.step(weights, loop.index)), ROW_LANES)
            builder.store(body.multiply_add(weight, values, builder.load(total)), total)
        body.store(builder.load(total), body.at(6, 7))

    n = types.intp
    return _made_by(build, pixels, n, n, weights, n, n, row, n)


@intrinsic
def split_planes(context, pixels, at, red, green, blue, x):
    """BLOCK pixels of four numbers each (the fourth is dropped) to three planes."""

    def build(body):
        parts = [body.load(body.at(0, 1, BLOCK * i), BLOCK) for i in range(4)]
        halves = [body.shuffle(*parts[i : i + 2], range(2 * BLOCK)) for i in (0, 2)]
        whole = body.shuffle(*halves, range(4 * BLOCK))
        for channel in range(3):
            plane = body.shuffle(whole, whole, range(channel, 4 * BLOCK, 4))
            body.store(plane, body.at(2 + channel, 5))

    return _made_by(build, pixels, types.intp, red, green, blue, types.intp)


@intrinsic
def interleave(context, red, green, blue, x, out, at):
    """BLOCK pixels in [0, 1] of three planes to bytes of `out`, rounded half up."""

    def build(body):
        scale, half = (ir.Constant(_FLOAT, value) for value in (255.0, 0.5))
        scale, half = body.spread(scale, BLOCK), body.spread(half, BLOCK)
        channels = []
        for channel in range(3):
            scaled = body.multiply_add(body.load(body.at(channel, 3), BLOCK), scale, half)
            numbers = body.builder.fptosi(scaled, ir.VectorType(_INT32, BLOCK))
            channels.append(body.builder.trunc(numbers, ir.VectorType(_BYTE, BLOCK)))
        red_green = body.shuffle(channels[0], channels[1], range(2 * BLOCK))
        blue = body.shuffle(channels[2], channels[2], range(2 * BLOCK))
        order = [channel * BLOCK + x for x in range(BLOCK) for channel in range(3)]
        body.store(body.shuffle(red_green, blue, order), body.at(4, 5))

    return _made_by(build, red, green, blue, types.intp, out, types.intp)


@intrinsic
def symmetric_taps(context, source, at, step, weights, radius, out, out_at):
    """LANES numbers of a symmetric filter along `step`, kept in registers over all its taps:

    out[i] = weights[0] s[i] + sum over d = 1 .. radius of weights[d] (s[i - d step] + s[i + d
    step]).
    """

    def build(body):
        builder, centre, weights = body.builder, body.at(0, 1), body.at(3)
        step, radius = body.args[2], body.args[4]
        first = body.spread(body.load(weights), LANES)
        total = cgutils.alloca_once_value(
            builder, body.multiply_add(first, body.load(centre, LANES), None)
        )
        one = ir.Constant(_INT64, 1)
        with cgutils.for_range(builder, builder.add(radius, one), start=one) as loop:
            offset = builder.mul(loop.index, step)
            before = body.load(body.step(centre, builder.neg(offset)), LANES)
            behind = body.load(body.step(centre, offset), LANES)
            weight = body.spread(body.load(body.step(weights, loop.index)), LANES)
            pair = builder.fadd(before, behind)
            builder.store(body.multiply_add(weight, pair, builder.load(total)), total)
        body.store(builder.load(total), body.at(5, 6))

    return _made_by(build, source, types.intp, types.intp, weights, types.intp, out, types.intp)
