"""Random horizontal flip."""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import ImageOp, check_probability


class RandomHorizontalFlip(ImageOp):
    """Mirror left and right with probability `flip_prob`. Column: flip (bool)."""

    opcode = 3
    columns = (("flip", np.bool_),)

    def __init__(self, flip_prob=0.5, link=None, seed=None):
        super().__init__(link, seed)
        self.flip_prob = flip_prob
        self.constants()

    def constants(self):
        return (check_probability(self, "flip_prob", self.flip_prob),)


@device
def draw_switch(key, epoch, sample, occurrence, constants, raw):
    """raw[0] = 1 with probability constants[0], else 0: all ops that are only on or off."""
    u, _, _, _ = uniforms(key, epoch, sample, occurrence, 0)
    raw[0] = 1.0 if u < constants[0] else 0.0
