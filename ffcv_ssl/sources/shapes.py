"""Generated images of ten shapes: any size and number, a function of (seed, split, index).

Only the outline tells the classes apart. Background, clutter, number, size, rotation, colour and
position are drawn independently of the class. Every outline covers the same area, and is brighter
than its background as often as darker. So a linear probe on pixels or on a colour histogram learns
next to nothing, and an encoder has to see shape. All objects of an image have the same class but
differ in size, rotation and colour: two crops of an image share the class and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ffcv_ssl.sources.outlines import OUTLINES, REACH

# H W pixels, C channels.

CLASS_NAMES = tuple(outline.__name__ for outline in OUTLINES)
MAX_OBJECTS = 4
# Apparent radius of an object as a share of the image's side, (farthest, nearest), by the number of
# objects in the image: large enough that a crop of a quarter of the image still shows an outline.
RADII = ((0.26, 0.38), (0.20, 0.27), (0.16, 0.22), (0.14, 0.19))
# Largest rotation to either side, in radians. 300 steps of SimCLR (batch 64, ResNet-18, 48 px) gain
# 17 to 22 points over the random network in a linear probe; with any rotation they gain 13.
MAX_TILT = np.pi / 6
# Colours stay close to a common grey: contrastive learning takes an image's particular colour as a
# shortcut, instead of looking at the shape.
BASE_BRIGHTNESS = (0.42, 0.58)
BACKGROUND_SATURATION, SATURATION = 0.06, 0.2
OBJECT_CONTRAST, STROKE_CONTRAST = (0.3, 0.5), (0.15, 0.35)
NOISE = 0.03
NUM_STROKES = 2
NUM_TRIES = 24  # places tried for each object: the first free one is taken, else the freest
MARGIN = 1.1  # a gap counts from this multiple of the sum of the two radii
# An object is 0.1 wide in the units of `distance`, seen by a pinhole camera of focal length 1.
OBJECT_RADIUS = 0.1
# Borders between the six classes of `distance_bin`, which are about equally frequent.
DISTANCE_EDGES = (0.33, 0.39, 0.45, 0.5, 0.55)


class Shapes:
    """An indexed dataset of generated images.

    split: any name; each has its own images. num_samples > 0. size_px: height and width. seed: any
    int. `dataset[index]` is (image, label, count, distance): uint8 (H, W, 3); the class, 0..9, an
    index into `CLASS_NAMES`; the number of objects, 1..4; the distance of the nearest object, a
    float that is smaller the larger the object looks. Raises ValueError for impossible settings and
    IndexError past the end.
    """

    def __init__(
        self, split: str = "train", num_samples: int = 10000, size_px: int = 64, seed: int = 0
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"shapes: num_samples: got {num_samples}, expected at least 1")
        if not 8 <= size_px <= 4096:
            raise ValueError(f"shapes: size_px: got {size_px}, expected 8 to 4096")
        self.split, self.num_samples, self.size_px, self.seed = split, num_samples, size_px, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int, float]:
        index = int(index)
        if not 0 <= index < self.num_samples:
            raise IndexError(f"shapes: got index {index}, expected 0 to {self.num_samples - 1}")
        draws = Draws(f"{self.seed}/{self.split}/{index}")
        label = self._label(index)
        image_HWC, radii = render(draws, OUTLINES[label], self.size_px)
        return image_HWC, label, len(radii), OBJECT_RADIUS / max(radii)

    def _label(self, index: int) -> int:
        """Each ten samples hold every class once, in random order, so any stride meets all."""
        block, place = divmod(index, len(OUTLINES))
        order = Draws(f"{self.seed}/{self.split}/order {block}").uniform(shape=len(OUTLINES))
        return int(order.argsort()[place])


class WithDistanceBin:
    """The samples of `Shapes` with a last value, the class of their distance, 0 (nearest) to 5: the
    task that VTAB makes of CLEVR (Zhai et al. 2020), for probes that need classes."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int, float, int]:
        sample = self.shapes[index]
        return *sample, int(np.searchsorted(DISTANCE_EDGES, sample[-1], side="right"))


