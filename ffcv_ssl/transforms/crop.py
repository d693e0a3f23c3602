"""Crops: a box of the image, resized with antialiasing to the view's size. They stand first in a
view, or start it anew.

Distribution: torchvision's RandomResizedCrop.get_params, not the same random stream. Pixels:
torch's antialiased resize.
"""

import math

import numpy as np

from ffcv_ssl.kernels import resample
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import ImageOp, check_number, check_range, check_size

INTERPOLATIONS = {"bilinear": resample.BILINEAR, "bicubic": resample.BICUBIC}
_ATTEMPTS = 10


class Crop(ImageOp):
    """What all crops share: an output size, an interpolation, and the column `crop` (top, left,
    height, width)."""

    columns = (("crop", np.dtype((np.int32, 4))),)
    num_raw_columns = 4

    def __init__(self, output_size, interpolation="bilinear", link=None, seed=None):
        super().__init__(link, seed)
        self.output_size = check_size(self, output_size)
        self.interpolation = interpolation
        self._cubic()

    def _cubic(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"{type(self).__name__}: interpolation is {self.interpolation!r}, "
                f"must be one of {', '.join(INTERPOLATIONS)}"
            )
        return INTERPOLATIONS[self.interpolation]

    @property
    def is_cubic(self):
        return bool(self._cubic())

    def describe(self, raw, out):
        out["crop"] = raw.astype(np.int32)


class RandomResizedCrop(Crop):
    """A box of random area and aspect ratio, resized to `output_size`; also
    `RandomResizedCrop(scale, ratio, size)`.

    output_size: pixels or (height, width). scale: (min, max) fraction of the image's area, in (0,
    1].
    ratio: (min, max) width / height, drawn log-uniformly. interpolation: "bilinear" or "bicubic",
    antialiased.
    Column: crop, int32 (top, left, height, width) in pixels of the stored image.
    """

    opcode = 1

    def __init__(
        self,
        output_size=None,
        scale=(0.08, 1),
        ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        link=None,
        seed=None,
        size=None,
    ):
        if size is None and _is_scale_first(output_size, ratio):
            output_size, scale, ratio = ratio, output_size, scale  # FFCV's (scale, ratio, size)
        output_size = size if size is not None else output_size
        super().__init__(output_size, interpolation, link, seed)
        self.scale, self.ratio = scale, ratio
        self.constants()

    def constants(self):
        scale = check_range(self, "scale", self.scale, 0.0, 1.0)
        ratio = check_range(self, "ratio", self.ratio, 1e-3, 1e3)
        if scale[1] == 0:
            raise ValueError(f"RandomResizedCrop: scale is {self.scale!r}, must reach above 0")
        return (*scale, *ratio, self._cubic())


def _is_scale_first(first, third):
    """True for FFCV's positional form: a scale is a pair of fractions, a size is of whole
    numbers."""
    if np.ndim(first) == 0:
        return False
    return np.ndim(third) == 0 or any(isinstance(v, float) and 0 < v <= 1 for v in first)


class CenterCrop(Crop):
    """The central square of `ratio` times the short side, resized to `output_size`. Column:
    crop."""

    opcode = 2
    random = False

    def __init__(self, output_size, ratio=224 / 256, interpolation="bilinear"):
        super().__init__(output_size, interpolation)
        self.ratio = ratio
        self.constants()

    def constants(self):
        ratio = check_number(self, "ratio", self.ratio, 1e-6, 1, "above 0, at most 1")
        return (ratio, 0.0, 0.0, 0.0, self._cubic())


class SimpleRGBImageDecoder(ImageOp):
    """The whole image as it is stored; every image of the file must have the same size."""

    opcode = 0
    num_raw_columns = 0
    random = False

    def __init__(self):
        super().__init__()


@device
def _store(raw, top, left, height, width):
    raw[0], raw[1], raw[2], raw[3] = top, left, height, width


@device
def draw_random_crop(key, epoch, sample, occurrence, constants, height, width, raw):
    """Ten attempts at a box inside the image, one block of random numbers each; then the largest
    allowed central box."""
    scale_low, scale_high = constants[0], constants[1]
    ratio_low, ratio_high = constants[2], constants[3]
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    for attempt in range(_ATTEMPTS):
        u_area, u_ratio, u_top, u_left = uniforms(key, epoch, sample, occurrence, attempt)
        area = height * width * (scale_low + (scale_high - scale_low) * u_area)
        ratio = math.exp(log_low + (log_high - log_low) * u_ratio)
        box_width, box_height = np.rint(math.sqrt(area * ratio)), np.rint(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = math.floor(u_top * (height - box_height + 1))
            _store(raw, top, math.floor(u_left * (width - box_width + 1)), box_height, box_width)
            return
    box_width, box_height = float(width), float(height)
    if width / height < ratio_low:
        box_height = max(np.rint(width / ratio_low), 1.0)
    elif width / height > ratio_high:
        box_width = max(np.rint(height * ratio_high), 1.0)
    _store(raw, (height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


@device
def draw_center_crop(constants, height, width, raw):
    side = max(int(constants[0] * min(height, width)), 1)
    _store(raw, (height - side) // 2, (width - side) // 2, side, side)
