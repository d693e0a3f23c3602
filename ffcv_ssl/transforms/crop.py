"""Crops: a box of the image, resized with antialiasing to the view's size. They stand first in a
view, or start it anew.

Distribution: torchvision's RandomResizedCrop.get_params, not the same random stream. Pixels:
torch's antialiased resize.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffcv_ssl.kernels import resample as kernel
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.kernels.resample import resample, unpack
from ffcv_ssl.transforms.base import ImageOp, Setting, check_number, check_range, check_size

INTERPOLATIONS = {"bilinear": kernel.BILINEAR, "bicubic": kernel.BICUBIC}
CROPS = ("random", "center")
_ATTEMPTS = 10
_PAIR = tuple[float, float]


class Crop(ImageOp):
    """What all crops share: an output size, an interpolation, the column `crop` (top, left, height,
    width) and the compiled function that resizes the box.

    A crop of another distribution is a subclass with its own `draw`, which writes a box inside the
    image to raw[:4]; `constants()[4]` says whether to resize bicubically.
    """

    columns = (("crop", np.dtype((np.int32, 4))),)
    num_raw_columns = 4
    view_name, place = "crop", 0
    settings = (
        Setting(
            "crop",
            "crop",
            str,
            "random",
            "`random`: a random box, resized. `center`: the middle square, resized, nothing drawn.",
            choices=CROPS,
        ),
        Setting(
            "crop_scale",
            "scale",
            _PAIR,
            (0.08, 1.0),
            "Share of the image's area that a random crop covers, in (0, 1].",
            0,
            1,
        ),
        Setting(
            "crop_ratio",
            "ratio",
            _PAIR,
            (3 / 4, 4 / 3),
            "Width over height of a random crop before it is resized to a square, positive.",
            1e-3,
            1e3,
        ),
        Setting(
            "center_ratio",
            "ratio",
            float,
            224 / 256,
            "Side of a center crop as a share of the image's short side, in (0, 1].",
            1e-3,
            1,
        ),
        Setting(
            "interpolation",
            "interpolation",
            str,
            "bilinear",
            "How a crop is resized, `bilinear` or `bicubic`, always antialiased.",
            choices=tuple(INTERPOLATIONS),
        ),
    )

    def __init__(
        self,
        output_size: Any,
        interpolation: str = "bilinear",
        link: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(link, seed)
        self.output_size = check_size(self, output_size)
        self.interpolation = interpolation
        self._cubic()

    def _cubic(self) -> int:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"{type(self).__name__}: interpolation is {self.interpolation!r}, "
                f"must be one of {', '.join(INTERPOLATIONS)}"
            )
        return INTERPOLATIONS[self.interpolation]

    @property
    def is_cubic(self) -> bool:
        return bool(self._cubic())

    def describe(self, raw: np.ndarray, out: dict[str, np.ndarray]) -> None:
        out["crop"] = raw.astype(np.int32)

    @classmethod
    def caption(cls, row: Any) -> str:
        top, left, height, width = (int(value) for value in row["crop"])
        return f"crop {width}x{height} at {left},{top}"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], size_px: int) -> ImageOp:
        interpolation = settings["interpolation"]
        if settings["crop"] == "center":
            return CenterCrop(size_px, settings["center_ratio"], interpolation)
        scale, ratio = settings["crop_scale"], settings["crop_ratio"]
        return RandomResizedCrop(size_px, scale, ratio, interpolation)

    @staticmethod
    @device
    def start(view, constants, raw, scratch, pixels, at, height, width, factor, flip):
        box = (raw[0] / factor, raw[1] / factor, raw[2] / factor, raw[3] / factor)
        resample(pixels, at, height, width, box, constants[4] != 0.0, flip, view, scratch)


@device
def _store(raw, top, left, height, width):
    raw[0], raw[1], raw[2], raw[3] = top, left, height, width


class RandomResizedCrop(Crop):
    """A box of random area and aspect ratio, resized to `output_size`; also
    `RandomResizedCrop(scale, ratio, size)`.

    output_size: pixels or (height, width). scale: (min, max) fraction of the image's area, in (0,
    1].
    ratio: (min, max) width / height, drawn log-uniformly. interpolation: "bilinear" or "bicubic",
    antialiased.
    Column: crop, int32 (top, left, height, width) in pixels of the stored image.
    """

    def __init__(
        self,
        output_size: Any = None,
        scale: Any = (0.08, 1),
        ratio: Any = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        link: str | None = None,
        seed: int | None = None,
        size: Any = None,
    ) -> None:
        if size is None and _is_scale_first(output_size, ratio):
            output_size, scale, ratio = ratio, output_size, scale  # FFCV's (scale, ratio, size)
        output_size = size if size is not None else output_size
        super().__init__(output_size, interpolation, link, seed)
        self.scale, self.ratio = scale, ratio
        self.constants()

    def constants(self) -> tuple[float, ...]:
        scale = check_range(self, "scale", self.scale, 0.0, 1.0)
        ratio = check_range(self, "ratio", self.ratio, 1e-3, 1e3)
        if scale[1] == 0:
            raise ValueError(f"RandomResizedCrop: scale is {self.scale!r}, max must be above 0")
        return (*scale, *ratio, self._cubic())

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        """Ten attempts at a box inside the image, one block of random numbers each; then the
        largest allowed central box."""
        scale_low, scale_high = constants[0], constants[1]
        ratio_low, ratio_high = constants[2], constants[3]
        log_low, log_high = math.log(ratio_low), math.log(ratio_high)
        for attempt in range(_ATTEMPTS):
            u_area, u_ratio, u_top, u_left = uniforms(key, epoch, sample, occurrence, attempt)
            area = height * width * (scale_low + (scale_high - scale_low) * u_area)
            ratio = math.exp(log_low + (log_high - log_low) * u_ratio)
            box_width = np.rint(math.sqrt(area * ratio))
            box_height = np.rint(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = math.floor(u_top * (height - box_height + 1))
                left = math.floor(u_left * (width - box_width + 1))
                _store(raw, top, left, box_height, box_width)
                return
        box_width, box_height = float(width), float(height)
        if width / height < ratio_low:
            box_height = max(np.rint(width / ratio_low), 1.0)
        elif width / height > ratio_high:
            box_width = max(np.rint(height * ratio_high), 1.0)
        _store(raw, (height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _is_scale_first(first: Any, third: Any) -> bool:
    """True for FFCV's positional form: a scale is a pair of fractions, a size is of whole
    numbers."""
    if np.ndim(first) == 0:
        return False
    return np.ndim(third) == 0 or any(isinstance(v, float) and 0 < v <= 1 for v in first)


class CenterCrop(Crop):
    """The central square of `ratio` times the short side, resized to `output_size`. Column:
    crop."""

    random = False

    def __init__(
        self, output_size: Any, ratio: float = 224 / 256, interpolation: str = "bilinear"
    ) -> None:
        super().__init__(output_size, interpolation)
        self.ratio = ratio
        self.constants()

    def constants(self) -> tuple[float, ...]:
        ratio = check_number(self, "ratio", self.ratio, 1e-6, 1, "above 0, at most 1")
        return (ratio, 0.0, 0.0, 0.0, self._cubic())

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        side = max(int(constants[0] * min(height, width)), 1)
        _store(raw, (height - side) // 2, (width - side) // 2, side, side)


class SimpleRGBImageDecoder(ImageOp):
    """The whole image as it is stored; every image of the file must have the same size."""

    random = False

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    @device
    def start(view, constants, raw, scratch, pixels, at, height, width, factor, flip):
        unpack(pixels, at, flip, view)
