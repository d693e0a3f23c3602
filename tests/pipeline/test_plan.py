"""View plans: independent draws, links, segments, and the parameters that users see."""

import itertools

import numpy as np
import pytest
import torch
from support.harness import draw_params, photo_like, run_ops

from ffcv_ssl.pipeline.allocation_query import AllocationQuery
from ffcv_ssl.pipeline.operation import Operation
from ffcv_ssl.pipeline.plan import ViewPlan, resolve_links
from ffcv_ssl.transforms import (
    CenterCrop,
    GaussianBlur,
    GaussianNoise,
    NormalizeImage,
    RandomColorJitter,
    RandomEqualize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarization,
    SimpleRGBImageDecoder,
    ToTensor,
    ToTorchImage,
)

SHAPE = (60, 80)
RANDOM_OPS = [
    RandomResizedCrop(32),
    RandomHorizontalFlip(0.5),
    RandomColorJitter(0.5),
    RandomGrayscale(0.5),
    GaussianBlur(0.5),
    RandomSolarization(0.5),
    RandomEqualize(0.5),
    GaussianNoise(0.1, 0.5),
]


def plan_of(ops, name="view_0", view=0, seed=0, shape=SHAPE, field="image"):
    return ViewPlan(name, field, view, ops, seed, shape)


def draw_all(plans, count=64, epoch=0):
    """Raw draws by view name, links taken over."""
    resolve_links(plans)
    raws = {}
    for plan in plans:
        raws[plan.name] = np.full((count, plan.num_columns), np.nan)
        sizes = np.full(count, SHAPE[0]), np.full(count, SHAPE[1])
        for segment in plan.segments:
            turns = np.zeros(count, np.int64)
            segment.draw(epoch, np.arange(count), turns, *sizes, raws[plan.name])
    for plan in plans:
        plan.copy_links(raws)
    return raws


def columns_of(ops, **settings):
    """Raw draws of 64 samples by op class name."""
    _, raw, plan = draw_params(ops, 64, SHAPE, **settings)
    return {(type(p.op).__name__, p.occurrence): raw[:, p.columns] for p in plan.placed}


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"samples": np.arange(64) + 64}, {"turn": 1}],
    ids=lambda change: next(iter(change)),
)
def test_seed_epoch_view_sample_and_occurrence_each_change_every_ops_draws(change):
    before, after = columns_of(RANDOM_OPS), columns_of(RANDOM_OPS, **change)
    for name in before:
        assert not np.array_equal(before[name], after[name]), name
    assert columns_of(RANDOM_OPS).keys() == before.keys()
    assert all(np.array_equal(v, before[k]) for k, v in columns_of(RANDOM_OPS).items())


def test_ops_of_a_view_draw_unrelated_numbers():
    switches = [op for op in RANDOM_OPS if not isinstance(op, RandomResizedCrop)]
    _, raw, plan = draw_params([RANDOM_OPS[0], *switches, *switches], 4096, SHAPE)
    on = np.stack([raw[:, p.first_column] != 0 for p in plan.placed[1:]]).astype(float)
    correlations = np.corrcoef(on) - np.eye(len(on))
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)


def test_views_epochs_and_samples_draw_unrelated_numbers():
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip()]
    names = [{"view": view, "epoch": epoch} for view in range(3) for epoch in range(3)]
    flips = [draw_params(ops, 4096, **name)[0]["flip"].astype(float) for name in names]
    flips.append(np.roll(flips[0], 1))
    correlations = np.corrcoef(flips) - np.eye(len(flips))
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)


def test_adding_or_moving_an_op_changes_no_other_draw():
    few = columns_of([RANDOM_OPS[0], RANDOM_OPS[4]])
    for ops in (RANDOM_OPS, [RANDOM_OPS[0], *RANDOM_OPS[:0:-1]]):
        many = columns_of(ops)
        for name, columns in few.items():
            assert np.array_equal(columns, many[name])


def test_draws_depend_on_the_views_index_not_on_its_name_or_its_neighbours():
    alone = draw_all([plan_of(RANDOM_OPS, "a", 1)])["a"]
    beside = draw_all([plan_of(RANDOM_OPS, "x", 0), plan_of(RANDOM_OPS, "b", 1)])["b"]
    assert np.array_equal(alone, beside)


