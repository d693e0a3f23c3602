"""Histogram equalization: exact against PIL on bytes."""

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
    plain_images,
    run_ops,
    to_float,
    worst_difference,
)

from ffcv_ssl.transforms import RandomEqualize, SimpleRGBImageDecoder


def check_equalize(image):
    (view,), _, _ = run_ops([SimpleRGBImageDecoder(), RandomEqualize(1)], [image])
    assert np.array_equal(view, np.asarray(ImageOps.equalize(Image.fromarray(image))))
    assert np.array_equal(view, reference.to_bytes(reference.equalize(image / 255)))
    theirs = from_float(tv.equalize(to_float(image)))
    assert worst_difference([view], [theirs]) <= 0.51


@pytest.mark.parametrize("shape", [*SIZES, (375, 500)])
def test_images_of_any_size_equal_pil_and_torchvision(shape):
    check_equalize(photo_like(*shape))


def test_plain_images_and_narrow_histograms_equal_pil_and_torchvision():
    for image in [*plain_images(), color_grid(), photo_like(300, 400) // 16 + 100]:
        check_equalize(image)


def test_two_levels_and_levels_at_the_ends_equal_pil():
    rng = np.random.default_rng(0)
    for levels in [(0, 255), (254, 255), (0, 1), (7, 8, 200)]:
        check_equalize(rng.choice(np.array(levels, np.uint8), (50, 60, 3)))
