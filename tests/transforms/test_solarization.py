"""Solarization: exact against PIL on bytes, and against torchvision on floats."""

import numpy as np
import pytest
import reference
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps
from support.harness import (
    SIZES,
    assert_share,
    color_grid,
    draw_params,
    from_float,
    key_of,
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


@pytest.mark.parametrize("probability", [0, 0.2, 1])
def test_solarized_views_come_with_their_probability(probability):
    params, _, plan = draw_params([SimpleRGBImageDecoder(), RandomSolarization(probability)])
    assert_share(params["solarize"], probability)
    key = key_of(plan, RandomSolarization)
    twins = [reference.draw_switch(key, 0, sample, 0, probability) for sample in range(50)]
    assert params["solarize"][:50].tolist() == twins


@pytest.mark.parametrize(
    ("name", "value"),
    [("solarization_prob", -0.2), ("threshold", -1), ("threshold", 300), ("threshold", "half")],
)
def test_wrong_settings_are_refused_in_one_line(name, value):
    with pytest.raises(ValueError, match=f"RandomSolarization: {name} is") as error:
        RandomSolarization(**{name: value})
    assert "\n" not in str(error.value)
