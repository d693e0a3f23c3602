"""Random Gaussian blur with torchvision's meaning: a fixed number of taps, a random sigma,
reflected borders."""

import numpy as np

from ffcv_ssl.kernels import blur
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import ImageOp, check_number, check_probability, check_range

_ODD = "an odd number of taps, 1 to 9999"


class GaussianBlur(ImageOp):
    """Blur with probability `blur_prob`; sigma uniform in the range, in pixels of the view.

    kernel_size: taps, odd (23 is a tenth of 224). Column: sigma (float32; 0: not blurred).
    """

    opcode = 6
    columns = (("sigma", np.float32),)

    def __init__(self, blur_prob=0.5, kernel_size=23, sigma=(0.1, 2), link=None, seed=None):
        super().__init__(link, seed)
        self.blur_prob, self.kernel_size, self.sigma = blur_prob, kernel_size, sigma
        self.constants()

    def constants(self):
        taps = check_number(self, "kernel_size", self.kernel_size, 1, 9999, _ODD)
        if taps % 2 != 1:
            raise ValueError(f"GaussianBlur: kernel_size is {self.kernel_size!r}, must be {_ODD}")
        probability = check_probability(self, "blur_prob", self.blur_prob)
        low, high = check_range(self, "sigma", self.sigma, 1e-3, 1e3)
        return probability, low, high, taps

    def scratch_floats(self, view_shape):
        return blur.scratch_floats(*view_shape, int(self.kernel_size))


@device
def draw_sigma(key, epoch, sample, occurrence, constants, raw):
    u_applied, u_sigma, _, _ = uniforms(key, epoch, sample, occurrence, 0)
    sigma = constants[1] + (constants[2] - constants[1]) * u_sigma
    raw[0] = sigma if u_applied < constants[0] else 0.0
