"""Gaussian noise: its twin number by number, its distribution, and its independence."""

import math

import numpy as np
import pytest
import reference
from support.harness import (
    SIZES,
    assert_share,
    color_grid,
    draw_params,
    key_of,
    ks_distance,
    photo_like,
    run_ops,
    worst_difference,
)

from ffcv_ssl.transforms import GaussianNoise, SimpleRGBImageDecoder


def noisy(image, std, keys):
    ops = [SimpleRGBImageDecoder(), GaussianNoise(std)]
    return run_ops(ops, [image] * len(keys), np.array(keys, np.float64)[:, None])[0]


@pytest.mark.parametrize("shape", SIZES[:-1])
def test_noise_equals_its_twin(shape):
    image = photo_like(*shape)
    keys = [1, 123456789, 2**48 - 1]
    twins = [255 * reference.gaussian_noise(image / 255, 0.1, key) for key in keys]
    assert worst_difference(noisy(image, 0.1, keys), twins) <= 0.51


def test_noise_is_normal_with_the_std_asked_for():
    std, grey = 0.1, np.full((256, 256, 3), 128, np.uint8)
    (view,) = noisy(grey, std, [42])
    values = (view.astype(float) - 128) / 255 / std
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * values.size)
    rng = np.random.default_rng(0)
    smooth = values.ravel() + rng.uniform(-0.5, 0.5, values.size) / 255 / std  # undo the rounding
    normal = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))
    assert ks_distance(smooth[::4], normal) < 2.5 / math.sqrt(smooth.size / 4)


def test_neighbours_channels_and_keys_have_unrelated_noise():
    grey = np.full((128, 128, 3), 128, np.uint8)
    first, second = noisy(grey, 0.1, [5, 6]).astype(float)
    limit = 5 / math.sqrt(128 * 128)
    pairs = [
        (first[..., 0], first[..., 1]),
        (first[:, 1:, 0], first[:, :-1, 0]),
        (first[1:, :, 0], first[:-1, :, 0]),
        (first, second),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit


def test_values_are_clamped_not_wrapped():
    for level in (0, 255):
        (view,) = noisy(np.full((64, 64, 3), level, np.uint8), 0.3, [9])
        share = (view == level).mean()
        assert 0.45 < share < 0.55


def test_std_zero_or_no_key_changes_nothing():
    image = color_grid()
    assert np.array_equal(noisy(image, 0.0, [7])[0], image)
    assert np.array_equal(noisy(image, 0.5, [0])[0], image)


def test_keys_equal_their_twin_and_come_with_their_probability():
    ops = [SimpleRGBImageDecoder(), GaussianNoise(0.1, 0.4)]
    params, _, plan = draw_params(ops, seed=3, epoch=9)
    key = key_of(plan, GaussianNoise)
    assert_share(params["noise"] != 0, 0.4)
    twins = [reference.draw_noise_key(key, 9, sample, 0, 0.4) for sample in range(100)]
    assert params["noise"][:100].tolist() == twins
    used = params["noise"][params["noise"] != 0]
    assert len(np.unique(used)) == len(used)
