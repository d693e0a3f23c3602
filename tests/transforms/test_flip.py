"""Flips: exact mirrors, alone and folded into the op before them."""

import numpy as np
import pytest
import reference
from support.harness import SIZES, photo_like, run_ops

from ffcv_ssl.transforms import (
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    SimpleRGBImageDecoder,
)

NOT_GRAY = RandomGrayscale(0)


@pytest.mark.parametrize("shape", SIZES)
def test_a_flip_mirrors_left_and_right(shape):
    image = photo_like(*shape)
    for ops, raw in [
        ([SimpleRGBImageDecoder(), RandomHorizontalFlip()], [[1.0], [0.0]]),  # folded
        ([SimpleRGBImageDecoder(), NOT_GRAY, RandomHorizontalFlip()], [[0.0, 1.0], [0.0, 0.0]]),
    ]:
        views, _, _ = run_ops(ops, [image, image], raw)
        assert np.array_equal(views[0], reference.flip(image))
        assert np.array_equal(views[1], image)


def test_a_flip_folded_into_a_crop_equals_a_flip_behind_it():
    image = photo_like(70, 90)
    for size in (32, (5, 7)):
        boxes = run_ops([RandomResizedCrop(size)], [image] * 6)[1]
        ones, zeros = np.ones((6, 1)), np.zeros((6, 1))
        folded = [RandomResizedCrop(size), RandomHorizontalFlip()]
        apart = [RandomResizedCrop(size), NOT_GRAY, RandomHorizontalFlip()]
        flipped, _, _ = run_ops(folded, [image] * 6, np.hstack([boxes, ones]))
        later, _, _ = run_ops(apart, [image] * 6, np.hstack([boxes, zeros, ones]))
        plain, _, _ = run_ops(folded, [image] * 6, np.hstack([boxes, zeros]))
        assert np.array_equal(flipped, later)
        assert np.array_equal(flipped, plain[:, :, ::-1])


def test_two_flips_cancel():
    image = photo_like(20, 31)
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(1), RandomHorizontalFlip(1)]
    assert np.array_equal(run_ops(ops, [image])[0][0], image)
