"""Crops: boxes against torchvision's distribution, pixels against torch's antialiased resize."""

import numpy as np
import pytest
import reference
import torch
import torchvision.transforms.v2.functional as tv
from support.harness import (
    assert_uniform,
    draw_params,
    from_float,
    huge_image,
    key_of,
    ks_distance_of_two,
    photo_like,
    plain_images,
    run_ops,
    to_float,
    worst_difference,
)
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from ffcv_ssl.transforms import CenterCrop, RandomResizedCrop, SimpleRGBImageDecoder

INTERPOLATIONS = ["bilinear", "bicubic"]
# One rounding costs half a level; what lies above it is the arithmetic's error, torch's included.
ONE_ROUNDING = 0.51


def torch_crop(image, box, size, interpolation="bilinear"):
    top, left, height, width = (int(v) for v in box)
    mode = tv.InterpolationMode(interpolation)
    x = to_float(image)[:, :, top : top + height, left : left + width]
    return from_float(tv.resize(x, list(size), interpolation=mode, antialias=True).clamp(0, 1))


def check_boxes(image, boxes, size, interpolation):
    """The kernel's views of these boxes are torch's, up to one rounding."""
    op = RandomResizedCrop(size, interpolation=interpolation)
    views, _, _ = run_ops([op], [image] * len(boxes), raw=np.array(boxes))
    expected = [torch_crop(image, box, op.output_size, interpolation) for box in boxes]
    assert worst_difference(views, expected) <= ONE_ROUNDING


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crops_equal_torch_antialiased_resize(interpolation):
    image = photo_like(300, 400)
    rng = np.random.default_rng(1)
    boxes = [(0, 0, 300, 400), (299, 399, 1, 1), (0, 0, 1, 400), (0, 7, 300, 1), (10, 20, 224, 224)]
    for _ in range(15):
        height, width = rng.integers(1, 301), rng.integers(1, 401)
        boxes.append((rng.integers(301 - height), rng.integers(401 - width), height, width))
    check_boxes(image, boxes, 224, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (40, 1), (2, 3), (31, 57), (500, 333)])
