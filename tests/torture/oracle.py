"""What a `.beton` file holds, and whether other programs read the same from its bytes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import zlib

import numpy as np
import simplejpeg
import torch
from PIL import Image
from support.beton_files import same

from ffcv_ssl import BetonError, beton
from ffcv_ssl.reader import Reader

FOOTER_BYTES = 120
"""Its mark, and thirteen numbers: docs/format.md."""


def read_values(path) -> dict:
    """What a file says of itself and of its samples. BetonErrors of samples are values."""
    with Reader(path) as reader:
        about = (reader.num_samples, reader.field_names, reader.class_names, reader.made)
        values = {"verified": reader.verified, "about": about}
        try:
            values["names"] = reader.names
        except BetonError as error:
            values["names"] = checked(error)
        for sample in range(min(reader.num_samples, 50)):
            for name in reader.fields:
                try:
                    values[sample, name] = reader.decode(sample, name)
                except BetonError as error:
                    values[sample, name] = checked(error)
        return values


def checked(error: BetonError) -> BetonError:
    """The error, which is one short line, without the frames that raised it: they would keep the
    file's contents, and the next reader of the file would take those."""
    assert "\n" not in str(error) and len(str(error)) < 1500, f"not one short line: {error}"
    error.__context__ = None
    return error.with_traceback(None)


def check_against(right, values):
    """All values are the sound file's, or errors."""
    for key, value in values.items():
        if not isinstance(value, BetonError):
            assert key in right and same_value(value, right[key]), f"{key}: a wrong value"


def same_value(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return same(a, b)


def check_against_bytes(seed, values):
    """All that was read is what the file's bytes mean, decoded by other programs."""
    head = seed.written[0]
    count, samples = int.from_bytes(head[2:4], "little"), int.from_bytes(head[8:16], "little")
    table_offset = int.from_bytes(head[16:24], "little")
    types = [head[24 + 1041 * index] for index in range(count)]
    names = [head[25 + 1041 * i : 41 + 1041 * i].split(b"\0")[0].decode() for i in range(count)]
    offsets, itemsize = row_layout(types)
    begin = 24 + 1041 * count
    text = section_text(seed, begin + samples * itemsize, table_offset)
    check_about(seed, text, samples, names, values)
    sizes: dict[int, int] = {}
    table = seed.bytes_at(table_offset, 1 << 20)
    for _, pointer, size in np.frombuffer(table, beton.ALLOC_ROW_TYPE).tolist():
        sizes[pointer] = max(sizes.get(pointer, 0), size)
    read = {key for key in values if isinstance(key, tuple)}
    assert read == {(sample, name) for sample in range(min(samples, 50)) for name in names}
    for sample, name in read:
        value, index = values[sample, name], names.index(name)
        if not isinstance(value, BetonError):
            row = seed.bytes_at(begin + sample * itemsize + offsets[index], 16)
            arguments = head[41 + 1041 * index : 41 + 1041 * index + 1024]
            check_value(types[index], arguments, row, seed.bytes_at, sizes, value)


def section_text(seed, locator_offset, table_offset):
    """The text of a file's integrity section; None for a file without its two marks."""
    footer = seed.bytes_at(table_offset - FOOTER_BYTES, FOOTER_BYTES)
    is_marked = seed.bytes_at(locator_offset, 16) == b"FFCV-SSL:locator"
    if not is_marked or footer[:16] != b"FFCV-SSL:footer.":
        return None
    offset, size = (int.from_bytes(footer[at : at + 8], "little") for at in (32, 56))
    return seed.bytes_at(offset, size)


def check_about(seed, text, samples, names, values):
    """What a file says of itself is what its header, and the text of its section, say."""
    document = {"class_names": {}, "made": {}} if text is None else json.loads(text)
    assert values["verified"] == (text is not None), "verified without marks, or the reverse"
    assert values["about"][:2] == (samples, names), f"{samples} samples of {names}"
    said = [document["class_names"], document["made"]]
    assert json.dumps(list(values["about"][2:])) == json.dumps(said), f"not {said}"
    found, place = values["names"], document.get("names")
    if isinstance(found, BetonError):
        return
    if place is None:
        assert found is None, "names, but none are there"
        return
    packed = seed.bytes_at(place["offset"], place["packed_bytes"])
    right = zlib.decompress(packed).decode("utf-8", "surrogateescape").split("\0")
    assert found == tuple(right) and len(right) == samples, "other names of samples"


def row_layout(types):
    """(offset of each field in a sample's metadata, bytes of a row), as a C compiler aligns them:
    images have 13 bytes and byte strings 16, of single bytes; all others are 8-byte words."""
    at, offsets = 0, []
    for kind in types:
        size, alignment = {2: (13, 1), 3: (16, 1), 5: (16, 1)}.get(kind, (8, 8))
        at = -(-at // alignment) * alignment
        offsets.append(at)
        at += size
    is_aligned = any(kind not in (2, 3, 5) for kind in types)
    return offsets, -(-at // 8) * 8 if is_aligned else at


def check_value(kind, arguments, row, bytes_at, sizes, value):
    word = int.from_bytes(row[:8], "little")
    if kind == 1:
        assert value == int.from_bytes(row[:8], "little", signed=True)
    elif kind == 0:
        assert isinstance(value, float) and np.float64(value).tobytes() == row[:8]
    elif kind == 2:
        mode, width = row[0], int.from_bytes(row[1:3], "little")
        height, pointer = int.from_bytes(row[3:5], "little"), int.from_bytes(row[5:13], "little")
        assert value.shape == (height, width, 3) and value.dtype == np.uint8
        check_image(mode, bytes_at(pointer, sizes[pointer]), value)
    elif kind in (3, 5):
        payload = bytes_at(word, int.from_bytes(row[8:], "little"))
        if kind == 5:
            assert json.dumps(value) == json.dumps(json.loads(payload.split(b"\0")[0]))
        else:
            assert value == payload
    else:
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        assert list(array.shape) == [int(n) for n in np.frombuffer(arguments[:256], "<u8") if n]
        length = int.from_bytes(arguments[256:264], "little")
        ((_, text),) = json.loads(arguments[264 : 264 + length])
        assert array.dtype == np.dtype(text)
        assert array.tobytes() == bytes_at(word, array.nbytes)


def check_image(mode, payload, value):
    if mode == 1:
        assert value.tobytes() == payload
        return
    ours, pillows = other_pixels(payload)
    assert np.array_equal(value, ours), "not the pixels of simplejpeg"
    assert pillows is None or np.array_equal(value, pillows), "not Pillow's pixels"


@functools.lru_cache(maxsize=500)
def other_pixels(payload):
    """A JPEG's pixels by simplejpeg, and by Pillow: None where it refuses what the strict decoder
    accepts, such as bytes after an end mark, or has no RGB."""
    pillows = None
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        image = Image.open(io.BytesIO(payload))
        if image.mode in ("RGB", "L"):
            pillows = np.asarray(image.convert("RGB"))
    return simplejpeg.decode_jpeg(payload, "RGB", strict=True), pillows
