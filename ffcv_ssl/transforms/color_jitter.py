"""Color jitter with torchvision's meaning: random order, a clamp after each step, hue in HSV.

Equations: torchvision's functional ops on float images (brightness, contrast and saturation blend
and clamp; hue turns in HSV). All steps of the jitter are done to a chunk of pixels while it is in
the first cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np

from ffcv_ssl.kernels.color import clamp, luma
from ffcv_ssl.kernels.compile import SAFE_MATH, device, inlined
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import (
    ImageOp,
    Setting,
    check_number,
    check_probability,
    probability,
)

JITTER_DTYPE = np.dtype(
    [
        ("applied", np.bool_),
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),
        ("order", np.uint8, (4,)),
    ]
)
STEPS = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_TWO, _THREE, _FOUR, _SIX = np.float32(2.0), np.float32(3.0), np.float32(4.0), np.float32(6.0)
_TINY = np.float32(1e-30)
_CHUNK = 1024  # pixels


class RandomColorJitter(ImageOp):
    """Brightness, contrast, saturation and hue, in random order, with probability `jitter_prob`.

    brightness, contrast, saturation: a factor uniform in [max(0, 1 - x), 1 + x]. hue: turns of the
    color circle, uniform in [-hue, hue], hue <= 0.5. Column: jitter (applied, brightness,
    contrast, saturation, hue, order); `order` lists the steps as they are applied, 0 brightness, 1
    contrast, 2 saturation, 3 hue. Factors are those drawn, also where
    `applied` is False. Source: torchvision ColorJitter inside RandomApply.
    """

    columns = (("jitter", JITTER_DTYPE),)
    num_raw_columns = 6
    view_name, place = "jitter", 20
    settings = (
        probability(
            "jitter_prob",
            "jitter_prob",
            "Probability of the four color changes below, in random order (torchvision's "
            "ColorJitter).",
        ),
        *(
            Setting(
                name,
                name,
                float,
                default,
                f"{name.capitalize()} factor within 1 +- this, not below 0.",
                0,
                np.inf,
            )
            for name, default in zip(STEPS, (0.4, 0.4, 0.2))
        ),
        Setting(
            "hue",
            "hue",
            float,
            0.1,
            "Hue shift within +- this share of the color circle, at most 0.5.",
            0,
            0.5,
        ),
    )

    def __init__(
        self,
        jitter_prob: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        link: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(link, seed)
        self.jitter_prob = jitter_prob
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.constants()

    def constants(self) -> tuple[float, ...]:
        prob = check_probability(self, "jitter_prob", self.jitter_prob)
        strengths = [check_number(self, name, getattr(self, name), 0, 1e3) for name in STEPS[:3]]
        return prob, *strengths, check_number(self, "hue", self.hue, 0, 0.5)

    def describe(self, raw: np.ndarray, out: dict[str, np.ndarray]) -> None:
        column = out["jitter"]
        column["applied"] = raw[:, 0] != 0
        for i, name in enumerate(STEPS):
            column[name] = raw[:, i + 1]
        packed = raw[:, 5].astype(np.int64)
        for position in range(4):
            column["order"][:, position] = (packed >> (2 * position)) & 3

    @classmethod
    def caption(cls, row: Any) -> str:
        """A line of its own: the factors in the order in which they act."""
        jitter = row["jitter"]
        if not jitter["applied"]:
            return ""
        shown = [
            f"h{jitter['hue']:+.2f}"
            if step == HUE
            else f"{STEPS[step][0]}{jitter[STEPS[step]]:.2f}"
            for step in jitter["order"]
        ]
        return "\n" + " ".join(shown) + "\n"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], size_px: int) -> ImageOp | None:
        return super().from_settings(settings, size_px) if any(map(settings.get, STEPS)) else None

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        """raw: applied, the factors of brightness, contrast and saturation, hue, order."""
        u_applied, u_order, u_brightness, u_contrast = uniforms(key, epoch, sample, occurrence, 0)
        u_saturation, u_hue, _, _ = uniforms(key, epoch, sample, occurrence, 1)
        raw[0] = 1.0 if u_applied < constants[0] else 0.0
        raw[1] = _factor(u_brightness, constants[1])
        raw[2] = _factor(u_contrast, constants[2])
        raw[3] = _factor(u_saturation, constants[3])
        raw[4] = (2.0 * u_hue - 1.0) * constants[4]
        raw[5] = _pack_order(u_order)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            _jitter_(view, raw[1], raw[2], raw[3], raw[4], int(raw[5]))


@device
def _factor(u, strength):
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


@device
def _pack_order(u):
    """The permutation number floor(24 u) of (0, 1, 2, 3), two bits a step, the first lowest."""
    number = int(u * 24.0)
    left = 0b11100100  # the steps not yet taken, two bits each
    packed = 0
    for position in range(4):
        remaining = 4 - position
        pick = number % remaining
        number //= remaining
        packed |= ((left >> (2 * pick)) & 3) << (2 * position)
        below = left & ((1 << (2 * pick)) - 1)
        left = below | ((left >> (2 * pick + 2)) << (2 * pick))
    return packed


# The only sum in these kernels: its order may change (vector lanes), per chunk and in float32, the
# same on every run.
@numba.njit(nogil=True, fastmath=SAFE_MATH | {"reassoc"}, error_model="numpy")
def _luma_sum(red, green, blue):
    total = _ZERO
    for x in range(red.size):
        total += luma(red[x], green[x], blue[x])
    return total


@device
def _blend(red, green, blue, factor, other):
    """v -> clamp(factor * v + other), `other` the same for all pixels: brightness (0) and contrast.

    All loads stand before all stores: the planes of a view of 224 or 32 pixels lie a multiple of
    4 KB apart, where a load seems to depend on the store before it (1.3x slower).
    """
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        red[x] = clamp(factor * r + other)
        green[x] = clamp(factor * g + other)
        blue[x] = clamp(factor * b + other)


@device
def _saturate(red, green, blue, factor):
    rest = _ONE - factor
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        grey = rest * luma(r, g, b)
        red[x] = clamp(factor * r + grey)
        green[x] = clamp(factor * g + grey)
        blue[x] = clamp(factor * b + grey)


@device
def _turn_hue(red, green, blue, turns):
    """Add `turns` (of the colour circle, -0.5 to 0.5) to the hue; value and saturation stay.

    With the new hue h in [0, 6), value v and chroma c: R = v - c * clamp(2 - |h - 3|), G = v - c *
    clamp(|h - 2| - 1), B = v - c * clamp(|h - 4| - 1), which is the usual table of six cases
    without branches. No result needs a clamp: it is a rounding of a number between v - c and v.
    """
    # The old hue is in [-1, 5]; a shift in [1, 7) makes the sum at least 0, so one turn back is
    # enough.
    shift = _SIX * turns
    shift = shift + _SIX if shift < _ONE else shift
    for x in range(red.size):
        r, g, b = red[x], green[x], blue[x]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        scale = _ONE / max(chroma, _TINY)
        hue = _FOUR + (r - g) * scale
        hue = _TWO + (b - r) * scale if value == g else hue
        hue = (g - b) * scale if value == r else hue
        hue = hue + shift
        hue = hue - _SIX if hue >= _SIX else hue
        red[x] = value - chroma * clamp(_TWO - abs(hue - _THREE))
        green[x] = value - chroma * clamp(abs(hue - _TWO) - _ONE)
        blue[x] = value - chroma * clamp(abs(hue - _FOUR) - _ONE)


@inlined
def _step(step, red, green, blue, brightness, saturation, hue):
    if step == BRIGHTNESS:
        if brightness != _ONE:
            _blend(red, green, blue, brightness, _ZERO)
    elif step == SATURATION:
        if saturation != _ONE:
            _saturate(red, green, blue, saturation)
    elif step == HUE:
        if hue != _ZERO:
            _turn_hue(red, green, blue, hue)


@device
def _jitter_(view, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter with given factors; `order` packs the four steps, two bits each,
    the first lowest.

    Contrast needs the mean luma of the whole image as the steps before it left it, so the view is
    walked twice: up to contrast while summing, then the rest.
    """
    b, c = np.float32(brightness), np.float32(contrast)
    s, h = np.float32(saturation), np.float32(hue)
    position = 0
    while (order >> (2 * position)) & 3 != CONTRAST:
        position += 1
    size, total = view.shape[1] * view.shape[2], 0.0
    for begin in range(0, size, _CHUNK):
        red, green, blue = _chunk(view, begin)
        for i in range(position):
            _step((order >> (2 * i)) & 3, red, green, blue, b, s, h)
        if c != _ONE:
            total += _luma_sum(red, green, blue)
    other = np.float32((1.0 - contrast) * total / size)
    if c == _ONE and position == 3:
        return
    for begin in range(0, size, _CHUNK):
        red, green, blue = _chunk(view, begin)
        if c != _ONE:
            _blend(red, green, blue, c, other)
        for i in range(position + 1, 4):
            _step((order >> (2 * i)) & 3, red, green, blue, b, s, h)


@inlined
def _chunk(view, begin):
    """Up to _CHUNK pixels of the three planes."""
    size, flat = view.shape[1] * view.shape[2], view.reshape(-1)
    stop = min(begin + _CHUNK, size)
    return (
        flat[begin:stop],
        flat[size + begin : size + stop],
        flat[2 * size + begin : 2 * size + stop],
    )
