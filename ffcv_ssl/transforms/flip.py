"""Random horizontal flip.

Right behind the first op of a segment it costs nothing: that op mirrors while it writes the view
(pipeline/plan.py sees to it), and `apply` is not called.
"""

from __future__ import annotations

import numpy as np

from ffcv_ssl.kernels.color import flip_
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.transforms.base import ImageOp, check_probability, draw_switch, probability


class RandomHorizontalFlip(ImageOp):
    """Mirror left and right with probability `flip_prob`. Column: flip (bool)."""

    columns = (("flip", np.bool_),)
    view_name, place = "flip", 10
    settings = (probability("flip_prob", "flip_prob", "Probability of a left-right flip."),)

    def __init__(
        self, flip_prob: float = 0.5, link: str | None = None, seed: int | None = None
    ) -> None:
        super().__init__(link, seed)
        self.flip_prob = flip_prob
        self.constants()

    def constants(self) -> tuple[float, ...]:
        return (check_probability(self, "flip_prob", self.flip_prob),)

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            flip_(view)
