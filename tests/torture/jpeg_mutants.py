"""JPEGs to damage, and damage: to headers, tables, sizes, the scan, and by truncation."""

from __future__ import annotations

import functools
import io
import random
import struct
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

NUM_SEEDS = 240
SAMPLINGS = ("420", "420", "422", "444", "Gray", "restarts", "optimized")
_SOF, _DHT, _DQT, _SOS, _DRI = 0xC0, 0xC4, 0xDB, 0xDA, 0xDD


def picture(number: int) -> np.ndarray:
    """A generated image with smooth parts, edges and noise, uint8 (H, W, 3), 3 to 120 px a side."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(3, 121, 2))
    rows, columns = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for _ in range(rng.integers(2, 6)):
        wave = np.sin(
            rows * rng.uniform(0, 0.3) + columns * rng.uniform(0, 0.3) + rng.uniform(0, 6)
        )
        image += wave[..., None] * rng.uniform(-60, 60, 3)
    edge = (rows * rng.uniform(-1, 1) + columns * rng.uniform(-1, 1)) > rng.uniform(-20, 60)
    image[edge] += rng.uniform(-90, 90, 3)
    image += rng.normal(0, rng.choice([0, 3, 30]), image.shape) + rng.uniform(60, 200)
    return np.clip(image, 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, sampling: str, quality: int) -> bytes:
    """A JPEG of that kind."""
    if sampling == "Gray":
        grey = np.ascontiguousarray(pixels[..., :1])
        return simplejpeg.encode_jpeg(grey, quality, "GRAY", "Gray")
    if sampling in ("420", "422", "444"):
        return simplejpeg.encode_jpeg(pixels, quality, "RGB", sampling)
    file, options = io.BytesIO(), {"optimize": True}
    if sampling == "restarts":
        options = {"restart_marker_blocks": 1 + len(pixels) % 5}
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


@functools.cache
def seeds() -> list[bytes]:
    """NUM_SEEDS sound JPEGs."""
    return [
        encoded(picture(k), SAMPLINGS[k % len(SAMPLINGS)], [30, 75, 90, 97, 100][k % 5])
        for k in range(NUM_SEEDS)
    ]


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """[(marker, its first byte, the byte behind it)] up to the scan's header."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, (length,) = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        found.append((marker, at, at + 2 + length))
        at += 2 + length
        if marker == _SOS:
            break
    return found


def mutant(data: bytes, choose: random.Random) -> bytes:
    """The JPEG after one or two changes."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2])):
        changed = choose.choice(CHANGES)(changed, choose)
    return bytes(changed)


def _in_segment(marker: int, low: int = 0) -> Any:
    """A byte of a segment of that kind, behind its first `low` ones, becomes another."""

    def change(data: bytearray, choose: random.Random) -> bytearray:
        found = [(at, end) for kind, at, end in segments(bytes(data)) if kind == marker]
        if found:
            at, end = choose.choice(found)
            if at + low < min(end, len(data)):
                data[choose.randrange(at + low, min(end, len(data)))] = choose.randrange(256)
        return data

    return change


def _quantization(data: bytearray, choose: random.Random) -> bytearray:
    """Some steps become others; programs take any."""
    for _ in range(choose.randint(1, 12)):
        place = [(at, end) for kind, at, end in segments(bytes(data)) if kind == _DQT]
        if place:
            at, _ = choose.choice(place)
            if at + 69 <= len(data):
                data[at + 5 + choose.randrange(64)] = choose.choice([1, 2, 255, *range(1, 256, 9)])
    return data


def _scan_bits(data: bytearray, choose: random.Random) -> bytearray:
    """A few bits of the scan."""
    begin = max((end for _, _, end in segments(bytes(data))), default=0)
    if begin < len(data):
        for _ in range(choose.randint(1, 3)):
            data[choose.randrange(begin, len(data))] ^= 1 << choose.randrange(8)
    return data


def _scan_bytes(data: bytearray, choose: random.Random) -> bytearray:
    """Bytes of the scan are lost, repeated, or become markers."""
    begin = max((end for _, _, end in segments(bytes(data))), default=0)
    at, size = choose.randint(min(begin, len(data)), len(data)), choose.randint(1, 20)
    kind = choose.randrange(4)
    if kind == 0:
        del data[at : at + size]
    elif kind == 1:
        data[at:at] = data[at : at + size]
    elif kind == 2:
        data[at : at + 2] = bytes([0xFF, choose.choice([0, 0xD0, 0xD3, 0xD7, 0xD9, 0xFF, 0xC4])])
    else:
        data[at : at + size] = choose.randbytes(size)
    return data


def _truncated(data: bytearray, choose: random.Random) -> bytearray:
    return data[: choose.randrange(len(data) + 1)]


def _appended(data: bytearray, choose: random.Random) -> bytearray:
    """Bytes behind the end, which nobody reads."""
    return data + choose.randbytes(choose.randint(1, 30))


def _comment(data: bytearray, choose: random.Random) -> bytearray:
    """Another segment somewhere among the others."""
    places = [at for _, at, _ in segments(bytes(data))] or [2]
    text = choose.randbytes(choose.randrange(20))
    marker = choose.choice([0xFE, 0xE1, 0xEE, 0xE0, _DRI, 0xC1, 0xCC])
    if marker == 0xEE:
        text = b"Adobe" + bytes(6) + bytes([choose.randrange(3)])
    if marker == _DRI:
        text = struct.pack(">H", choose.choice([0, 1, 2, 3, 7, 40, 65535]))
    place = choose.choice(places)
    data[place:place] = struct.pack(">BBH", 0xFF, marker, len(text) + 2) + text
    return data


def _anywhere(data: bytearray, choose: random.Random) -> bytearray:
    if data:
        data[choose.randrange(len(data))] = choose.randrange(256)
    return data


def _size(data: bytearray, choose: random.Random) -> bytearray:
    """Another height or width, near the old one or far from it."""
    for kind, at, _ in segments(bytes(data)):
        if kind == _SOF and at + 9 <= len(data):
            place = at + choose.choice([5, 7])
            (old,) = struct.unpack(">H", data[place : place + 2])
            new = choose.choice([old + choose.randint(-20, 20), choose.randrange(200), 65535])
            data[place : place + 2] = struct.pack(">H", new & 0xFFFF)
    return data


CHANGES = (
    _in_segment(_SOF), _in_segment(_DHT), _in_segment(_DHT, 5), _in_segment(_DHT, 21),
    _in_segment(_SOS), _quantization, _quantization, _quantization, _quantization, _scan_bits,
    _scan_bits, _scan_bytes, _truncated, _appended, _appended, _comment, _comment, _anywhere, _size,
)  # fmt: skip
