"""Explicit LLVM vectors, for the few loops that LLVM does not vectorise on its own.

Each intrinsic is the body of a loop in `resample`, `blur` or `hash`. It processes a fixed number of
neighbouring numbers of flat arrays at given positions; nothing is checked. LLVM lowers the vectors
to the CPU's own, so no CPU feature is required. A product and a sum may fuse, in the order written,
so a number's value does not depend on its lane.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROW_LANES = 16  # numbers per call of `blend_bytes`
LANES = 32  # numbers per call of `symmetric_taps`
BLOCK = 8  # pixels per call of `interleave`
TILE = 8  # rows and columns of a tile for `transpose`

_INT32, _INT64, _BYTE, _FLOAT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.FloatType()
_FUSE = ("contract",)


class _Body:
    """Shared by the bodies below: typed loads and stores at positions of the argument arrays."""

    def __init__(self, context, builder, signature, args):
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args

    def at(self, array, position=None, offset=0):
        """Pointer into argument number `array`, at the index that argument number `position`
        holds."""
        make = self.context.make_array(self.types[array])
        data = make(self.context, self.builder, value=self.args[array]).data
        return self.step(data if position is None else self.step(data, self.args[position]), offset)

    @staticmethod
    def number(value):
        return ir.Constant(_INT64, value) if isinstance(value, int) else value

    def step(self, pointer, offset):
        return self.builder.gep(pointer, [self.number(offset)])

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

    def fuse(self, a, b, total):
        """a * b + total, with one rounding where the CPU supports it, else with two.

        If `total` is a product too, `multiply_add` lets LLVM choose which product to fuse; `fuse`
        leaves no choice: only a * b can fuse.
        """
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fmuladd.v{a.type.count}f32"
        code = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(code, [a, b, total])


def _made_by(build, *arguments):
    """The return value of an intrinsic: its signature, without a result, and the code that `build`
    emits."""

    def codegen(context, builder, signature, args):
        build(_Body(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(*arguments), codegen


def _blend_columns(taps):
    """The body `blend` for a fixed number of taps. None: its last argument is the number."""

    def tap(body, source, weights, k):
        """(weight, [the three channels' values]) of tap k, a number or an IR value."""
        weight = body.spread(body.load(body.step(weights, k)), TILE)
        source = body.step(source, body.builder.mul(body.number(k), body.number(3 * TILE)))
        return weight, [body.load(body.step(source, TILE * c), TILE) for c in range(3)]

    def build(body):
        source, weights, fmul = body.at(0, 1), body.at(2, 3), body.builder.fmul
        weight, values = tap(body, source, weights, 0)
        if taps == 1:
            totals = [fmul(weight, value) for value in values]
        else:
            second, others = tap(body, source, weights, 1)
            products = [fmul(second, other) for other in others]
            totals = [body.fuse(weight, *pair) for pair in zip(values, products)]
        for k in range(2, taps or 4):
            weight, values = tap(body, source, weights, k)
            totals = [body.fuse(weight, *pair) for pair in zip(values, totals)]
        if taps is None:
            totals = add_more(body, source, weights, totals)
        for channel, total in enumerate(totals):
            body.store(total, body.at(4, 5, TILE * TILE * channel))

    def add_more(body, source, weights, totals):
        builder = body.builder
        kept = [cgutils.alloca_once_value(builder, total) for total in totals]
        with cgutils.for_range(builder, body.args[6], start=body.number(4)) as loop:
            weight, values = tap(body, source, weights, loop.index)
            for value, total in zip(values, kept):
                builder.store(body.fuse(weight, value, builder.load(total)), total)
        return [builder.load(total) for total in kept]

    @intrinsic
    def blend(context, columns, at, weights, weight_at, tile, tile_at, count):
        """TILE rows of one pixel: for each channel c, tile[TILE**2 c ...] = sum over k < taps of
        weights[k] * columns[TILE (3 k + c) ...]."""
        n = types.intp
        return _made_by(build, columns, n, weights, n, tile, n, n)

    return blend


blend_1, blend_2, blend_3, blend_4, blend_5 = (_blend_columns(taps) for taps in range(1, 6))
blend_many = _blend_columns(None)  # at least four taps


@intrinsic
def transpose(context, source, at, step, out, out_at, out_step):
    """Transpose TILE rows of TILE numbers; source rows are `step` apart, output rows `out_step`."""

    def build(body):
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        begin, target, columns = body.at(0, 1), body.at(3, 4), []
        for half in (0, 4):
            rows = []
            for i in range(4):  # rows i and i + 4 side by side: later shuffles stay in half vectors
                parts = []
                for row in (i, i + 4):
                    offset = body.builder.mul(body.args[2], body.number(row))
                    parts.append(body.load(body.step(body.step(begin, offset), half), 4))
                rows.append(body.shuffle(*parts, range(TILE)))
            for order in (low, high):
                pairs = [body.shuffle(rows[i], rows[i + 1], order) for i in (0, 2)]
                columns += [body.shuffle(*pairs, halves) for halves in (first, second)]
        for i, column in enumerate(columns):
            offset = body.builder.mul(body.args[5], body.number(i))
            body.store(column, body.step(target, offset))

    n = types.intp
    return _made_by(build, source, n, n, out, n, n)


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
def interleave(context, red, green, blue, x, out, at):
    """Write BLOCK pixels in [0, 1] of three planes to bytes of `out`, rounded half up."""

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
    """LANES outputs of a symmetric filter along `step`. The sums stay in registers for all taps:

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


@intrinsic
def accumulate(context, data, at, stripes, secret, sums):
    """XXH3's inner loop: eight lanes of `sums` consume `stripes` times 64 bytes of `data` from
    `at`. The secret advances one word per stripe.

    Each lane xors its word with the secret, then adds the product of the two halves, and its
    neighbour's word. The lanes stay in registers: 4 to 5x faster than with sums in memory.
    """

    def build(body):
        builder, source, secret = body.builder, body.at(0, 1), body.at(3)
        words = ir.VectorType(_INT64, 8)
        total = cgutils.alloca_once_value(builder, body.load(body.at(4), 8))
        low = ir.Constant(words, [0xFFFFFFFF] * 8)
        shift = ir.Constant(words, [32] * 8)
        with cgutils.for_range(builder, body.args[2]) as loop:
            place = body.step(source, builder.mul(loop.index, body.number(64)))
            word = builder.load(builder.bitcast(place, words.as_pointer()))
            word.align = 1
            key = builder.xor(word, body.load(body.step(secret, loop.index), 8))
            product = builder.mul(builder.and_(key, low), builder.lshr(key, shift))
            neighbour = body.shuffle(word, word, [1, 0, 3, 2, 5, 4, 7, 6])
            added = builder.add(product, neighbour)
            builder.store(builder.add(builder.load(total), added), total)
        body.store(builder.load(total), body.at(4))

    n = types.intp
    return _made_by(build, data, n, n, secret, sums)
