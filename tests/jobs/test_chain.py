"""Whole views against torchvision's functional ops in float, with the same drawn parameters."""

import numpy as np
import pytest
import reference
import torch
import torchvision.transforms.v2.functional as tv
from support.harness import (
    from_float,
    photo_like,
    photographs,
    plain_images,
    run_ops,
    to_float,
    torchvision_jitter,
)

from ffcv_ssl.transforms import (
    GaussianBlur,
    GaussianNoise,
    RandomColorJitter,
    RandomEqualize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarization,
)

CHAINS = {
    "ffcv_ssl": [
        RandomResizedCrop(224),
        RandomHorizontalFlip(),
        RandomColorJitter(),
        RandomGrayscale(),
        GaussianBlur(1),
        RandomSolarization(),
    ],
    "simclr": [
        RandomResizedCrop(224),
        RandomHorizontalFlip(),
        RandomColorJitter(0.8, 0.8, 0.8, 0.8, 0.2),
        RandomGrayscale(),
        GaussianBlur(),
    ],
    "solarized": [
        RandomResizedCrop(96, (0.05, 0.3), interpolation="bicubic"),
        RandomHorizontalFlip(),
        RandomColorJitter(1),
        RandomGrayscale(0.5),
        GaussianBlur(0.5, 9),
        RandomSolarization(1, 128),
    ],
    "small": [
        RandomResizedCrop(32, (0.5, 1)),
        RandomHorizontalFlip(),
        RandomColorJitter(0.8, 0.4, 0.4, 0.4, 0.1),
        RandomSolarization(),
        RandomEqualize(),
    ],
}


def torchvision_view(image, ops, params):
    """(float (H, W, 3) in levels, where a value lay within a level of the solarize threshold)."""
    top, left, height, width = (int(v) for v in params["crop"])
    mode = tv.InterpolationMode(ops[0].interpolation)
    x = to_float(image)[:, :, top : top + height, left : left + width]
    x = tv.resize(x, list(ops[0].output_size), interpolation=mode, antialias=True).clamp(0, 1)
    near = torch.zeros_like(x, dtype=torch.bool)
    for op in ops[1:]:
        if isinstance(op, RandomHorizontalFlip) and params["flip"]:
            x = tv.horizontal_flip(x)
        elif isinstance(op, RandomColorJitter) and params["jitter"]["applied"]:
            x = torchvision_jitter(x, params["jitter"])
        elif isinstance(op, RandomGrayscale) and params["gray"]:
            x = tv.rgb_to_grayscale(x, 3)
        elif isinstance(op, GaussianBlur) and params["sigma"]:
            x = tv.gaussian_blur(x, [op.kernel_size] * 2, [float(params["sigma"])] * 2)
        elif isinstance(op, RandomSolarization) and params["solarize"]:
            near = (x - op.threshold / 255).abs() < 1 / 255
            x = tv.solarize(x, op.threshold / 255)
        elif isinstance(op, RandomEqualize) and params["equalize"]:
            x = tv.equalize(x)
    return from_float(x), near[0].permute(1, 2, 0).numpy()


def check_chain(name, images, seed=0):
    """Every view's mean error is at most half a level, and 99.9 % of its values are within two."""
    ops = CHAINS[name]
    views, raw, plan = run_ops(ops, images, seed=seed)
    for image, view, params in zip(images, views, plan.params_of(raw)):
        expected, near = torchvision_view(image, ops, params)
        error = np.abs(view - expected)[~near]
        assert error.size > view.size / 2
        assert error.mean() <= 0.5, params
        assert (error <= 2).mean() >= 0.999, params


@pytest.mark.parametrize("name", CHAINS)
def test_views_of_generated_images_equal_torchvision(name):
    shapes = [(375, 500), (500, 333), (224, 224), (100, 90), (37, 400)] * 2
    check_chain(name, [photo_like(*shape, seed=i) for i, shape in enumerate(shapes)], seed=1)


@pytest.mark.parametrize("name", CHAINS)
def test_views_of_photographs_equal_torchvision(name, data_folder):
    check_chain(name, photographs(data_folder, 8))


@pytest.mark.parametrize("name", ["ffcv_ssl", "simclr"])
def test_views_of_tiny_and_plain_images_equal_torchvision(name):
    tiny = [photo_like(*shape) for shape in [(1, 1), (1, 20), (20, 1), (3, 2)]]
    check_chain(name, tiny + plain_images())


def test_a_view_equals_its_twins_one_after_the_other():
    image, ops = photo_like(200, 180), CHAINS["ffcv_ssl"]
    views, raw, plan = run_ops(ops, [image] * 6, seed=4)
    for view, params in zip(views, plan.params_of(raw)):
        twin = reference.resized_crop(image / 255, params["crop"], (224, 224))
        twin = reference.flip(twin) if params["flip"] else twin
        jitter = params["jitter"]
        if jitter["applied"]:
            factors = (float(jitter[name]) for name in jitter.dtype.names[1:5])
            twin = reference.color_jitter(twin, *factors, jitter["order"])
        twin = reference.grayscale(twin) if params["gray"] else twin
        twin = reference.gaussian_blur(twin, params["sigma"], 23)
        near = np.zeros(view.shape, bool)
        if params["solarize"]:
            near = np.abs(twin - 128 / 255) < 1 / 255
            twin = reference.solarize(twin, 128)
        assert np.abs(view - 255 * twin)[~near].max() <= 0.6


def test_a_view_does_not_depend_on_the_images_beside_it():
    images = [photo_like(*shape, seed=i) for i, shape in enumerate([(90, 70), (50, 120), (64, 64)])]
    together, _, _ = run_ops(CHAINS["ffcv_ssl"], images, samples=np.array([5, 9, 2]))
    for i, sample in enumerate([5, 9, 2]):
        alone, _, _ = run_ops(CHAINS["ffcv_ssl"], [images[i]], samples=np.array([sample]))
        assert np.array_equal(alone[0], together[i])


def test_a_view_does_not_depend_on_where_its_buffers_lie():
    images = [photo_like(90, 70), photo_like(61, 83, seed=1)]
    ops = [*CHAINS["ffcv_ssl"], RandomEqualize(0.5), GaussianNoise(0.05, 0.5)]
    views = [run_ops(ops, images * 4, shift=shift)[0] for shift in (0, 1, 3, 7, 16)]
    assert all(np.array_equal(views[0], other) for other in views[1:])
