"""Colour jitter: each step and every order against torchvision's functional ops on floats."""

import itertools

import numpy as np
import pytest
import reference
from support.harness import (
    SIZES,
    assert_share,
    assert_uniform,
    color_grid,
    draw_params,
    from_float,
    huge_image,
    key_of,
    photo_like,
    plain_images,
    run_ops,
    to_float,
    torchvision_jitter,
    worst_difference,
)

from ffcv_ssl.transforms import RandomColorJitter, SimpleRGBImageDecoder

ONE_ROUNDING = 0.51
OPS = [SimpleRGBImageDecoder(), RandomColorJitter(1, 10, 10, 10, 0.5)]
NONE = (1.0, 1.0, 1.0, 0.0)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def pack(order):
    return sum(step << (2 * position) for position, step in enumerate(order))


def row(factors, order=(0, 1, 2, 3), applied=1.0):
    return [applied, *factors, pack(order)]


def only(step, factor):
    factors = list(NONE)
    factors[step] = factor
    return row(factors)


def jittered(image, rows):
    """(views, what torchvision makes of the same parameters, twins), all of one image."""
    views, raw, plan = run_ops(OPS, [image] * len(rows), np.array(rows, np.float64))
    jitters = plan.params_of(raw)["jitter"]
    theirs = [from_float(torchvision_jitter(to_float(image), jitter)) for jitter in jitters]
    twins = [
        255
        * reference.color_jitter(
            image / 255, *(float(jitter[n]) for n in jitter.dtype.names[1:5]), jitter["order"]
        )
        for jitter in jitters
    ]
    return views, theirs, twins


def check_rows(image, rows):
    views, theirs, twins = jittered(image, rows)
    assert worst_difference(views, theirs) <= ONE_ROUNDING
    assert worst_difference(views, twins) <= ONE_ROUNDING


@pytest.mark.parametrize("step", [BRIGHTNESS, CONTRAST, SATURATION])
def test_each_factor_equals_torchvision(step):
    rows = [only(step, factor) for factor in (0, 0.2, 0.6, 0.999, 1, 1.4, 1.8, 11)]
    check_rows(color_grid(), rows)
    check_rows(photo_like(61, 83), rows)


def test_hue_equals_torchvision():
    turns = [-0.5, -0.37, -0.2, -1 / 6, -0.01, 1e-4, 0.1, 1 / 3, 0.49, 0.5]
    rows = [only(HUE, turn) for turn in turns]
    check_rows(color_grid(), rows)
    check_rows(photo_like(61, 83), rows)


def test_every_order_equals_torchvision():
    rows = [row((1.4, 0.5, 1.7, 0.13), order) for order in itertools.permutations(range(4))]
    check_rows(photo_like(48, 56), rows)


def test_random_factors_and_orders_equal_torchvision():
    image = photo_like(96, 96, seed=5)
    _, raw, _ = draw_params([OPS[0], RandomColorJitter(1, 0.8, 0.8, 0.8, 0.2)], 64, (96, 96))
    check_rows(image, raw)


@pytest.mark.parametrize("shape", SIZES)
def test_images_of_any_size_equal_torchvision(shape):
    rows = [row((0.7, 1.3, 0.8, 0.1), (3, 1, 0, 2)), row((1.2, 0.7, 1.5, -0.2), (2, 0, 3, 1))]
    check_rows(photo_like(*shape), rows)


def test_plain_images_equal_torchvision():
    rows = [row((0.7, 1.3, 0.8, 0.1), (3, 1, 0, 2)), row((1.9, 0, 1.5, -0.2)), only(HUE, 0.3)]
    for image in plain_images():
        check_rows(image, rows)


@pytest.mark.slow
def test_a_huge_image_equals_torchvision():
    check_rows(huge_image(), [row((0.8, 1.6, 1.3, 0.05), (1, 3, 0, 2))])


def test_nothing_changes_without_strength_or_when_not_applied():
    for image in [color_grid(), photo_like(31, 47)]:
        rows = [row(NONE), row(NONE, (3, 2, 1, 0)), row((0, 9, 4, 0.5), applied=0.0)]
        views, _, _ = run_ops(OPS, [image] * 3, np.array(rows))
        assert all(np.array_equal(view, image) for view in views)


def test_strength_zero_draws_factors_of_one():
    jitter = draw_params([OPS[0], RandomColorJitter(1, 0, 0, 0, 0)], 100)[0]["jitter"]
    for name, neutral in zip(("brightness", "contrast", "saturation", "hue"), NONE):
        assert (jitter[name] == neutral).all()


def test_factors_are_uniform_in_their_ranges():
    ops = [OPS[0], RandomColorJitter(0.3, 0.4, 1.5, 0.2, 0.1)]
    jitter = draw_params(ops)[0]["jitter"]
    assert_share(jitter["applied"], 0.3)
    assert_uniform(jitter["brightness"], 0.6, 1.4 + 1e-6)
    assert_uniform(jitter["contrast"], 0, 2.5)
    assert_uniform(jitter["saturation"], 0.8 - 1e-6, 1.2 + 1e-6)
    assert_uniform(jitter["hue"], -0.1 - 1e-6, 0.1 + 1e-6)
    assert_uniform(jitter["hue"][jitter["applied"]], -0.1 - 1e-6, 0.1 + 1e-6)


def test_factors_are_drawn_independently():
    jitter = draw_params([OPS[0], RandomColorJitter(0.5, 0.4, 0.4, 0.2, 0.1)])[0]["jitter"]
    names = ("applied", "brightness", "contrast", "saturation", "hue")
    columns = np.stack([jitter[name].astype(float) for name in names] + [jitter["order"][:, 0]])
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5 / np.sqrt(columns.shape[1])


def test_every_order_is_equally_likely():
    order = draw_params([OPS[0], RandomColorJitter()], 24 * 400)[0]["jitter"]["order"]
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 400) ** 2 / 400).sum() < 65  # chi-square, 23 degrees: 1 in 100,000


def test_draws_equal_their_twin():
    strengths = (0.4, 1.3, 0.2, 0.1)
    ops = [OPS[0], RandomColorJitter(0.8, *strengths)]
    params, raw, plan = draw_params(ops, 300, seed=11, epoch=5)
    key = key_of(plan, RandomColorJitter)
    for sample in range(300):
        twin = reference.draw_jitter(key, 5, sample, 0, 0.8, strengths)
        assert bool(raw[sample, 0]) == twin[0]
        np.testing.assert_allclose(raw[sample, 1:5], twin[1:5], rtol=0, atol=1e-12)
        assert params["jitter"]["order"][sample].tolist() == twin[5]
