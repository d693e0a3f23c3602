"""The ten outlines of the generated dataset, as implicit functions of the plane.

Each takes coordinates x, y (float32 arrays of one shape) and returns a field that is negative
inside, positive outside and has a slope of about one at the border, so that one clip draws it
antialiased at any size. All outlines cover the same area, `AREA`, so that the filled area does not
give the class away. All lie within `REACH` of the origin.
"""

from __future__ import annotations

import numpy as np

AREA = 1.6
REACH = 1.2


def _box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _half_planes(x, y, angles, offset):
    """Intersection of half-planes `offset` from the origin, with normals at `angles` (radians)."""
    sides = [x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) for angle in angles]
    return np.maximum.reduce(sides) - np.float32(offset)


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - np.float32(0.7136)


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - np.float32(0.79)) - np.float32(0.1612)


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, np.float32(0.6325), np.float32(0.6325))


def frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_box(x, y, np.float32(0.68), np.float32(0.68))) - np.float32(0.1471)


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _half_planes(x, y, np.pi / 2 + np.arange(3) * 2 * np.pi / 3, 0.5549)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: the plane folded into one tenth, where a single edge is left."""
    tenth = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(y, x), np.float32(2 * tenth)) - np.float32(tenth))
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = 1.14, 0.4776
    ax, ay = notch, 0.0
    bx, by = tip * np.cos(tenth), tip * np.sin(tenth)
    length = np.hypot(bx - ax, by - ay)
    normal_x, normal_y = (by - ay) / length, -(bx - ax) / length
    return (px - np.float32(ax)) * np.float32(normal_x) + (py - np.float32(ay)) * np.float32(
        normal_y
    )


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    arm, half = np.float32(0.95), np.float32(0.2397)
    return np.minimum(_box(x, y, arm, half), _box(x, y, half, arm))


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - np.float32(0.25)  # so that its middle lies at the origin
    outer = np.hypot(x, y) - np.float32(1.0228)
    bite = np.hypot(x - np.float32(0.5114), y) - np.float32(0.8182)
    return np.maximum(outer, -bite)


def bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, np.float32(1.08), np.float32(0.3704))


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its tip with a half-disc on each of its two upper sides."""
    half = np.float32(0.4733)
    u, v = (x + y) * np.float32(np.sqrt(0.5)), (y - x) * np.float32(np.sqrt(0.5))
    u, v = u + half * np.float32(0.3), v + half * np.float32(0.3)
    lobes = np.minimum(np.hypot(u - half, v), np.hypot(u, v - half)) - half
    return np.minimum(_box(u, v, half, half), lobes)


OUTLINES = (disc, ring, square, frame, triangle, star, cross, crescent, bar, heart)
