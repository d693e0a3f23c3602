"""Random histogram equalization."""

import numpy as np

from ffcv_ssl.transforms.base import ImageOp, check_probability


class RandomEqualize(ImageOp):
    """Equalize each channel's histogram (PIL.ImageOps.equalize) with probability `prob`. Column:
    equalize (bool)."""

    opcode = 8
    columns = (("equalize", np.bool_),)

    def __init__(self, prob=0.2, link=None, seed=None):
        super().__init__(link, seed)
        self.prob = prob
        self.constants()

    def constants(self):
        return (check_probability(self, "prob", self.prob),)

    def scratch_floats(self, view_shape):
        return 512
