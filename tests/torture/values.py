"""Values of every kind for the fields to write, sound and mutated, and whether they come back."""

from __future__ import annotations

import functools
import io
import math
import random
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from support.beton_files import encode, same

from ffcv_ssl import BetonError, beton
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
    Image.fromarray(np.array([[-5, 70_000]], np.int32)), np.zeros((1, 1, 1), np.uint8),
    np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000, 3)),
    torch.tensor(7), torch.zeros(4), {"a": [1, None, "\u00e9"]}, [float("inf")], memoryview(b"xy"),
]  # fmt: skip


def make_field(choose: random.Random) -> f.Field:
    """A field; its settings may be nonsense, for which it raises ValueError or TypeError."""
    kind = choose.randrange(10)
    if kind == 9:
        nonsense = [None, 0, -1, 101, 2**16, 0.5, 1.5, float("nan"), "raw", "jpg", "other"]
        settings = [choose.choice(nonsense) for _ in range(5)]
        if choose.randrange(3):
            return f.RGBImageField(choose.choice(["raw", "smart", "other"]), *settings[1:])
        dtype = choose.choice([object, "V4", [("a", "<f4")], "<f4", ">i2", "<U0", "M8[s]"])
        shape = choose.choice([(), (0,), (-1, 2), (2,) * 33, (2**31, 2**31), (2, 3), (1.5,), "ab"])
        torch_dtype = choose.choice([torch.bfloat16, torch.int64, torch.bool])
        make = choose.choice([f.NDArrayField, f.TorchTensorField])
        return make(dtype if make is f.NDArrayField else torch_dtype, shape)
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


def odd_jpeg(content: bytes, choose: random.Random) -> bytes:
    """A JPEG with what few encoders write: fill bytes, marks without content, 12 bits, colours
    without transform, hundreds of scans, a giant size."""
    kind, frame = choose.randrange(6), content.find(b"\xff\xc0")
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    more = [b"\xff", b"\xff\x01", adobe]
    if kind < 3:
        return content[:2] + more[kind] + content[2:]
    if kind == 3:
        return content[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 300 + content[-2:]
    changed = bytearray(content)
    if frame >= 0:
        changed[frame + 4 : frame + 9] = b"\x0c" + content[frame + 5 : frame + 9]
        if kind == 5:
            changed[frame + 4 : frame + 9] = b"\x08\xff\xff\xff\xff"
    return bytes(changed)


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
    elif kind == 3 and content[:2] == b"\xff\xd8":
        content = odd_jpeg(content, choose)
    return f.EncodedImage(content)


def try_value(choose: random.Random) -> str:
    """Write a value and read it back. Raises AssertionError where another value comes back."""
    value = make_value(choose)
    try:
        field = make_field(choose)
        if isinstance(field, f.NDArrayField) and choose.randrange(2):
            value = np.frombuffer(choose.randbytes(field.element_size), field.dtype)
            value = value.reshape(field.shape).copy()
            if isinstance(field, f.TorchTensorField):
                value = torch.from_numpy(value)
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
        assert np.asarray(back).tobytes() == np.asarray(value).tobytes()
    elif isinstance(field, f.IntField):
        assert back == int(value)
    elif isinstance(field, f.FloatField):
        assert np.float64(back).tobytes() == np.float64(float(value)).tobytes()
    elif isinstance(field, f.JSONField):
        assert back == value or same(back, value) or repr(back) == repr(value) or value != value
    else:
        assert bytes(back) == bytes(value)
    check_decoder(field, metadata, payload)
    return "stored"


def check_decoder(field, metadata, payload):
    """The loader's decoder gives the same bytes."""
    decoder = field.get_decoder_class()()
    if not isinstance(decoder, f.Decoder):  # of images: the pipelines' business
        assert getattr(f.rgb_image, type(decoder).__name__, None) is type(decoder)
        assert not hasattr(f.rgb_image, "no such decoder")
        return
    reader = SimpleNamespace(field_metadata=lambda name: metadata)
    shape, dtype = decoder.output_spec(field, reader, "a")
    out = np.frombuffer(b"\xaa" * (math.prod(shape) * dtype.itemsize), dtype).reshape(1, *shape)
    out = out.copy()
    decoder.decode_batch(field, metadata, [payload], out)
    expected = payload if field.pointers(metadata) is not None else metadata.tobytes()
    assert out.tobytes() == expected, "not what was stored"
    if isinstance(field, f.JSONField):
        rows = field.unpack(torch.from_numpy(out))
        assert repr(rows) == repr([field.unpack(out[0])]) == repr([field.decode(None, payload)])


def try_names(choose: random.Random) -> str:
    """Pack names of samples and of a field, and unpack them, or names that were damaged since."""
    words = ["a", "", "b/c.jpg", "\u00e9", "\udcff", "x" * 5000, "a\0b", "\ud800", 5, None, b"a"]
    few = words if choose.randrange(3) == 0 else words[:5]
    names = [choose.choice(few) for _ in range(choose.choice([1, 1, 2, 6]))]
    try:
        raw = beton.checked_name(choose.choice([*few, "x" * 16, "x" * 17]))
        assert beton.unpack_name("a", 0, np.frombuffer(raw.ljust(16, b"\0"), np.uint8)).isascii()
        packed, place = beton.pack_names(names)
    except ValueError as error:
        assert "\n" not in str(error), f"not one line: {error}"
        return "refused"
    assert beton.unpack_names("a", packed, place, len(names)) == tuple(names)
    if packed:
        damaged = damaged_bytes(packed, choose)
        try:
            assert damaged == packed or not beton.unpack_names("a", damaged, place, len(names))
        except BetonError as error:
            assert "\n" not in str(error), f"not one line: {error}"
    return "stored"
