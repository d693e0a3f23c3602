"""What all image ops have in common, one table: identity, draws and twins, links, seeds, settings.

What is particular to one op (its pixels against torchvision or PIL) is in the op's own file.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import reference
from support.harness import assert_share, color_grid, draw_params, key_of, photo_like, run_ops

from ffcv_ssl import transforms as T
from ffcv_ssl.pipeline.plan import ViewPlan, resolve_links
from ffcv_ssl.transforms import BUILT_IN_OPS, SimpleRGBImageDecoder

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Case:
    """One op that acts by chance: how to make it, what it draws, and what it refuses.

    make: probability, settings -> op. column: its column; acts: its values -> whether it acted.
    twin: (key, epoch, sample, occurrence, probability) -> the column's value. render: (image in
    [0, 1], row of parameters) -> image. wrong: (setting, value) that it refuses. tolerance: levels.
    """

    make: Callable
    column: str
    twin: Callable
    render: Callable
    wrong: list
    acts: Callable = lambda values: values != 0
    tolerance: float = 0.51


def _switch(make, column, render, setting):
    wrong = [(setting, value) for value in (-0.1, -1, 1.1, 2, NAN, "often", "never", None)]
    return Case(make, column, reference.draw_switch, lambda image, row: render(image), wrong)


def _jitter_twin(key, epoch, sample, occurrence, probability):
    strengths = (0.4, 0.4, 0.2, 0.1)
    return reference.draw_jitter(key, epoch, sample, occurrence, probability, strengths)


def _jitter(image, row):
    jitter = row["jitter"]
    factors = (float(jitter[name]) for name in ("brightness", "contrast", "saturation", "hue"))
    return reference.color_jitter(image, *factors, jitter["order"])


CASES = {
    "RandomHorizontalFlip": _switch(
        lambda p, **s: T.RandomHorizontalFlip(**{"flip_prob": p, **s}),
        "flip",
        reference.flip,
        "flip_prob",
    ),
    "RandomGrayscale": _switch(
        lambda p, **s: T.RandomGrayscale(**{"gray_prob": p, **s}),
        "gray",
        reference.grayscale,
        "gray_prob",
    ),
    "RandomEqualize": _switch(
        lambda p, **s: T.RandomEqualize(**{"prob": p, **s}), "equalize", reference.equalize, "prob"
    ),
    "RandomSolarization": Case(
        lambda p, **s: T.RandomSolarization(**{"solarization_prob": p, **s}),
        "solarize",
        reference.draw_switch,
        lambda image, row: reference.solarize(image, 128),
        [
            ("solarization_prob", -0.2),
            ("threshold", -1),
            ("threshold", 300),
            ("threshold", "half"),
        ],
    ),
    "RandomColorJitter": Case(
        lambda p, **s: T.RandomColorJitter(**{"jitter_prob": p, **s}),
        "jitter",
        _jitter_twin,
        _jitter,
        [
            ("jitter_prob", 1.5),
            ("brightness", -0.1),
            ("contrast", NAN),
            ("contrast", float("inf")),
            ("saturation", "strong"),
            ("saturation", None),
            ("hue", 0.51),
            ("hue", -0.1),
            ("hue", "red"),
        ],
        acts=lambda values: values["applied"],
    ),
    "GaussianBlur": Case(
        lambda p, **s: T.GaussianBlur(**{"blur_prob": p, "kernel_size": 9, **s}),
        "sigma",
        lambda *draw: reference.draw_sigma(*draw, (0.1, 2)),
        lambda image, row: reference.gaussian_blur(image, float(row["sigma"]), 9),
        [
            ("blur_prob", 1.5),
            ("kernel_size", 22),
            ("kernel_size", 0),
            ("kernel_size", 3.5),
            ("kernel_size", "wide"),
            ("kernel_size", None),
            ("sigma", (2, 1)),
            ("sigma", (0, 1)),
            ("sigma", 1.0),
        ],
        tolerance=0.6,  # light taps are left out
    ),
    "GaussianNoise": Case(
        lambda p, **s: T.GaussianNoise(**{"std": 0.1, "prob": p, **s}),
        "noise",
        reference.draw_noise_key,
        lambda image, row: reference.gaussian_noise(image, 0.1, int(row["noise"])),
        [("std", -0.1), ("std", NAN), ("std", "loud"), ("prob", 1.01)],
    ),
}
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def test_every_built_in_op_that_acts_by_chance_is_in_the_table():
    names = {op.__name__ for op in BUILT_IN_OPS if op.apply is not None and op.random}
    assert names == set(CASES)


@every_op
def test_probability_zero_changes_nothing(case):
    for image in (color_grid(), photo_like(31, 47)):
        ops = [SimpleRGBImageDecoder(), case.make(0)]
        (view,), raw, plan = run_ops(ops, [image])
        assert np.array_equal(view, image)
        assert not case.acts(plan.params_of(raw)[case.column])[0]


@every_op
def test_parameters_say_what_was_done(case):
    """A view with `applied` off is the image; one with it on is the twin's, by those parameters."""
    images = [photo_like(20, 27, seed=i) for i in range(12)]
    ops = [SimpleRGBImageDecoder(), case.make(0.5)]
    views, raw, plan = run_ops(ops, images, seed=4)
    params = plan.params_of(raw)
    acted = case.acts(params[case.column])
    assert 0 < acted.sum() < len(images)
    for view, image, row, on in zip(views, images, params, acted):
        expected = 255 * case.render(image / 255, row) if on else image
        assert np.abs(view - expected).max() <= (case.tolerance if on else 0)


