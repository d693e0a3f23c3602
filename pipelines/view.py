"""One view: every probability and range of its ops in one frozen record, checked where it is made.

A record is data, so it can be overridden key by key, printed and stored with a run; `build` turns
it into ops. An op that can never act is left out of the list: draws are keyed by op class, so
leaving one out changes no other draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ffcv_ssl.transforms import (
    CenterCrop,
    GaussianBlur,
    GaussianNoise,
    RandomColorJitter,
    RandomEqualize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarization,
)

CROPS = ("random", "center")


@dataclass(frozen=True)
class View:
    """Every setting of one view of an image, in the order in which the ops act.

    Ranges are (low, high) and uniform, except `crop_ratio`, which is log-uniform. Lists are taken
    for tuples. Raises ValueError, naming the key, for a value outside its range.
    """

    size_scale: float = 1.0
    """Side of the view as a share of the run's resolution, in (0, 4]; DINO's local: 96/224."""
    crop: str = "random"
    """`random`: a random box, resized. `center`: the middle square, resized, nothing drawn."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop covers, in (0, 1]."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop before it is resized to a square, positive."""
    crop_link: str | None = None
    """Name of the view whose crop box this view takes over; None: it draws its own."""
    center_ratio: float = 224 / 256
    """Side of a centre crop as a share of the image's short side, in (0, 1]."""
    interpolation: str = "bilinear"
    """How a crop is resized, always with antialiasing."""
    flip_prob: float = 0.0
    """Probability of a left-right flip."""
    jitter_prob: float = 0.0
    """Probability of the four colour changes below, in random order (torchvision's ColorJitter)."""
    brightness: float = 0.4
    """Brightness factor within 1 +- this, not below 0."""
    contrast: float = 0.4
    """Contrast factor within 1 +- this, not below 0."""
    saturation: float = 0.2
    """Saturation factor within 1 +- this, not below 0."""
    hue: float = 0.1
    """Hue shift within +- this share of the colour circle, at most 0.5."""
    gray_prob: float = 0.0
    """Probability of becoming greyscale."""
    blur_prob: float = 0.0
    """Probability of a Gaussian blur."""
    blur_kernel_size: int | None = None
    """Taps of the blur, odd; None: a tenth of the view's side, made odd (SimCLR, appendix A)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, positive."""
    solarize_prob: float = 0.0
    """Probability of solarization: pixels from the threshold up are inverted."""
    solarize_threshold: int = 128
    """Threshold of solarization on the 0..255 scale."""
    equalize_prob: float = 0.0
    """Probability of histogram equalization."""
    noise_std: float = 0.0
    """Standard deviation of additive Gaussian noise on the 0..255 scale; 0: no noise."""
    noise_prob: float = 1.0
    """Probability of that noise."""

    def __post_init__(self):
        for key in RANGES:
            object.__setattr__(self, key, _pair(key, getattr(self, key)))
        for field in fields(self):
            if field.name.endswith("_prob"):
                _check_number(field.name, getattr(self, field.name), 0, 1)
        for key in ("brightness", "contrast", "saturation", "noise_std"):
            _check_number(key, getattr(self, key), 0, math.inf)
        _check_number("hue", self.hue, 0, 0.5)
        _check_number("solarize_threshold", self.solarize_threshold, 0, 256)
        for key, high in (("size_scale", 4), ("center_ratio", 1)):
            _check_number(key, getattr(self, key), 0, high, low_is_open=True)
        for key, high in RANGES.items():
            _check_range(key, getattr(self, key), high)
        self._check_kinds()

    def _check_kinds(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop: got {self.crop!r}, expected one of {', '.join(CROPS)}")
        if self.crop == "center" and self.crop_link is not None:
            raise ValueError(
                f"crop_link: got {self.crop_link!r}, expected none: a centre crop draws nothing"
            )
        if self.blur_kernel_size is not None:
            _check_number("blur_kernel_size", self.blur_kernel_size, 1, math.inf)
            if self.blur_kernel_size % 2 != 1:
                raise ValueError(
                    f"blur_kernel_size: got {self.blur_kernel_size}, expected an odd number of taps"
                )

    def size_px(self, resolution_px):
        """Side of this view in pixels when whole views are `resolution_px` wide; at least 1."""
        return max(1, round(resolution_px * self.size_scale))

    def kernel_size_px(self, resolution_px):
        """Taps of this view's blur at `resolution_px`: odd, at least 3 unless set."""
        if self.blur_kernel_size is not None:
            return self.blur_kernel_size
        return max(3, int(0.1 * self.size_px(resolution_px)) // 2 * 2 + 1)


# The two-sided settings and the largest value that each side may take.
RANGES = {"crop_scale": 1.0, "crop_ratio": math.inf, "blur_sigma": math.inf}


def build(view, resolution_px):
    """Ops that render `view` for whole views of `resolution_px` x `resolution_px`, uint8.

    Ops that never act are left out. Conversions (`ToTensor`, `ToTorchImage`, `NormalizeImage`...)
    are the caller's.
    """
    size = view.size_px(resolution_px)
    if view.crop == "center":
        ops = [CenterCrop(size, view.center_ratio)]
    else:
        ops = [
            RandomResizedCrop(
                size, view.crop_scale, view.crop_ratio, view.interpolation, link=view.crop_link
            )
        ]
    if view.flip_prob > 0:
        ops.append(RandomHorizontalFlip(view.flip_prob))
    if view.jitter_prob > 0 and max(view.brightness, view.contrast, view.saturation, view.hue) > 0:
        factors = (view.brightness, view.contrast, view.saturation, view.hue)
        ops.append(RandomColorJitter(view.jitter_prob, *factors))
    if view.gray_prob > 0:
        ops.append(RandomGrayscale(view.gray_prob))
    if view.blur_prob > 0:
        ops.append(
            GaussianBlur(view.blur_prob, view.kernel_size_px(resolution_px), view.blur_sigma)
        )
    if view.solarize_prob > 0:
        ops.append(RandomSolarization(view.solarize_prob, view.solarize_threshold))
    if view.equalize_prob > 0:
        ops.append(RandomEqualize(view.equalize_prob))
    if view.noise_prob > 0 and view.noise_std > 0:
        ops.append(GaussianNoise(view.noise_std, view.noise_prob))
    return ops


def _pair(key, value):
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{key}: got {value!r}, expected two numbers [low, high]")
    return tuple(value)


def _check_number(key, value, low, high, low_is_open=False):
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}: got {value!r}, expected a number")
    if value < low or value > high or (low_is_open and value == low):
        lower = f"above {low:g}" if low_is_open else f"at least {low:g}"
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{key}: got {value:g}, expected {lower}{upper}")


def _check_range(key, pair, high):
    for value in pair:
        _check_number(key, value, 0, high, low_is_open=True)
    if pair[0] > pair[1]:
        raise ValueError(f"{key}: got {list(pair)}, expected low <= high")
