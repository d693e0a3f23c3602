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
from ffcv_ssl.transforms.crop import INTERPOLATIONS

CROPS = ("random", "center")
# What `View.linked` may name.
OPS = ("crop", "flip", "jitter", "gray", "blur", "solarize", "equalize", "noise")
# The two-sided settings, and between which values both sides must lie.
RANGES = {"crop_scale": (0, 1), "crop_ratio": (1e-3, 1e3), "blur_sigma": (1e-3, 1e3)}
# The one-sided settings beside probabilities, likewise.
LIMITS = {
    "size_scale": (1e-3, 4),
    "center_ratio": (1e-3, 1),
    "brightness": (0, math.inf),
    "contrast": (0, math.inf),
    "saturation": (0, math.inf),
    "hue": (0, 0.5),
    "solarize_threshold": (0, 256),
    "noise_std": (0, 100),
}


@dataclass(frozen=True)
class View:
    """Every setting of one view of an image, in the order in which the ops act.

    Ranges are (low, high) and uniform, except `crop_ratio`, which is log-uniform. Lists are taken
    for tuples. Raises ValueError, naming the key, for a value outside its range.
    """

    size_scale: float = 1.0
    """Side of the view as a share of the run's resolution, up to 4; DINO's local: 96/224."""
    crop: str = "random"
    """`random`: a random box, resized. `center`: the middle square, resized, nothing drawn."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop covers, in (0, 1]."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop before it is resized to a square, positive."""
    center_ratio: float = 224 / 256
    """Side of a centre crop as a share of the image's short side, in (0, 1]."""
    interpolation: str = "bilinear"
    """How a crop is resized, `bilinear` or `bicubic`, always antialiased."""
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
    """Standard deviation of additive Gaussian noise, of values in [0, 1]; 0: no noise."""
    noise_prob: float = 1.0
    """Probability of that noise."""
    link: str | None = None
    """Name of another view whose draws the ops in `linked` take over; None: all are its own."""
    linked: tuple[str, ...] = ("crop",)
    """The ops that `link` concerns: crop, flip, jitter, gray, blur, solarize, equalize, noise."""

    def __post_init__(self):
        for key, limits in RANGES.items():
            object.__setattr__(self, key, _checked_range(key, getattr(self, key), *limits))
        for key, limits in LIMITS.items():
            _check_number(key, getattr(self, key), *limits)
        for field in fields(self):
            if field.name.endswith("_prob"):
                _check_number(field.name, getattr(self, field.name), 0, 1)
        _check_name("crop", self.crop, CROPS)
        _check_name("interpolation", self.interpolation, tuple(INTERPOLATIONS))
        object.__setattr__(self, "linked", tuple(self.linked))
        for name in self.linked:
            _check_name("linked", name, OPS)
        if self.link is not None and self.crop == "center" and "crop" in self.linked:
            raise ValueError(f"link: got {self.link!r}, expected none: a centre crop draws nothing")
        taps = self.blur_kernel_size
        if taps is not None and (not isinstance(taps, int) or taps < 1 or taps % 2 == 0):
            raise ValueError(f"blur_kernel_size: got {taps!r}, expected an odd number of taps")

    def size_px(self, resolution_px):
        """Side of this view in pixels when whole views are `resolution_px` wide; at least 1."""
        return max(1, round(resolution_px * self.size_scale))

    def kernel_size_px(self, resolution_px):
        """Taps of this view's blur at `resolution_px`: odd, at least 3 unless set."""
        if self.blur_kernel_size is not None:
            return self.blur_kernel_size
        return max(3, int(0.1 * self.size_px(resolution_px)) // 2 * 2 + 1)


def build(view, resolution_px):
    """Ops that render `view` for whole views of `resolution_px` x `resolution_px`, uint8.

    Ops that never act are left out. Conversions (`ToTensor`, `ToTorchImage`, `NormalizeImage`...)
    are the caller's.
    """
    ops = {"crop": _crop(view, view.size_px(resolution_px))}
    if view.flip_prob > 0:
        ops["flip"] = RandomHorizontalFlip(view.flip_prob)
    factors = (view.brightness, view.contrast, view.saturation, view.hue)
    if view.jitter_prob > 0 and any(factors):
        ops["jitter"] = RandomColorJitter(view.jitter_prob, *factors)
    if view.gray_prob > 0:
        ops["gray"] = RandomGrayscale(view.gray_prob)
    if view.blur_prob > 0:
        taps = view.kernel_size_px(resolution_px)
        ops["blur"] = GaussianBlur(view.blur_prob, taps, view.blur_sigma)
    if view.solarize_prob > 0:
        ops["solarize"] = RandomSolarization(view.solarize_prob, view.solarize_threshold)
    if view.equalize_prob > 0:
        ops["equalize"] = RandomEqualize(view.equalize_prob)
    if view.noise_prob > 0 and view.noise_std > 0:
        ops["noise"] = GaussianNoise(view.noise_std, view.noise_prob)
    if view.link is not None:
        for name in view.linked:
            if name in ops:
                ops[name].link = view.link
    return list(ops.values())


def _crop(view, size_px):
    if view.crop == "center":
        return CenterCrop(size_px, view.center_ratio, view.interpolation)
    return RandomResizedCrop(size_px, view.crop_scale, view.crop_ratio, view.interpolation)


def _check_name(key, value, known):
    if value not in known:
        raise ValueError(f"{key}: got {value!r}, expected one of {', '.join(known)}")


def _check_number(key, value, low, high):
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}: got {value!r}, expected a number")
    if not low <= value <= high:
        upper = f" to {high:g}" if high < math.inf else " or more"
        raise ValueError(f"{key}: got {value:g}, expected {low:g}{upper}")


def _checked_range(key, value, low, high):
    """`value` as a tuple (lowest, highest) with low <= lowest <= highest <= high, highest > 0."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{key}: got {value!r}, expected two numbers [low, high]")
    for side in value:
        _check_number(key, side, low, high)
    if value[0] > value[1] or value[1] == 0:
        raise ValueError(f"{key}: got {list(value)}, expected low <= high and high above 0")
    return tuple(value)
