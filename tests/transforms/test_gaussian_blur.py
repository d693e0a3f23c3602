"""Gaussian blur against torchvision's, all taps included."""

import numpy as np
import pytest
import reference
import torchvision.transforms.v2.functional as tv
from support.harness import (
    SIZES,
    assert_share,
    assert_uniform,
    draw_params,
    from_float,
    huge_image,
    key_of,
    photo_like,
    plain_images,
    run_ops,
    to_float,
    worst_difference,
)

from ffcv_ssl.transforms import GaussianBlur, SimpleRGBImageDecoder

ONE_ROUNDING = 0.51
# Light taps are left out: 0.1 of a level at most, beside the rounding.
ONE_ROUNDING_AND_TAPS = 0.6
SIGMAS = [0.1, 0.25, 0.5, 0.77, 1.0, 1.5, 2.0]


def blurred(image, sigmas, kernel_size):
    ops = [SimpleRGBImageDecoder(), GaussianBlur(1, kernel_size)]
    return run_ops(ops, [image] * len(sigmas), np.array(sigmas)[:, None])[0]


def check_torchvision(image, sigmas, kernel_size):
    theirs = [
        from_float(tv.gaussian_blur(to_float(image), [kernel_size] * 2, [sigma] * 2))
        for sigma in sigmas
    ]
    views = blurred(image, sigmas, kernel_size)
    assert worst_difference(views, theirs) <= ONE_ROUNDING_AND_TAPS


def check_twin(image, sigmas, kernel_size):
    twins = [255 * reference.gaussian_blur(image / 255, sigma, kernel_size) for sigma in sigmas]
    views = blurred(image, sigmas, kernel_size)
    assert worst_difference(views, twins) <= ONE_ROUNDING_AND_TAPS


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9, 13, 23])
def test_blurs_of_every_kernel_size_equal_torchvision(kernel_size):
    check_torchvision(photo_like(61, 83), SIGMAS, kernel_size)
    check_torchvision(photo_like(64, 64), SIGMAS, kernel_size)
    check_twin(photo_like(61, 83), SIGMAS, kernel_size)


def test_wide_blurs_equal_torchvision():
    for sigma in (5.0, 12.0, 30.0):
        check_torchvision(photo_like(120, 150), [sigma], 101)


def test_a_hard_edge_and_a_single_bright_pixel_equal_torchvision():
    edge = np.zeros((40, 50, 3), np.uint8)
    edge[:, 25:] = 255
    dot = np.zeros((41, 37, 3), np.uint8)
    dot[20, 18] = dot[0, 0] = dot[40, 36] = 255
    for image in (edge, edge.transpose(1, 0, 2).copy(), dot):
        check_torchvision(image, SIGMAS, 23)


@pytest.mark.parametrize("shape", SIZES)
def test_images_smaller_than_the_kernel_are_reflected_again_and_again(shape):
    check_twin(photo_like(*shape), [0.4, 1.0, 2.0], 23)


def test_plain_images_stay_plain():
    for image in plain_images():
        assert (blurred(image, SIGMAS, 23) == image).all()


@pytest.mark.slow
def test_a_huge_image_equals_torchvision():
    check_torchvision(huge_image(), [1.7], 23)


def test_nothing_changes_without_blur():
    image = photo_like(31, 47)
    assert np.array_equal(blurred(image, [0.0], 23)[0], image)
    assert np.array_equal(blurred(image, [2.0], 1)[0], image)
    assert np.array_equal(blurred(image, [0.001], 23)[0], image)


def test_sigma_is_uniform_and_zero_where_nothing_is_blurred():
    params, raw, plan = draw_params([SimpleRGBImageDecoder(), GaussianBlur(0.3, sigma=(0.5, 1.5))])
    sigma = params["sigma"]
    assert_share(sigma > 0, 0.3)
    assert_uniform(sigma[sigma > 0], 0.5, 1.5)
    key = key_of(plan, GaussianBlur)
    twins = [reference.draw_sigma(key, 0, sample, 0, 0.3, (0.5, 1.5)) for sample in range(100)]
    np.testing.assert_allclose(raw[:100, 0], twins, rtol=0, atol=1e-12)
