"""Solarization: exact against PIL on bytes, and against torchvision on floats."""

import numpy as np
import pytest
import reference
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps
from support.harness import (
    SIZES,
    color_grid,
    from_float,
    photo_like,
    run_ops,
    to_float,
    worst_difference,
)

from ffcv_ssl.transforms import RandomSolarization, SimpleRGBImageDecoder

EVERY_LEVEL = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)


def solarized(image, threshold):
    ops = [SimpleRGBImageDecoder(), RandomSolarization(1, threshold)]
    return run_ops(ops, [image])[0][0]


def test_every_level_at_every_threshold_equals_pil():
    image = Image.fromarray(EVERY_LEVEL)
    for threshold in range(257):
        theirs = np.asarray(ImageOps.solarize(image, threshold))
        assert np.array_equal(solarized(EVERY_LEVEL, threshold), theirs), threshold


@pytest.mark.parametrize("shape", SIZES)
def test_images_of_any_size_equal_pil_and_the_twin(shape):
    image = photo_like(*shape)
    view = solarized(image, 128)
    assert np.array_equal(view, np.asarray(ImageOps.solarize(Image.fromarray(image), 128)))
    twin = 255 * reference.solarize(image / 255, 128)
    assert worst_difference([view], [twin]) <= 1e-9


def test_floats_equal_torchvision():
    theirs = from_float(tv.solarize(to_float(color_grid()), 127.5 / 255))
    assert worst_difference([solarized(color_grid(), 127.5)], [theirs]) <= 0.51


def test_threshold_256_and_probability_0_change_nothing_and_0_inverts():
    image = color_grid()
    assert np.array_equal(solarized(image, 256), image)
    assert np.array_equal(solarized(image, 0), 255 - image)
    ops = [SimpleRGBImageDecoder(), RandomSolarization(0)]
    assert np.array_equal(run_ops(ops, [image])[0][0], image)
