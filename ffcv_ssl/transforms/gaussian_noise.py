"""Additive Gaussian noise, a pure function of the sample's key."""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import ImageOp, check_number, check_probability


class GaussianNoise(ImageOp):
    """Add N(0, std) to every number with probability `prob` and clamp; std of values in [0, 1] as
    in torchvision v2.

    Column: noise (uint64: the key of this view's noise; 0: none).
    """

    opcode = 9
    columns = (("noise", np.uint64),)

    def __init__(self, std, prob=1, link=None, seed=None):
        super().__init__(link, seed)
        self.std, self.prob = std, prob
        self.constants()

    def constants(self):
        std = check_number(self, "std", self.std, 0, 100, "0 to 100, for values in [0, 1]")
        return check_probability(self, "prob", self.prob), std


@device
def draw_noise_key(key, epoch, sample, occurrence, constants, raw):
    """A key of 48 bits, never 0: it fits a float64 exactly."""
    u_applied, u_high, u_low, _ = uniforms(key, epoch, sample, occurrence, 0)
    noise_key = np.floor(u_high * 2.0**24) * 2.0**24 + np.floor(u_low * 2.0**24)
    raw[0] = max(noise_key, 1.0) if u_applied < constants[0] else 0.0
