"""Additive Gaussian noise, a pure function of the sample's key.

Source: Box and Muller's transform of Philox words. Philox blocks come in groups of 64: block 64 g +
l makes the numbers 256 g + 64 j + l, j = 0 to 3, of a view counted over (C, H, W). So every loop
runs over neighbours and has a vector form. Logarithm, sine and cosine are polynomials for the same
reason (libm's have none): with both, 1/8 of the time of a plain loop over the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.kernels.random import philox, uniforms
from ffcv_ssl.transforms.base import (
    ImageOp,
    Setting,
    check_number,
    check_probability,
    probability,
)

GROUP = 64
_F = np.float32
_TO_UNIT, _HALF, _ONE, _TWO = _F(2.0**-24), _F(0.5), _F(1.0), _F(2.0)
_QUARTER_TURN, _LOG_2, _SQRT_2 = _F(np.pi / 2), _F(np.log(2.0)), _F(np.sqrt(2.0))


class GaussianNoise(ImageOp):
    """Add N(0, std) to every number with probability `prob` and clamp; std of values in [0, 1] as
    in torchvision v2.

    Column: noise (uint64: the key of this view's noise; 0: none).
    """

    columns = (("noise", np.uint64),)
    view_name, place = "noise", 70
    settings = (
        Setting(
            "noise_std",
            "std",
            float,
            0.0,
            "Standard deviation of additive Gaussian noise, of values in [0, 1]; 0: no noise.",
            0,
            100,
        ),
        probability("noise_prob", "prob", "Probability of that noise.", default=1.0),
    )

    def __init__(
        self, std: float, prob: float = 1, link: str | None = None, seed: int | None = None
    ) -> None:
        super().__init__(link, seed)
        self.std, self.prob = std, prob
        self.constants()

    def constants(self) -> tuple[float, ...]:
        std = check_number(self, "std", self.std, 0, 100, "0 to 100, for values in [0, 1]")
        return check_probability(self, "prob", self.prob), std

    @classmethod
    def caption(cls, row: Any) -> str:
        return "noise" if row["noise"] else ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], size_px: int) -> ImageOp | None:
        return super().from_settings(settings, size_px) if settings["noise_std"] > 0 else None

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        """raw[0]: a key of 48 bits, never 0 where noise is added: it fits a float64 exactly."""
        u_applied, u_high, u_low, _ = uniforms(key, epoch, sample, occurrence, 0)
        noise_key = np.floor(u_high * 2.0**24) * 2.0**24 + np.floor(u_low * 2.0**24)
        raw[0] = max(noise_key, 1.0) if u_applied < constants[0] else 0.0

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            _add_noise_(view, constants[1], np.uint64(raw[0]))


@intrinsic
def _bits_of(context, value):
    """The bits of a float32 as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _float_of(context, bits):
    """The float32 of these bits (int32)."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@inlined
def _log(x):
    """Natural logarithm of a normal float32 above 0, within 2e-7: 2 artanh((m - 1) / (m + 1)) + e
    log 2."""
    bits = _bits_of(x)
    exponent = _F((bits >> np.int32(23)) - np.int32(127))
    mantissa = _float_of((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000))
    large = mantissa > _SQRT_2
    mantissa = mantissa * _HALF if large else mantissa
    exponent = exponent + _ONE if large else exponent
    s = (mantissa - _ONE) / (mantissa + _ONE)
    q = s * s
    series = _ONE + q * (_F(1 / 3) + q * (_F(1 / 5) + q * (_F(1 / 7) + q * _F(1 / 9))))
    return exponent * _LOG_2 + _TWO * s * series


@inlined
def _cos_sin(turn):
    """Cosine and sine of `turn` (in [0, 1)) of a circle, within 1e-6: series around the nearest
    quarter."""
    quarter = np.int32(turn * _F(4.0) + _HALF)
    x = (turn * _F(4.0) - _F(quarter)) * _QUARTER_TURN
    q = x * x
    sin = _F(1 / 120) + q * (_F(-1 / 5040) + q * _F(1 / 362880))
    sin = x * (_ONE + q * (_F(-1 / 6) + q * sin))
    cos = _F(1 / 24) + q * (_F(-1 / 720) + q * _F(1 / 40320))
    cos = _ONE + q * (-_HALF + q * cos)
    odd = (quarter & np.int32(1)) != 0
    first, second = sin if odd else cos, cos if odd else sin
    first = -first if ((quarter + np.int32(1)) & np.int32(2)) != 0 else first
    second = -second if (quarter & np.int32(2)) != 0 else second
    return first, second


@device
def _fill_words(key, group, words):
    """words (4, GROUP), int32: the top 24 bits of each word of the group's blocks."""
    zero, eight = np.uint64(0), np.uint64(8)
    for lane in range(np.uint64(GROUP)):
        block = np.uint64(group) * np.uint64(GROUP) + lane
        w0, w1, w2, w3 = philox(key, block, zero, zero, zero)
        words[0, lane], words[1, lane] = np.int32(w0 >> eight), np.int32(w1 >> eight)
        words[2, lane], words[3, lane] = np.int32(w2 >> eight), np.int32(w3 >> eight)


@device
def _fill_normals(words_0, words_1, normals_0, normals_1):
    """Two independent standard normals of two words of 24 bits each."""
    for lane in range(GROUP):
        u = (_F(words_0[lane]) + _HALF) * _TO_UNIT
        radius = np.sqrt(max(-_TWO * _log(u), _F(0.0)))
        cos, sin = _cos_sin(_F(words_1[lane]) * _TO_UNIT)
        normals_0[lane], normals_1[lane] = radius * cos, radius * sin


@device
def _add_noise_(view, std, key):
    """v -> clamp(v + std * n) with n ~ N(0, 1) for every number of the view."""
    flat, deviation = view.reshape(-1), _F(std)
    words = np.empty((4, GROUP), np.int32)
    normals = np.empty(4 * GROUP, np.float32)
    n0, n1 = normals[:GROUP], normals[GROUP : 2 * GROUP]
    n2, n3 = normals[2 * GROUP : 3 * GROUP], normals[3 * GROUP :]
    for group in range((flat.size + 4 * GROUP - 1) // (4 * GROUP)):
        _fill_words(key, group, words)
        _fill_normals(words[0], words[1], n0, n1)
        _fill_normals(words[2], words[3], n2, n3)
        part = flat[4 * GROUP * group : min(4 * GROUP * (group + 1), flat.size)]
        for i in range(part.size):
            part[i] = min(max(part[i] + deviation * normals[i], _F(0.0)), _ONE)
