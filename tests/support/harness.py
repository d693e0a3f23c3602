"""Run image ops on arrays without a file: what the op tests have in common."""

import functools
import io
import tarfile

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image

from ffcv_ssl.pipeline.plan import ViewPlan

SIZES = [(1, 1), (1, 7), (9, 1), (2, 2), (5, 3), (33, 17), (64, 64), (97, 130)]


def run_ops(ops, images, raw=None, seed=0, epoch=0, samples=None, factors=None, shift=0):
    """Views of `images` by `ops`: (uint8 (N, H, W, 3), raw draws (N, K), the plan).

    images: list of uint8 (H, W, 3). raw: parameters to use instead of drawing them. factors: (N,),
    raw's boxes refer to images so many times larger. shift: of all buffers in memory, in elements.
    """
    count = len(images)
    shapes = {image.shape[:2] for image in images}
    plan = ViewPlan("view_0", "image", 0, ops, seed, shapes.pop() if len(shapes) == 1 else None)
    (segment,) = plan.segments
    heights = np.array([image.shape[0] for image in images])
    widths = np.array([image.shape[1] for image in images])
    samples = np.arange(count) if samples is None else samples
    if raw is None:
        raw = np.zeros((count, plan.num_columns))
        segment.draw(epoch, samples, np.zeros(count, np.int64), heights, widths, raw)
    raw = np.ascontiguousarray(raw, np.float64)
    flat = [image.reshape(-1) for image in images]
    pixels = np.concatenate([np.zeros(shift, np.uint8), *flat])
    sizes = heights * widths * 3
    scratch_size = segment.scratch_floats((heights.max(), widths.max()))
    # one canary behind the scratch and one around the output: a kernel that writes outside is
    # noticed
    scratch = np.full(scratch_size + 1 + shift, np.nan, np.float32)[shift:]
    scratch[-1] = 12345.0
    guarded = np.full((count + 2, *segment.shape, 3), 77, np.uint8)
    out = guarded[1:-1]
    factors = np.ones(count, np.int64) if factors is None else np.asarray(factors, np.int64)
    offsets = np.cumsum(sizes) - sizes + shift
    images = (pixels, offsets, heights, widths, factors)
    segment.render(raw, images, scratch[:-1], out, 0, count)
    assert scratch[-1] == 12345.0
    assert (guarded[0] == 77).all() and (guarded[-1] == 77).all()
    return out, raw, plan


def draw_params(ops, count=4096, shape=(375, 500), seed=0, epoch=0, view=0, samples=None, turn=0):
    """The user's parameters (N,) and raw draws (N, K) of `count` samples, nothing rendered."""
    plan = ViewPlan(f"view_{view}", "image", view, ops, seed, shape)
    (segment,) = plan.segments
    samples = np.arange(count) if samples is None else np.asarray(samples)
    raw = np.zeros((len(samples), plan.num_columns))
    occurrences = np.full(len(samples), turn, np.int64)
    sizes = np.full(len(samples), shape[0]), np.full(len(samples), shape[1])
    segment.draw(epoch, samples, occurrences, *sizes, raw)
    return plan.params_of(raw), raw, plan


def key_of(plan, op_class, occurrence=0):
    """The Philox key of an op of a plan."""
    (placed,) = [
        p for p in plan.placed if isinstance(p.op, op_class) and p.occurrence == occurrence
    ]
    return placed.key


def photo_like(height, width, seed=0):
    """uint8 (H, W, 3): smooth colour gradients, edges and noise, every level used."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    phases, speeds = rng.uniform(0, 6, (3, 3)), rng.uniform(2, 30, (3, 3))
    waves = [
        np.sin(speeds[c, 0] * x + phases[c, 0]) + np.sin(speeds[c, 1] * y + phases[c, 1])
        for c in range(3)
    ]
    image = 127 + 70 * np.stack(waves, -1)
    image[(np.floor(speeds[0, 2] * (x + y)) % 2) == 0] *= 0.5
    image += rng.normal(0, 12, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


@functools.cache
def huge_image():
    """uint8 (3000, 4000, 3)."""
    return np.tile(photo_like(300, 400), (10, 10, 1))


def color_grid():
    """uint8 (64, 64, 3): 4,096 colours, pure ones, greys and ties among them."""
    levels = np.round(np.linspace(0, 255, 16)).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)


def plain_images(height=24, width=20):
    """Black, white, one colour, grey, and every channel at an extreme."""
    colors = [(0, 0, 0), (255, 255, 255), (200, 30, 90), (128, 128, 128), (255, 0, 0), (0, 255, 1)]
    return [np.full((height, width, 3), color, np.uint8) for color in colors]


def photographs(data_folder, count=12, max_side=500):
    """uint8 images of at most max_side pixels from imagenet_samples256.tar."""
    images = []
    with tarfile.open(data_folder / "imagenet_samples256.tar") as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
                image.thumbnail((max_side, max_side))
                images.append(np.asarray(image))
            if len(images) == count:
                break
    return images


def to_float(image):
    """uint8 (H, W, 3) -> torch float32 (1, 3, H, W) in [0, 1], what torchvision's functional ops
    take.
    """
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


def from_float(tensor):
    """torch (1, 3, H, W) in [0, 1] -> float (H, W, 3) in levels, not rounded."""
    return tensor[0].permute(1, 2, 0).double().numpy() * 255


def torchvision_jitter(x, jitter):
    """torchvision's ColorJitter on float (1, 3, H, W) with the drawn parameters of one sample."""
    steps = [
        (tv.adjust_brightness, jitter["brightness"]),
        (tv.adjust_contrast, jitter["contrast"]),
        (tv.adjust_saturation, jitter["saturation"]),
        (tv.adjust_hue, jitter["hue"]),
    ]
    for number in jitter["order"]:
        step, factor = steps[number]
        x = step(x, float(factor))
    return x


def worst_difference(views, expected):
    """Largest distance in levels between uint8 views and float images in levels."""
    pairs = zip(views, expected)
    return max(float(np.abs(view.astype(np.float64) - other).max()) for view, other in pairs)


def ks_distance(values, cdf):
    """Largest distance of the empirical distribution of `values` from the function `cdf`."""
    values = np.sort(np.asarray(values, np.float64))
    expected, n = cdf(values), len(values)
    above = (np.arange(1, n + 1) / n - expected).max()
    return max(above, (expected - np.arange(n) / n).max())


def ks_distance_of_two(a, b):
    """Largest distance between the empirical distributions of two samples."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    below_a = np.searchsorted(a, both, side="right") / len(a)
    return np.abs(below_a - np.searchsorted(b, both, side="right") / len(b)).max()


def assert_uniform(values, low=0.0, high=1.0):
    """Kolmogorov's test at about 1 in 100,000; the seeds of all tests are fixed, so it does not
    flake.
    """
    values = np.asarray(values, np.float64)
    assert values.min() >= low and values.max() <= high
    limit = 2.5 / np.sqrt(len(values))
    assert ks_distance(values, lambda v: (v - low) / (high - low)) < limit


def assert_share(flags, probability):
    """`flags` are true with this probability, within five standard deviations."""
    deviation = np.sqrt(probability * (1 - probability) / len(flags))
    assert abs(np.mean(flags) - probability) <= 5 * deviation
