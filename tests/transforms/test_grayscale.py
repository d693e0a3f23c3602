"""Greyscale against torchvision's luma."""

import numpy as np
import pytest
import reference
import torchvision.transforms.v2.functional as tv
from support.harness import (
    SIZES,
    color_grid,
    from_float,
    huge_image,
    photo_like,
    plain_images,
    run_ops,
    to_float,
    worst_difference,
)

from ffcv_ssl.transforms import RandomGrayscale, SimpleRGBImageDecoder

ONE_ROUNDING = 0.51


def check_gray(image):
    (view,), _, _ = run_ops([SimpleRGBImageDecoder(), RandomGrayscale(1)], [image])
    theirs = from_float(tv.rgb_to_grayscale(to_float(image), 3))
    assert worst_difference([view], [theirs]) <= ONE_ROUNDING
    assert worst_difference([view], [255 * reference.grayscale(image / 255)]) <= ONE_ROUNDING
    assert (view == view[..., :1]).all()


@pytest.mark.parametrize("shape", SIZES)
def test_images_of_any_size_equal_torchvision(shape):
    check_gray(photo_like(*shape))


def test_plain_images_and_all_kinds_of_colors_equal_torchvision():
    for image in [*plain_images(), color_grid(), photo_like(375, 500)]:
        check_gray(image)


@pytest.mark.slow
def test_a_huge_image_equals_torchvision():
    check_gray(huge_image())


def test_grey_images_stay_as_they_are_within_one_level():
    grey = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    (view,), _, _ = run_ops([SimpleRGBImageDecoder(), RandomGrayscale(1)], [grey])
    assert np.array_equal(view, grey)  # the luma weights sum to 0.9999: 0.03 levels at most
