"""Colour jitter with torchvision's meaning: random order, a clamp after each step, hue in HSV."""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import ImageOp, check_number, check_probability

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


class RandomColorJitter(ImageOp):
    """Brightness, contrast, saturation and hue, in random order, with probability `jitter_prob`.

    brightness, contrast, saturation: a factor uniform in [max(0, 1 - x), 1 + x]. hue: turns of the
    colour circle, uniform in [-hue, hue], hue <= 0.5. Column: jitter (applied, brightness,
    contrast, saturation, hue, order); `order` lists the steps as they are applied, 0 brightness, 1
    contrast, 2 saturation, 3 hue. Factors are those drawn, also where
    `applied` is False. Source: torchvision ColorJitter inside RandomApply.
    """

    opcode = 4
    columns = (("jitter", JITTER_DTYPE),)
    num_raw_columns = 6

    def __init__(
        self,
        jitter_prob=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        link=None,
        seed=None,
    ):
        super().__init__(link, seed)
        self.jitter_prob = jitter_prob
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.constants()

    def constants(self):
        probability = check_probability(self, "jitter_prob", self.jitter_prob)
        names = ("brightness", "contrast", "saturation")
        strengths = [check_number(self, name, getattr(self, name), 0, 1e3) for name in names]
        return probability, *strengths, check_number(self, "hue", self.hue, 0, 0.5)

    def describe(self, raw, out):
        column = out["jitter"]
        column["applied"] = raw[:, 0] != 0
        for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            column[name] = raw[:, i + 1]
        packed = raw[:, 5].astype(np.int64)
        for position in range(4):
            column["order"][:, position] = (packed >> (2 * position)) & 3


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


@device
def draw_jitter(key, epoch, sample, occurrence, constants, raw):
    u_applied, u_order, u_brightness, u_contrast = uniforms(key, epoch, sample, occurrence, 0)
    u_saturation, u_hue, _, _ = uniforms(key, epoch, sample, occurrence, 1)
    raw[0] = 1.0 if u_applied < constants[0] else 0.0
    raw[1] = _factor(u_brightness, constants[1])
    raw[2] = _factor(u_contrast, constants[2])
    raw[3] = _factor(u_saturation, constants[3])
    raw[4] = (2.0 * u_hue - 1.0) * constants[4]
    raw[5] = _pack_order(u_order)
