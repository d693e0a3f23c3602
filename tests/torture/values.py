"""Values of every kind for the fields to write, sound and mutated, and whether they come back."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
import torch
from PIL import Image
from support.beton_files import encode, same

from ffcv_ssl import fields as f
from torture.text_mutants import damaged_bytes

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I", "F", "I;16", "LAB", "HSV", "PA"]
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"]
OTHERS = [
    None, 5, -1, 2**63, 2**64, 1.5, "text", b"bytes", b"", bytearray(b"ab"), [], [1], {}, {"a": 1},
    True, np.int8(3), np.float32(2.5), np.zeros(0), np.zeros((2, 3), np.float32), object(), {1},
    np.zeros((2, 3)), np.zeros((2, 3), np.uint8), np.zeros((0, 3, 3), np.uint8), float("nan"),
    np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros(5, np.uint8), "1.5",
    np.zeros((70_000, 1), np.uint8), torch.zeros(4, dtype=torch.int64), torch.zeros(()),
    torch.tensor(7), torch.zeros(4), {"a": [1, None, "\u00e9"]}, [float("inf")], memoryview(b"xy"),
]  # fmt: skip


def make_field(choose: random.Random) -> f.Field:
    kind = choose.randrange(9)
    if kind < 4:
        mode = choose.choice(["raw", "jpg", "smart", "proportion", "passthrough"])
        longest = choose.choice([None, None, 4, 20])
        threshold = choose.choice([None, 0, 100])
        return f.RGBImageField(mode, longest, threshold, choose.randint(1, 100))
    if kind == 8:
        dtype, shape = choose.choice([(np.float32, (2, 3)), (np.uint8, (5,)), ("<U3", (2,))])
        tensor = f.TorchTensorField(torch.int64, (4,))
        return choose.choice([tensor, f.NDArrayField(dtype, shape)])
    return [f.IntField, f.FloatField, f.BytesField, f.JSONField][kind - 4]()


@functools.cache
def image_file(kind: int) -> bytes:
    """An encoded image of one of many kinds; b"" where Pillow cannot save it."""
    draw = np.random.default_rng(kind)
    pixels = Image.fromarray(draw.integers(0, 256, (11, 9, 3), np.uint8))
    settings = {}
    exif = Image.Exif()
    exif[0x0112] = kind % 10
    if kind % 3 == 0:
        settings["exif"] = exif
    if kind % 5 == 0:
        settings["progressive"] = True
    out = io.BytesIO()
    try:
        image = pixels.convert(MODES[kind % len(MODES)])
        image.save(out, FORMATS[kind % len(FORMATS) if kind % 2 else 0], **settings)
    except (OSError, ValueError, KeyError, TypeError):
        return b""
    return out.getvalue()


def make_value(choose: random.Random):
    kind = choose.randrange(5)
    if kind == 0:
        return choose.choice(OTHERS)
    if kind == 1:
        with_mode = Image.fromarray(np.zeros((5, 6, 3), np.uint8))
        try:
            return with_mode.convert(choose.choice(MODES))
        except ValueError:
            return with_mode
    content = image_file(choose.randrange(300))
    if kind == 2 and content:
        content = damaged_bytes(content, choose)
    return f.EncodedImage(content)


def try_value(choose: random.Random) -> str:
    """Write a value and read it back. Raises AssertionError where another value comes back."""
    field, value = make_field(choose), make_value(choose)
    try:
        metadata, payload = encode(field, value)
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error), f"not one line: {error}"
        return "refused"
    sizes = np.array([len(payload)], np.uint64)
    expected = field.expected_sizes(metadata)
    has_payload = field.pointers(metadata) is not None
    assert field.find_bad_sample(metadata, sizes if has_payload else None) is None
    assert expected is None or expected[0] in (len(payload), 2**64 - 1)
    again = type(field).from_binary(np.frombuffer(field.to_binary().tobytes(), np.uint8))
    back = again.decode(metadata[0], payload)
    if isinstance(field, f.RGBImageField):
        assert back.dtype == np.uint8 and back.ndim == 3 and back.shape[2] == 3
        field.take_counts()
    elif isinstance(field, f.NDArrayField):
        assert np.array_equal(np.asarray(back), np.asarray(value))
    elif isinstance(field, f.IntField):
        assert back == int(value)
    elif isinstance(field, f.FloatField):
        assert np.float64(back).tobytes() == np.float64(float(value)).tobytes()
    elif isinstance(field, f.JSONField):
        assert back == value or same(back, value) or repr(back) == repr(value) or value != value
    else:
        assert bytes(back) == bytes(value)
    return "stored"