def test_settings_change_what_is_drawn_with_the_same_numbers():
    low = columns_of([SimpleRGBImageDecoder(), RandomGrayscale(0.2)])["RandomGrayscale", 0]
    high = columns_of([SimpleRGBImageDecoder(), RandomGrayscale(0.7)])["RandomGrayscale", 0]
    assert (high >= low).all() and high.sum() > low.sum()


def test_an_own_seed_gives_an_own_stream_whatever_the_loaders_seed():
    def flips(own, seed):
        ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(seed=own)]
        return columns_of(ops, seed=seed)["RandomHorizontalFlip", 0].ravel().tolist()

    assert flips(5, 0) == flips(5, 1) == flips(None, 5)
    assert flips(5, 0) != flips(6, 0)
    assert flips(5, 0) != flips(None, 0)
    assert flips(0, 7) == flips(None, 0)  # 0 is a seed too


def test_two_of_the_same_op_draw_on_their_own_and_have_columns_of_their_own():
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomHorizontalFlip()]
    params, _, _ = draw_params(ops, 200)
    assert params.dtype.names == ("flip", "flip_1")
    assert (params["flip"] != params["flip_1"]).any()


def test_one_crop_for_two_views_and_all_else_apart():
    ops = [RandomHorizontalFlip(), RandomColorJitter()]
    plans = [
        plan_of([RandomResizedCrop(32), *ops], "view_0", 0),
        plan_of([RandomResizedCrop(16, link="view_0"), *ops], "view_1", 1),
    ]
    raws = draw_all(plans)
    params = [plan.params_of(raws[plan.name]) for plan in plans]
    assert np.array_equal(params[0]["crop"], params[1]["crop"])
    assert not np.array_equal(params[0]["flip"], params[1]["flip"])
    assert not np.array_equal(params[0]["jitter"], params[1]["jitter"])


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([("view_0", [RandomResizedCrop(8, link="view_9")])], "no such view"),
        (
            [("view_0", [CenterCrop(8)]), ("view_1", [RandomResizedCrop(8, link="view_0")])],
            "has no such op",
        ),
        (
            [
                ("view_0", [RandomResizedCrop(8, link="view_1")]),
                ("view_1", [RandomResizedCrop(8, link="view_0")]),
            ],
            "circle",
        ),
        ([("view_0", [RandomResizedCrop(8, link="view_0")])], "circle"),
    ],
)
def test_links_to_nothing_are_refused_in_one_line(plans, message):
    built = [plan_of(ops, name, i) for i, (name, ops) in enumerate(plans)]
    with pytest.raises(ValueError, match=message) as error:
        resolve_links(built)
    assert "\n" not in str(error.value)


def test_a_link_to_a_view_of_another_field_is_refused():
    plans = [
        plan_of([RandomResizedCrop(8)], "view_0", field="left"),
        plan_of([RandomResizedCrop(8, link="view_0")], "view_1", field="right"),
    ]
    with pytest.raises(ValueError, match="no such view of this field"):
        resolve_links(plans)


def test_ops_before_tensor_ops_are_rendered_and_the_rest_is_left_to_the_consumer():
    normalize = NormalizeImage([0, 0, 0], [1, 1, 1])
    plan = plan_of(
        [RandomResizedCrop(8), RandomHorizontalFlip(), ToTensor(), ToTorchImage(), normalize]
    )
    assert len(plan.segments) == 1 and len(plan.tail) == 3
    assert normalize.channels_first


def test_images_of_mixed_sizes_need_a_crop_first():
    for ops in ([], [RandomHorizontalFlip()], [SimpleRGBImageDecoder()]):
        with pytest.raises(ValueError, match=r"view_0.*first op must be a crop"):
            plan_of(ops, shape=None)
    assert plan_of([CenterCrop(8)], shape=None).segments[0].shape == (8, 8)


def test_no_ops_at_all_mean_the_whole_image():
    plan = plan_of([])
    assert [type(p.op) for p in plan.placed] == [SimpleRGBImageDecoder]
    assert plan.segments[0].shape == SHAPE and plan.num_columns == 0