class Draws:
    """Random numbers, a function of a text: NumPy promises to keep Philox's raw stream."""

    def __init__(self, text: str) -> None:
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        self._bits = np.random.Philox(key=key)

    def uniform(
        self, low: float = 0.0, high: float = 1.0, shape: int | tuple[int, ...] | None = None
    ) -> Any:
        """float64 in [low, high): one number, or an array of `shape`."""
        raw = self._bits.random_raw(1 if shape is None else int(np.prod(shape)))
        unit = (raw >> np.uint64(11)) * 2.0**-53
        return low + (high - low) * (float(unit[0]) if shape is None else unit.reshape(shape))

    def below(self, count: int) -> int:
        """int in [0, count)."""
        return int(self.uniform() * count)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 array of `shape`, uniform over 256 values in [-1, 1]; cheap enough per pixel."""
        count = int(np.prod(shape))
        raw = self._bits.random_raw(-(-count // 8)).view(np.uint8)[:count]
        return (raw.astype(np.float32) * np.float32(2 / 255) - np.float32(1)).reshape(shape)


def render(
    draws: Draws, outline: Callable[..., np.ndarray], size_px: int
) -> tuple[np.ndarray, list[float]]:
    """One image, uint8 (H, W, 3), and the radii of its objects as shares of its side."""
    image_HWC, base = _background(draws, size_px)
    for _ in range(NUM_STROKES):
        _stroke_(image_HWC, draws, base)
    centers, radii = _placement(draws)
    for (x, y), radius in sorted(zip(centers, radii), key=lambda placed: placed[1]):
        _object_(image_HWC, draws, outline, base, (x, y, radius))
    image_HWC += draws.noise(image_HWC.shape) * np.float32(NOISE)
    np.clip(image_HWC, 0, 1, out=image_HWC)
    return (image_HWC * np.float32(255) + np.float32(0.5)).astype(np.uint8), radii


@functools.lru_cache(maxsize=8)
def _axis(size_px):
    """Centres of the pixels of one axis, float32 in (0, 1)."""
    axis = (np.arange(size_px, dtype=np.float32) + np.float32(0.5)) / np.float32(size_px)
    axis.setflags(write=False)
    return axis


def _color(draws, brightness, saturation):
    """float32 RGB around `brightness`: any hue, up to `saturation` from grey."""
    tint = draws.uniform(-1, 1, 3)
    tint -= tint.mean()
    return (brightness + draws.uniform(0, saturation) * tint).astype(np.float32)


def _background(draws, size_px):
    """A gradient between two colours, and their mean brightness."""
    base = draws.uniform(*BASE_BRIGHTNESS)
    first = _color(draws, base - 0.05, BACKGROUND_SATURATION)
    second = _color(draws, base + 0.05, BACKGROUND_SATURATION)
    angle = draws.uniform(0, 2 * np.pi)
    axis = _axis(size_px) - np.float32(0.5)
    ramp = axis * np.float32(np.sin(angle))
    ramp = ramp[:, None] + axis[None, :] * np.float32(np.cos(angle)) + np.float32(0.5)
    return first + (second - first) * ramp[:, :, None], base


def _contrast(draws, low, high):
    """Brighter or darker with equal chance, by `low` to `high`."""
    return draws.uniform(low, high) * (1 if draws.uniform() < 0.5 else -1)


def _blend_(image_HWC, window, cover, color):
    patch = image_HWC[window]
    patch += cover[:, :, None] * (color - patch)


def _stroke_(image_HWC, draws, base):
    """A short line of clutter anywhere, of any class' image."""
    x, y = draws.uniform(0, 1, 2)
    angle, half_length = draws.uniform(0, np.pi), draws.uniform(0.03, 0.14)
    half_width = draws.uniform(0.008, 0.02)
    color = _color(draws, base + _contrast(draws, *STROKE_CONTRAST), SATURATION)
    window, u, v = _rotated_window(image_HWC.shape[0], x, y, half_length + 0.03, angle)
    field = np.maximum(np.abs(u) - np.float32(half_length), np.abs(v) - np.float32(half_width))
    _blend_(image_HWC, window, _cover(field, image_HWC.shape[0]), color)


def _object_(image_HWC, draws, outline, base, placed):
    x, y, radius = placed
    angle = draws.uniform(-MAX_TILT, MAX_TILT)
    contrast = _contrast(draws, *OBJECT_CONTRAST)
    near = _color(draws, base + contrast, SATURATION)
    far = _color(draws, base + 0.6 * contrast, SATURATION)
    window, u, v = _rotated_window(image_HWC.shape[0], x, y, radius * REACH, angle)
    field = outline(u / np.float32(radius), v / np.float32(radius)) * np.float32(radius)
    shade = np.clip(u / np.float32(2 * radius) + np.float32(0.5), 0, 1)[:, :, None]
    _blend_(image_HWC, window, _cover(field, image_HWC.shape[0]), far + (near - far) * shade)


def _cover(field, size_px):
    """Share of each pixel inside an outline; `field`: signed distance as a share of the side."""
    return np.clip(np.float32(0.5) - field * np.float32(size_px), 0, 1)


def _rotated_window(size_px, x, y, reach, angle):
    """The pixels within `reach` of (x, y), a place in the image.

    Returns their window, and their coordinates from there on axes turned by `angle`.
    """
    low_x, high_x = _span(size_px, x, reach)
    low_y, high_y = _span(size_px, y, reach)
    axis = _axis(size_px)
    dx = axis[None, low_x:high_x] - np.float32(x)
    dy = axis[low_y:high_y, None] - np.float32(y)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.s_[low_y:high_y, low_x:high_x], cos * dx + sin * dy, cos * dy - sin * dx


def _span(size_px: int, center: float, reach: float) -> tuple[int, int]:
    low, high = np.floor((center - reach) * size_px), np.ceil((center + reach) * size_px) + 1
    return max(0, int(low)), min(size_px, int(high))


def _placement(draws):
    """Centres and radii of the objects: within the image, and apart where there is room."""
    count = 1 + draws.below(MAX_OBJECTS)
    far, near = RADII[count - 1]
    radii = [draws.uniform(far, near) for _ in range(count)]
    centers = np.empty((count, 2))
    for k, radius in enumerate(radii):
        candidates = draws.uniform(radius, 1 - radius, (NUM_TRIES, 2))
        distances = np.hypot(*(candidates[:, None] - centers[None, :k]).transpose(2, 0, 1))
        gaps = (distances - MARGIN * (radius + np.array(radii[:k]))).min(axis=1, initial=0.0)
        centers[k] = candidates[gaps.argmax()]
    return centers, radii