@pytest.mark.parametrize("size", [1, (7, 5), (64, 33), (96, 224)])
def test_images_and_views_of_any_size_equal_torch(shape, size, interpolation):
    image = photo_like(*shape, seed=3)
    height, width = shape
    inner = (height // 3, width // 4, height - height // 3, width - width // 4)
    check_boxes(image, [(0, 0, height, width), inner], size, interpolation)


def test_a_huge_image_equals_torch():
    image = huge_image()
    check_boxes(image, [(0, 0, 3000, 4000), (1234, 77, 1500, 3900)], 224, "bilinear")


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_plain_images_stay_plain(interpolation):
    for image in plain_images(37, 51):
        op = RandomResizedCrop(24, interpolation=interpolation)
        views, _, _ = run_ops([op], [image] * 8)
        assert (views == image[0, 0]).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crops_equal_their_twin_on_images_of_mixed_sizes(interpolation):
    images = [photo_like(*shape, seed=i) for i, shape in enumerate([(90, 61), (1, 9), (200, 40)])]
    op = RandomResizedCrop((48, 40), interpolation=interpolation)
    views, raw, _ = run_ops([op], images)
    cubic = interpolation == "bicubic"
    twins = [
        255 * reference.resized_crop(image / 255, box, (48, 40), cubic)
        for image, box in zip(images, raw)
    ]
    assert worst_difference(views, twins) <= ONE_ROUNDING


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_boxes_of_images_decoded_at_a_fraction_are_cut_between_pixels(factor):
    image = photo_like(94, 126)
    whole = (0, 0, 94 * factor, 126 * factor)
    boxes = np.array([whole, (3, 5, 50 * factor + 1, 107 * factor - 1), (91, 121, 1, 1)])
    op = RandomResizedCrop(32)
    views, _, _ = run_ops([op], [image] * 3, raw=boxes, factors=[factor] * 3)
    twins = [255 * reference.resized_crop(image / 255, box / factor, (32, 32)) for box in boxes]
    assert worst_difference(views, twins) <= ONE_ROUNDING


def test_a_crop_of_the_views_own_size_copies_its_pixels():
    image = photo_like(120, 150)
    boxes = np.array([(0, 0, 64, 64), (56, 86, 64, 64), (13, 29, 64, 64)])
    for interpolation in INTERPOLATIONS:
        views, _, _ = run_ops(
            [RandomResizedCrop(64, interpolation=interpolation)], [image] * 3, boxes
        )
        for view, (top, left, height, width) in zip(views, boxes):
            assert np.array_equal(view, image[top : top + height, left : left + width])


def test_center_crop_is_the_central_square_resized():
    for shape in [(375, 500), (500, 333), (64, 64), (1, 1), (3, 200)]:
        image = photo_like(*shape)
        views, raw, plan = run_ops([CenterCrop(56)], [image])
        side = max(int(224 / 256 * min(shape)), 1)
        box = ((shape[0] - side) // 2, (shape[1] - side) // 2, side, side)
        assert tuple(plan.params_of(raw)["crop"][0]) == box
        assert worst_difference(views, [torch_crop(image, box, (56, 56))]) <= ONE_ROUNDING


def test_whole_images_pass_unchanged():
    for shape in [(1, 1), (5, 3), (60, 80)]:
        image = photo_like(*shape)
        views, _, _ = run_ops([SimpleRGBImageDecoder()], [image, image[::-1].copy()])
        assert np.array_equal(views[0], image) and np.array_equal(views[1], image[::-1])


def test_whole_images_keep_every_level():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(run_ops([SimpleRGBImageDecoder()], [image])[0][0], image)


SETTINGS = [
    ((0.08, 1), (3 / 4, 4 / 3), (375, 500)),
    ((0.3, 0.6), (0.5, 2), (64, 64)),
    ((0.9, 1), (3, 4), (100, 20)),
    ((0.9, 1), (0.1, 0.2), (20, 300)),
    ((1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("scale", "ratio", "shape"), SETTINGS)
def test_drawn_boxes_equal_their_twin(scale, ratio, shape):
    op = RandomResizedCrop(224, scale, ratio)
    samples = [0, 1, 2, 99, 2**32 + 5, 2**47]
    params, _, plan = draw_params([op], shape=shape, seed=7, epoch=3, samples=samples, turn=2)
    key = key_of(plan, RandomResizedCrop)
    twins = [
        reference.draw_random_crop(key, 3, sample, 2, scale, ratio, *shape) for sample in samples
    ]
    assert params["crop"].tolist() == [list(twin) for twin in twins]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (32, 32), (40, 400), (1, 1), (1, 30)])
def test_boxes_lie_inside_the_image(shape):
    boxes = draw_params([RandomResizedCrop(8)], shape=shape)[0]["crop"]
    top, left, height, width = boxes.T
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (top + height <= shape[0]).all() and (left + width <= shape[1]).all()


@pytest.mark.parametrize(("shape", "scale"), [((375, 500), (0.08, 1)), ((500, 333), (0.3, 1))])
def test_boxes_are_distributed_as_torchvisions(shape, scale):
    count = 4000
    boxes = draw_params([RandomResizedCrop(8, scale)], count, shape)[0]["crop"]
    torch.manual_seed(0)
    image = torch.empty(1, *shape)
    theirs = [TorchvisionCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    limit = 2.5 * np.sqrt(2 / count)
    for ours_of, theirs_of in zip(_features(boxes, shape), _features(np.array(theirs), shape)):
        assert ks_distance_of_two(ours_of, theirs_of) < limit
        spread = np.std(theirs_of)
        assert abs(np.mean(ours_of) - np.mean(theirs_of)) < 5 * spread * np.sqrt(2 / count)


def _features(boxes, shape):
    """Area, log of the ratio, and how far down and right of the room that a box leaves."""
    top, left, height, width = boxes.T.astype(float)
    yield height * width
    yield np.log(width / height)
    yield (top + 0.5) / (shape[0] - height + 1)
    yield (left + 0.5) / (shape[1] - width + 1)


def test_areas_and_ratios_follow_their_ranges():
    boxes = draw_params([RandomResizedCrop(8, (0.1, 0.2))], shape=(4000, 4000))[0]["crop"]
    height, width = boxes[:, 2].astype(float), boxes[:, 3].astype(float)
    assert_uniform(height * width / 4000**2, 0.1 - 1e-3, 0.2 + 1e-3)
    assert_uniform(np.log(width / height), np.log(3 / 4) - 1e-3, np.log(4 / 3) + 1e-3)


def test_ffcvs_positional_form_means_the_same():
    ours, theirs = (
        RandomResizedCrop(64, (0.2, 1), (0.5, 2)),
        RandomResizedCrop((0.2, 1), (0.5, 2), 64),
    )
    assert ours.constants() == theirs.constants() and ours.output_size == theirs.output_size
    assert RandomResizedCrop(size=(3, 4)).output_size == (3, 4)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RandomResizedCrop(0), "output_size"),
        (lambda: RandomResizedCrop(), "output_size"),
        (lambda: RandomResizedCrop((1, 2, 3)), "output_size"),
        (lambda: RandomResizedCrop(10.5), "output_size"),
        (lambda: RandomResizedCrop((10.5, 3)), "output_size"),
        (lambda: RandomResizedCrop("big"), "output_size"),
        (lambda: RandomResizedCrop(True), "output_size"),
        (lambda: RandomResizedCrop(8, (0.5, 0.1)), "scale"),
        (lambda: RandomResizedCrop(8, (0, 0)), "scale"),
        (lambda: RandomResizedCrop(8, (0.5, 1.5)), "scale"),
        (lambda: RandomResizedCrop(8, float("nan")), "scale"),
        (lambda: RandomResizedCrop(8, (0.1, float("nan"))), "scale"),
        (lambda: RandomResizedCrop(8, ratio=(0, 1)), "ratio"),
        (lambda: RandomResizedCrop(8, ratio=(2, 1)), "ratio"),
        (lambda: RandomResizedCrop(8, interpolation="area"), "interpolation"),
        (lambda: CenterCrop(8, 0), "ratio"),
        (lambda: CenterCrop(8, 1.5), "ratio"),
        (lambda: CenterCrop(8, "all"), "ratio"),
        (lambda: CenterCrop(-3), "output_size"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make, name):
    with pytest.raises(ValueError, match=name) as error:
        make()
    assert "\n" not in str(error.value) and "Crop" in str(error.value)
