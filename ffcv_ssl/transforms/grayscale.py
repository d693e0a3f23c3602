"""Random greyscale."""

import numpy as np

from ffcv_ssl.transforms.base import ImageOp, check_probability


class RandomGrayscale(ImageOp):
    """All three channels become the luma 0.2989 R + 0.587 G + 0.114 B, with probability
    `gray_prob`. Column: gray (bool)."""

    opcode = 5
    columns = (("gray", np.bool_),)

    def __init__(self, gray_prob=0.2, link=None, seed=None):
        super().__init__(link, seed)
        self.gray_prob = gray_prob
        self.constants()

    def constants(self):
        return (check_probability(self, "gray_prob", self.gray_prob),)
