"""Random greyscale."""

from __future__ import annotations

import numpy as np

from ffcv_ssl.kernels.color import luma
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.transforms.base import ImageOp, check_probability, draw_switch, probability


class RandomGrayscale(ImageOp):
    """All three channels become the luma 0.2989 R + 0.587 G + 0.114 B, with probability
    `gray_prob`. Column: gray (bool)."""

    columns = (("gray", np.bool_),)
    view_name, place = "gray", 30
    settings = (probability("gray_prob", "gray_prob", "Probability of becoming greyscale."),)

    def __init__(
        self, gray_prob: float = 0.2, link: str | None = None, seed: int | None = None
    ) -> None:
        super().__init__(link, seed)
        self.gray_prob = gray_prob
        self.constants()

    def constants(self) -> tuple[float, ...]:
        return (check_probability(self, "gray_prob", self.gray_prob),)

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] == 0.0:
            return
        size, flat = view.shape[1] * view.shape[2], view.reshape(-1)
        red, green, blue = flat[:size], flat[size : 2 * size], flat[2 * size :]
        for i in range(size):
            value = luma(red[i], green[i], blue[i])
            red[i], green[i], blue[i] = value, value, value
