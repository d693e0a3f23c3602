"""Random solarization."""

import numpy as np

from ffcv_ssl.transforms.base import ImageOp, check_probability


class RandomSolarization(ImageOp):
    """Invert the values at or above `threshold` (of 0..255) with probability `solarization_prob`. Column: solarize (bool)."""

    opcode = 7
    columns = (("solarize", np.bool_),)

    def __init__(self, solarization_prob=0.2, threshold=128, link=None, seed=None):
        super().__init__(link, seed)
        self.solarization_prob, self.threshold = solarization_prob, threshold
        self.constants()

    def constants(self):
        if not 0 <= self.threshold <= 256:
            raise ValueError(f"RandomSolarization: threshold is {self.threshold!r}, must be 0 to 256")
        probability = check_probability(self, "solarization_prob", self.solarization_prob)
        return probability, self.threshold / 255.0