@every_op
@pytest.mark.parametrize("chance", [0, 0.2, 0.5, 1])
def test_an_op_acts_with_its_probability(case, chance):
    params, _, _ = draw_params([SimpleRGBImageDecoder(), case.make(chance)])
    assert_share(case.acts(params[case.column]), chance)


@every_op
def test_draws_equal_their_twin(case):
    ops = [SimpleRGBImageDecoder(), case.make(0.6)]
    params, _, plan = draw_params(ops, 100, seed=11, epoch=5, turn=2)
    key = key_of(plan, type(ops[1]))
    assert params.dtype[case.column] == np.dtype(dict(type(ops[1]).columns)[case.column])
    for sample, drawn in enumerate(params[case.column]):
        twin = case.twin(key, 5, sample, 2, 0.6)
        if drawn.dtype.names:
            values = [np.asarray(drawn[name], float) for name in drawn.dtype.names]
            for value, other in zip(values, twin):
                np.testing.assert_allclose(value, np.asarray(other, float), rtol=1e-6, atol=1e-7)
        else:
            assert float(drawn) == pytest.approx(float(twin), rel=1e-6)


@every_op
def test_the_same_seed_gives_the_same_draws_and_pixels(case):
    images = [photo_like(9, 14, seed=i) for i in range(6)]
    ops = [SimpleRGBImageDecoder(), case.make(0.5)]
    first, again = run_ops(ops, images, seed=2), run_ops(ops, images, seed=2)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], run_ops(ops, images, seed=3)[1])


@every_op
def test_an_ops_seed_replaces_the_loaders(case):
    def raw(own, seed):
        return draw_params([SimpleRGBImageDecoder(), case.make(0.5, seed=own)], 64, seed=seed)[1]

    assert np.array_equal(raw(5, 0), raw(5, 1)) and np.array_equal(raw(5, 0), raw(None, 5))
    assert not np.array_equal(raw(5, 0), raw(6, 0))


RANDOM_CROP = lambda p, **settings: T.RandomResizedCrop(32, **settings)  # noqa: E731


@pytest.mark.parametrize(
    "make",
    [RANDOM_CROP, *(case.make for case in CASES.values())],
    ids=["RandomResizedCrop", *CASES],
)
def test_a_linked_op_takes_over_the_other_views_draw(make):
    links = (None, "view_0", None, "view_1")
    first = [] if make is RANDOM_CROP else [SimpleRGBImageDecoder()]
    plans = [
        ViewPlan(f"view_{i}", "image", i, [*first, make(0.5, link=link)], 0, (60, 80))
        for i, link in enumerate(links)
    ]
    resolve_links(plans)
    raws = {plan.name: np.full((64, plan.num_columns), np.nan) for plan in plans}
    sizes, nothing = (np.full(64, 60), np.full(64, 80)), np.zeros(64, np.int64)
    for plan in plans:
        plan.segments[0].draw(0, np.arange(64), nothing, *sizes, raws[plan.name])
    for plan in plans:
        plan.copy_links(raws)
    assert np.array_equal(raws["view_0"], raws["view_1"])
    assert np.array_equal(raws["view_0"], raws["view_3"])  # through another link
    assert not np.array_equal(raws["view_0"], raws["view_2"])


WRONG = [(name, *pair) for name, case in CASES.items() for pair in case.wrong]


@pytest.mark.parametrize(("op", "setting", "value"), WRONG)
def test_wrong_settings_are_refused_in_one_line(op, setting, value):
    with pytest.raises(ValueError, match=f"{op}: {setting} is") as error:
        CASES[op].make(0.5, **{setting: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("op", "setting", "value"), WRONG)
def test_settings_changed_later_are_checked_anew(op, setting, value):
    changed = CASES[op].make(0.5)
    setattr(changed, setting, value)
    with pytest.raises(ValueError, match=setting):
        run_ops([SimpleRGBImageDecoder(), changed], [photo_like(4, 4)])
