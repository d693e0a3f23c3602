"""Fields: what is written comes back exactly, and what cannot be written is refused."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.beton_files import encode, pattern, same

from ffcv_ssl import fields as f
from ffcv_ssl.fields.basics import FloatDecoder, IntDecoder
from ffcv_ssl.fields.bytes import BytesDecoder
from ffcv_ssl.fields.json import JSONDecoder
from ffcv_ssl.fields.ndarray import NDArrayDecoder


def round_trip(field, value):
    metadata, payload = encode(field, value)
    again = type(field).from_binary(
        np.frombuffer(np.asarray(field.to_binary()).tobytes(), np.uint8)
    )
    return again.decode(metadata[0], payload)


def image_file(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f.EncodedImage(out.getvalue())


def photo(height_px=40, width_px=30):
    return Image.fromarray(pattern(1, height_px, width_px))


@pytest.mark.parametrize(
    "field, value",
    [
        (f.IntField(), -1),
        (f.IntField(), 2**63 - 1),
        (f.FloatField(), -0.1),
        (f.FloatField(), float("inf")),
        (f.BytesField(), b""),
        (f.BytesField(), bytes(range(256))),
        (f.NDArrayField(np.float16, (2, 1, 3)), np.arange(6, dtype=np.float16).reshape(2, 1, 3)),
        (f.NDArrayField(np.dtype(">u4"), (2,)), np.array([1, 2**31], ">u4")),
        (f.NDArrayField(np.dtype("U3"), (1,)), np.array(["abc"])),
        (f.TorchTensorField(torch.float32, (2, 2)), torch.tensor([[1.5, -2], [0, 3]])),
        (f.JSONField(), {"a": [1, None, "\u00e9\0"]}),
        (f.RGBImageField(), pattern(0, 7, 5)),
        (f.RGBImageField(), pattern(0, 1, 1)),
    ],
)
def test_values_come_back_exactly(field, value):
    assert same(round_trip(field, value), value)


@pytest.mark.parametrize(
    "field, value",
    [
        (f.IntField(), 1.5),
        (f.IntField(), "7"),
        (f.IntField(), 2**63),
        (f.FloatField(), "1"),
        (f.BytesField(), "text"),
        (f.BytesField(), np.zeros(3, np.int8)),
        (f.BytesField(), np.zeros((2, 2), np.uint8)),
        (f.NDArrayField(np.float32, (3,)), np.zeros(3)),
        (f.NDArrayField(np.float32, (3,)), np.zeros((3, 1), np.float32)),
        (f.TorchTensorField(torch.int64, (3,)), np.zeros(3, np.int64)),
        (f.JSONField(), {1, 2}),
        (f.RGBImageField(), np.zeros((4, 4, 3), np.float32)),
        (f.RGBImageField(), np.zeros((4, 4, 4), np.uint8)),
        (f.RGBImageField(), np.zeros((0, 4, 3), np.uint8)),
        (f.RGBImageField(), np.zeros((1, 65536, 3), np.uint8)),
        (f.RGBImageField(), "image.jpg"),
        (f.RGBImageField("passthrough"), f.EncodedImage(b"no image at all")),
        (f.RGBImageField("jpg"), f.EncodedImage(image_file(photo()).data[:200])),
    ],
)
def test_values_that_do_not_fit_the_field_are_refused(field, value):
    with pytest.raises((ValueError, TypeError)):
        encode(field, value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: f.NDArrayField(object, (2,)),
        lambda: f.NDArrayField([("a", "<f4"), ("b", "<f4")], (2,)),
        lambda: f.NDArrayField(np.float32, ()),
        lambda: f.NDArrayField(np.float32, (2, 0)),
        lambda: f.NDArrayField(np.float32, (2**20, 2**20)),
        lambda: f.TorchTensorField(torch.bfloat16, (2,)),
        lambda: f.RGBImageField("png"),
        lambda: f.RGBImageField(max_resolution=0),
        lambda: f.RGBImageField(jpeg_quality=101),
        lambda: f.RGBImageField(compress_probability=1.1),
    ],
)
def test_settings_that_no_file_can_hold_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    "text",
    ['[["", "|O"]]', '[["", "<f4"], ["", "<f4"]]', '"<f4"', '[["", "<f999999999"]]', "[[", ""],
)
def test_array_types_of_hostile_descriptors_are_refused(text):
    raw = np.asarray(f.NDArrayField(np.float32, (2,)).to_binary()).tobytes()
    arguments = bytearray(raw)
    arguments[256:264] = len(text).to_bytes(8, "little")
    arguments[264:] = text.encode().ljust(1024 - 264, b"\0")
    with pytest.raises(ValueError):
        f.NDArrayField.from_binary(np.frombuffer(arguments, np.uint8))


def test_random_descriptors_never_give_more_than_a_value_error():
    rng = np.random.default_rng(0)
    good = np.frombuffer(
        np.asarray(f.NDArrayField(np.float32, (2,)).to_binary()).tobytes(), np.uint8
    )
    refused = 0
    for field_class in f.BUILT_IN.values():
        for _ in range(300):
            arguments = good.copy()
            arguments[rng.integers(0, 290, 3)] = rng.integers(0, 256, 3)
            try:
                assert isinstance(field_class.from_binary(arguments), field_class)
            except ValueError:
                refused += 1
    assert refused > 100


class OneColumnReader:
    """What decoders ask of a reader."""

    def __init__(self, column):
        self.column = column

    def field_metadata(self, name):
        return self.column


@pytest.mark.parametrize(
    "field, values, expected",
    [
        (f.IntField(), [3, -1], np.array([[3], [-1]])),
        (f.FloatField(), [0.5, 2.0], np.array([[0.5], [2.0]])),
        (f.BytesField(), [b"ab", b"xyz"], np.array([[97, 98, 0], [120, 121, 122]], np.uint8)),
        (
            f.NDArrayField(np.float32, (2,)),
            [np.array([1, 2], np.float32), np.array([3, 4], np.float32)],
            np.array([[1, 2], [3, 4]], np.float32),
        ),
    ],
)
def test_decoders_fill_every_element_of_a_dirty_batch(field, values, expected):
    items = [encode(field, value) for value in values]
    column = np.concatenate([metadata for metadata, _ in items])
    decoder = field.get_decoder_class()()
    shape, dtype = decoder.output_spec(field, OneColumnReader(column), "x")
    out = np.full((len(values), *shape), 77, dtype)
    payloads = None if field.pointers(column) is None else [payload for _, payload in items]
    decoder.decode_batch(field, column, payloads, out)
    assert same(out, expected)


def test_default_decoders_are_ffcvs():
    assert f.IntField().get_decoder_class() is IntDecoder
    assert f.FloatField().get_decoder_class() is FloatDecoder
    assert f.BytesField().get_decoder_class() is BytesDecoder
    assert f.JSONField().get_decoder_class() is JSONDecoder
    assert f.NDArrayField(np.float32, (1,)).get_decoder_class() is NDArrayDecoder


@pytest.mark.parametrize("wrap", [np.array, torch.tensor])
def test_unpack_gives_the_objects_of_a_padded_batch_or_of_one_row(wrap):
    objects = [{"a": 1}, [1, "\u00e9", None]]
    rows = [encode(f.JSONField(), x)[1].ljust(40, b"\0") for x in objects]
    batch = wrap(np.frombuffer(b"".join(rows), np.uint8).reshape(2, 40).copy())
    assert f.JSONField.unpack(batch) == objects
    assert f.JSONField.unpack(batch[1]) == objects[1]


def test_json_without_its_end_mark_is_refused():
    metadata = np.zeros((), f.JSONField().metadata_type)
    for payload in (b"", json.dumps({}).encode(), b"{\0", b"[" * 100_000 + b"\0"):
        with pytest.raises(ValueError):
            f.JSONField().decode(metadata, payload)
