"""Random Gaussian blur with torchvision's meaning: a fixed number of taps, a random sigma,
reflected borders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffcv_ssl.kernels import blur
from ffcv_ssl.kernels.blur import blur_
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms.base import (
    ImageOp,
    Setting,
    check_number,
    check_probability,
    check_range,
    probability,
)

_ODD = "an odd number of taps, 1 to 9999"


def _is_odd_or_none(taps: Any) -> bool:
    return taps is None or (isinstance(taps, int) and taps >= 1 and taps % 2 == 1)


class GaussianBlur(ImageOp):
    """Blur with probability `blur_prob`; sigma uniform in the range, in pixels of the view.

    kernel_size: taps, odd (23 is a tenth of 224). Column: sigma (float32; 0: not blurred).
    """

    columns = (("sigma", np.float32),)
    view_name, place = "blur", 40
    settings = (
        probability("blur_prob", "blur_prob", "Probability of a Gaussian blur."),
        Setting(
            "blur_kernel_size",
            "kernel_size",
            int | None,
            None,
            "Taps of the blur, odd; None: a tenth of the view's side, made odd, at least 3 "
            "(SimCLR, appendix A).",
            is_valid=_is_odd_or_none,
            expected="an odd number of taps",
        ),
        Setting(
            "blur_sigma",
            "sigma",
            tuple[float, float],
            (0.1, 2.0),
            "Standard deviation of the blur in pixels of the view, positive.",
            1e-3,
            1e3,
        ),
    )

    def __init__(
        self,
        blur_prob: float = 0.5,
        kernel_size: int = 23,
        sigma: tuple[float, float] = (0.1, 2),
        link: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(link, seed)
        self.blur_prob, self.kernel_size, self.sigma = blur_prob, kernel_size, sigma
        self.constants()

    def constants(self) -> tuple[float, ...]:
        taps = check_number(self, "kernel_size", self.kernel_size, 1, 9999, _ODD)
        if taps % 2 != 1:
            raise ValueError(f"GaussianBlur: kernel_size is {self.kernel_size!r}, must be {_ODD}")
        prob = check_probability(self, "blur_prob", self.blur_prob)
        low, high = check_range(self, "sigma", self.sigma, 1e-3, 1e3)
        return prob, low, high, taps

    def scratch_floats(self, view_shape: tuple[int, int]) -> int:
        return blur.scratch_floats(*view_shape, int(self.kernel_size))

    @classmethod
    def caption(cls, row: Any) -> str:
        return f"blur {row['sigma']:.2f}" if row["sigma"] > 0 else ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], size_px: int) -> ImageOp | None:
        taps = settings["blur_kernel_size"]
        taps = max(3, int(0.1 * size_px) // 2 * 2 + 1) if taps is None else taps
        return super().from_settings({**settings, "blur_kernel_size": taps}, size_px)

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        """raw[0]: sigma, 0 where the view is not blurred."""
        u_applied, u_sigma, _, _ = uniforms(key, epoch, sample, occurrence, 0)
        sigma = constants[1] + (constants[2] - constants[1]) * u_sigma
        raw[0] = sigma if u_applied < constants[0] else 0.0

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            blur_(view, raw[0], int(constants[3]), scratch)
