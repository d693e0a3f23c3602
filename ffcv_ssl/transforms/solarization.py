"""Random solarization."""

from __future__ import annotations

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.transforms.base import (
    ImageOp,
    Setting,
    check_number,
    check_probability,
    draw_switch,
    probability,
)

_ONE = np.float32(1.0)


class RandomSolarization(ImageOp):
    """Invert the values at or above `threshold` (of 0..255) with probability `solarization_prob`.
    Column: solarize (bool)."""

    columns = (("solarize", np.bool_),)
    view_name, place = "solarize", 50
    settings = (
        probability(
            "solarize_prob",
            "solarization_prob",
            "Probability of solarization: pixels from the threshold up are inverted.",
        ),
        Setting(
            "solarize_threshold",
            "threshold",
            int,
            128,
            "Threshold of solarization on the 0..255 scale.",
            0,
            256,
        ),
    )

    def __init__(
        self,
        solarization_prob: float = 0.2,
        threshold: float = 128,
        link: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(link, seed)
        self.solarization_prob, self.threshold = solarization_prob, threshold
        self.constants()

    def constants(self) -> tuple[float, ...]:
        prob = check_probability(self, "solarization_prob", self.solarization_prob)
        return prob, check_number(self, "threshold", self.threshold, 0, 256) / 255.0

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        """v -> 1 - v where v >= threshold."""
        if raw[0] == 0.0:
            return
        limit, flat = np.float32(constants[1]), view.reshape(-1)
        for i in range(flat.size):
            value = flat[i]
            flat[i] = _ONE - value if value >= limit else value
