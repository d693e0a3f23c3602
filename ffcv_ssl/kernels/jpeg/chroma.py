"""Smooth upsampling of chroma and conversion to RGB, to the bit as libjpeg has them.

Upsampling is libjpeg's triangle filter: 3/4 of the nearer sample and 1/4 of the further one, in
each direction that is subsampled; rounding alternates between down and up. Colour is JFIF's YCbCr
in 16 bits of fraction.
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from ffcv_ssl.kernels.jpeg.lanes import I8, I16, I32, Lanes
from ffcv_ssl.kernels.jpeg.memory import ADDRESS

SUMS = 16
"""Chroma samples at once."""
PIXELS = 32
"""Pixels at once."""


@intrinsic
def blend_rows(context, near, far, out):
    """SUMS numbers int16: 3 near + far."""

    def codegen(context, builder, signature, args):
        lanes = Lanes(builder)
        near, far = (lanes.widen_unsigned(lanes.load(a, SUMS, I8), I16) for a in args[:2])
        lanes.store(lanes.add(lanes.scale(near, 3), far), args[2])
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 3), codegen


@intrinsic
def widen_row(context, row, out):
    """SUMS samples as int16."""

    def codegen(context, builder, signature, args):
        lanes = Lanes(builder)
        lanes.store(lanes.widen_unsigned(lanes.load(args[0], SUMS, I8), I16), args[1])
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 2), codegen


def _spread(bits: int, even_rounding: int, odd_rounding: int) -> Any:
    @intrinsic
    def spread(context, sums, out):
        """2 SUMS samples of SUMS numbers int16; the number before them and behind them count."""

        def codegen(context, builder, signature, args):
            lanes = Lanes(builder)
            own = lanes.scale(lanes.load(args[0], SUMS, I16), 3)
            parts = []
            for offset, rounding in ((-2, even_rounding), (2, odd_rounding)):
                total = lanes.add(own, lanes.load(args[0], SUMS, I16, offset))
                parts.append(lanes.down_unsigned(lanes.add(total, rounding), bits))
            both = builder.or_(parts[0], lanes.up(parts[1], 8))  # the even sample comes first
            lanes.store(lanes.as_lanes(both, 2 * SUMS, I8), args[1])
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 2), codegen

    return spread


spread_blended, spread_row = _spread(4, 8, 7), _spread(2, 1, 2)


@intrinsic
def to_rgb(context, luma, blue, red, out):
    """PIXELS pixels of three rows of samples, as 3 PIXELS bytes.

    R = Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb with Cb, Cr in [-128, 127],
    each sum of products rounded once. Factors are split so that 16 bits hold them.
    """

    def codegen(context, builder, signature, args):
        lanes, parts = Lanes(builder), []

        def fraction(a, factor):
            """a * factor / 2**16, rounded: the high half of 2 a factor, halved with rounding."""
            product = lanes.scale(lanes.widen(lanes.add(a, a), I32), factor)
            high = lanes.narrow(lanes.down(product, 16), I16)
            return lanes.down(lanes.add(high, 1), 1)

        for half in (0, PIXELS // 2):
            loaded = (lanes.load(a, PIXELS // 2, I8, half) for a in args[:3])
            y, cb, cr = (lanes.widen_unsigned(a, I16) for a in loaded)
            cb, cr = lanes.sub(cb, 128), lanes.sub(cr, 128)
            red = lanes.add(lanes.add(y, cr), fraction(cr, 26345))
            blue = lanes.add(lanes.add(y, lanes.add(cb, cb)), fraction(cb, -14942))
            products = lanes.add(
                lanes.scale(lanes.widen(cb, I32), -22554), lanes.scale(lanes.widen(cr, I32), 18734)
            )
            green = lanes.narrow(lanes.down(lanes.add(products, 32768), 16), I16)
            green = lanes.sub(lanes.add(y, green), cr)
            parts.append([lanes.as_bytes(a) for a in (red, green, blue)])
        red, green, blue = (lanes.shuffle(*pair, range(PIXELS)) for pair in zip(*parts))
        red_green = lanes.shuffle(red, green, range(2 * PIXELS))
        blue = lanes.shuffle(blue, blue, range(2 * PIXELS))
        order = [channel * PIXELS + k for k in range(PIXELS) for channel in range(3)]
        lanes.store(lanes.shuffle(red_green, blue, order), args[3])
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), codegen


@intrinsic
def grey_to_rgb(context, luma, out):
    """PIXELS samples as grey pixels, 3 PIXELS bytes."""

    def codegen(context, builder, signature, args):
        lanes = Lanes(builder)
        grey = lanes.load(args[0], PIXELS, I8)
        lanes.store(lanes.shuffle(grey, grey, [k for k in range(PIXELS) for _ in "RGB"]), args[1])
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 2), codegen
