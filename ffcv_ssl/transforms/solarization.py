"""Random solarization."""

import numpy as np

from ffcv_ssl.transforms.base import ImageOp, check_number, check_probability


class RandomSolarization(ImageOp):
    """Invert the values at or above `threshold` (of 0..255) with probability `solarization_prob`.
    Column: solarize (bool)."""

    opcode = 7
    columns = (("solarize", np.bool_),)

    def __init__(self, solarization_prob=0.2, threshold=128, link=None, seed=None):
        super().__init__(link, seed)
        self.solarization_prob, self.threshold = solarization_prob, threshold
        self.constants()

    def constants(self):
        probability = check_probability(self, "solarization_prob", self.solarization_prob)
        return probability, check_number(self, "threshold", self.threshold, 0, 256) / 255.0