@pytest.mark.parametrize("ops", [[ToTensor(), RandomHorizontalFlip()], [3, RandomHorizontalFlip()]])
def test_ops_at_a_wrong_place_are_refused_in_one_line(ops):
    with pytest.raises(ValueError, match="view_0") as error:
        plan_of(ops)
    assert "\n" not in str(error.value)


def run_segments(plan, images):
    """Views of images of one size through all segments and the code between them."""
    count = len(images)
    raw = np.zeros((count, plan.num_columns))
    height, width = images.shape[1:3]
    batch = np.ascontiguousarray(images)
    for segment, calls in zip(plan.segments, plan.between):
        sizes = np.full(count, height), np.full(count, width)
        segment.draw(0, np.arange(count), np.zeros(count, np.int64), *sizes, raw)
        needed = segment.scratch_floats((height, width))
        out = np.empty((count, *segment.shape, 3), np.uint8)
        segment.render_batch(raw, batch, np.empty(needed, np.float32), out)
        batch = out
        for call in calls:
            batch = call.run(batch, np.arange(count))
        height, width = batch.shape[1:3]
    return batch


class Invert(Operation):
    """An FFCV-style operation with memory of its own."""

    def generate_code(self):
        def invert(batch, destination):
            destination[:] = 255 - batch
            return destination

        return invert

    def declare_state_and_memory(self, previous_state):
        return previous_state, AllocationQuery(previous_state.shape, np.dtype("u1"))


IMAGES = np.stack([photo_like(*SHAPE, seed=i) for i in range(5)])


@pytest.mark.parametrize("between", [Invert(), lambda batch: 255 - batch])
def test_whole_batch_code_stands_between_two_image_ops(between):
    flip, crop = RandomHorizontalFlip(1), RandomResizedCrop(16)
    plan = plan_of([crop, between, flip])
    assert len(plan.segments) == 2
    plain = run_segments(plan_of([crop]), IMAGES)
    assert np.array_equal(run_segments(plan, IMAGES), 255 - plain[:, :, ::-1])


def test_a_torch_function_may_stand_between_image_ops():
    def half(batch):
        return (torch.from_numpy(batch) // 2).numpy()

    plan = plan_of([SimpleRGBImageDecoder(), half, RandomGrayscale(0)])
    assert np.array_equal(run_segments(plan, IMAGES), IMAGES // 2)


def test_a_second_crop_starts_from_the_first_ones_view():
    plan = plan_of([RandomResizedCrop(40), RandomHorizontalFlip(), CenterCrop(16, 0.5)])
    assert [segment.shape for segment in plan.segments] == [(40, 40), (16, 16)]
    first = run_segments(plan_of([RandomResizedCrop(40), RandomHorizontalFlip()]), IMAGES)
    expected, _, _ = run_ops([CenterCrop(16, 0.5)], list(first))
    assert np.array_equal(run_segments(plan, IMAGES), expected)


def test_a_flip_is_folded_only_right_behind_the_first_op():
    for ops in itertools.permutations([RandomHorizontalFlip(1), RandomGrayscale(0)]):
        plan = plan_of([SimpleRGBImageDecoder(), *ops])
        assert np.array_equal(run_segments(plan, IMAGES), IMAGES[:, :, ::-1])


def test_parameters_have_the_documented_columns():
    params, _, _ = draw_params(RANDOM_OPS, 3, SHAPE)
    names = ("crop", "flip", "jitter", "gray", "sigma", "solarize", "equalize", "noise")
    assert params.dtype.names == names
    jitter = ("applied", "brightness", "contrast", "saturation", "hue", "order")
    assert params["jitter"].dtype.names == jitter
    assert params["crop"].shape == (3, 4) and params["crop"].dtype == np.int32


def test_a_linked_switch_draws_nothing_of_its_own():
    plans = [
        plan_of([SimpleRGBImageDecoder(), RandomGrayscale(1)], "view_0", 0),
        plan_of([SimpleRGBImageDecoder(), RandomGrayscale(0, link="view_0")], "view_1", 1),
    ]
    raws = draw_all(plans)
    assert (raws["view_1"] == 1).all()
