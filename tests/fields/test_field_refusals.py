"""What fields refuse, and the line that says so."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from support.beton_files import encode

from ffcv_ssl import beton
from ffcv_ssl import fields as f
from ffcv_ssl.fields import base, image_codec
from ffcv_ssl.fields.ndarray import _parse_type

REFUSAL = (ValueError, TypeError)


def picture(mode, size=(4, 3), value=0):
    return Image.new(mode, size, value)


REFUSED_VALUES = [
    (f.IntField(), "cat", "expected an integer, got str"),
    (f.IntField(), 2**63, "got 9223372036854775808, expected an integer of 64 bits"),
    (f.FloatField(), "1.5", "expected a number, got str"),
    (f.BytesField(), "text", r"expected bytes or a 1-d uint8 array, got str"),
    (
        f.BytesField(),
        np.zeros((2, 2)),
        r"expected bytes or a 1-d uint8 array, got float64 \(2, 2\)",
    ),
    (
        f.JSONField(),
        {1, 2},
        "not serialisable as JSON: Object of type set is not JSON serializable",
    ),
    (f.NDArrayField("f4", (2,)), np.zeros(3), r"expected float32 \(2,\), got float64 \(3,\)"),
    (f.TorchTensorField(torch.int64, (2,)), [1, 2], "expected a torch tensor, got list"),
    (f.RGBImageField(), "a.jpg", "expected a uint8 array, a PIL image or EncodedImage, got str"),
    (
        f.RGBImageField(),
        np.zeros((2, 2, 3)),
        "expected uint8 pixels, got float64; scale them to 0 to 255 first",
    ),
    (
        f.RGBImageField(),
        np.zeros((2, 2, 4), np.uint8),
        r"expected \(height, width, 3\) or grey, got shape \(2, 2, 4\)",
    ),
    (
        f.RGBImageField(),
        np.zeros((0, 2, 3), np.uint8),
        "image of 2x0 px, expected sides of 1 to 65535 px",
    ),
    (
        f.RGBImageField(),
        np.broadcast_to(np.zeros(3, np.uint8), (60000, 60000, 3)),
        r"image of 60000x60000 px, expected at most \d+ pixels",
    ),
    (
        f.RGBImageField(),
        picture("F"),
        "got a floating-point image, expected 8 bits; scale it first",
    ),
    (
        f.RGBImageField(),
        picture("I", value=-5),
        "got grey values -5 to -5, expected 0 to 65535; scale them first",
    ),
]


@pytest.mark.parametrize("field, value, line", REFUSED_VALUES)
def test_a_value_that_does_not_fit_its_field_is_refused(field, value, line):
    with pytest.raises(REFUSAL, match=f"^{line}$"):
        encode(field, value)


REFUSED_SETTINGS = [
    (
        lambda: f.NDArrayField(object, (2,)),
        "dtype: got object, expected a plain type of fixed size",
    ),
    (
        lambda: f.NDArrayField("f4", (2, 0)),
        r"shape: got \(2, 0\), expected 1 to 32 dimensions of at least 1",
    ),
    (
        lambda: f.NDArrayField("f4", (2**30,)),
        r"shape: got 4294967296 bytes per sample, expected 1 to \d+",
    ),
    (
        lambda: f.TorchTensorField(torch.bfloat16, (2,)),
        r"dtype: torch.bfloat16 has no NumPy counterpart \(.*\); use another dtype",
    ),
    (lambda: f.RGBImageField("png"), "write_mode: got 'png', expected one of raw, .*"),
    (lambda: f.RGBImageField(max_resolution=0), "max_resolution: got 0, expected 1 to 65535"),
    (lambda: f.RGBImageField(jpeg_quality=101), "jpeg_quality: got 101, expected 1 to 100"),
    (
        lambda: f.RGBImageField(compress_probability=1.5),
        "compress_probability: got 1.5, expected 0 to 1",
    ),
]


@pytest.mark.parametrize("make, line", REFUSED_SETTINGS)
def test_settings_that_no_field_can_have_are_refused(make, line):
    with pytest.raises(REFUSAL, match=f"^{line}$"):
        make()


def test_bytes_that_are_no_image_are_refused():
    with pytest.raises(REFUSAL, match=r"^not a readable image \(.*\)$"):
        image_codec.to_rgb(f.EncodedImage(b"no image"))
    written = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(written, "PNG")
    with pytest.raises(REFUSAL, match=r"^corrupt image \(.*\)$"):
        image_codec.to_rgb(f.EncodedImage(written.getvalue()[:2000]))


def iptc(content):
    """An IPTC file that contains these bytes as its image."""

    def field(record, tag, data):
        return bytes([0x1C, record, tag]) + len(data).to_bytes(2, "big") + data

    size = (8).to_bytes(2, "big")
    head = field(3, 60, b"\1\0") + field(3, 20, size) + field(3, 30, size) + field(3, 120, b"\5")
    return head + field(8, 10, content) + bytes(5)


@pytest.mark.parametrize("wrap", [bytes, iptc])
def test_no_image_starts_a_program(monkeypatch, wrap):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    with pytest.raises(REFUSAL, match=r"^not a readable image"):
        image_codec.to_rgb(f.EncodedImage(wrap(eps)))
    assert not started


def test_an_image_that_turns_out_larger_than_its_header_says_is_refused(monkeypatch):
    image = Image.new("L", (1, 1))
    monkeypatch.setattr(image, "load", lambda: setattr(image, "_size", (2**16, 1)))
    with pytest.raises(REFUSAL, match=r"^image of 65536x1 px, expected sides of 1 to 65535 px$"):
        image_codec.to_rgb(image)


def test_a_lack_of_memory_is_not_taken_for_a_damaged_image(monkeypatch):
    def lack(data):
        raise MemoryError

    monkeypatch.setattr(image_codec, "_identify", lack)
    with pytest.raises(MemoryError):
        image_codec.open_image(b"any")


def test_a_jpeg_that_contradicts_its_metadata_is_refused():
    raw = image_codec.encode_jpeg(np.zeros((8, 16, 3), np.uint8), 90)
    with pytest.raises(REFUSAL, match=r"^JPEG is 16x8 px, the metadata says 16x9$"):
        image_codec.check_jpeg(raw, 9, 16)
    with pytest.raises(
        REFUSAL, match=r"^got a JPEG of more than \d+ scans, expected at most that many$"
    ):
        image_codec.check_jpeg(raw + image_codec._START_OF_SCAN * 1000, 8, 16)


def test_scans_are_counted_under_a_checksum_too_where_they_could_take_minutes():
    """A progressive file with the checksum that its writer gave it, and 35,000 scans of the whole
    image: each takes a pass over a million pixels."""
    written = io.BytesIO()
    Image.new("L", (1024, 1024), 128).save(written, "JPEG", progressive=True)
    raw = written.getvalue()
    last_scan = raw[raw.rindex(image_codec._START_OF_SCAN) : -2]
    hostile = raw[:-2] + last_scan * 35_000 + raw[-2:]
    with pytest.raises(REFUSAL, match=r"^got a JPEG of more than \d+ scans"):
        image_codec.check_jpeg(hostile, 1024, 1024, is_trusted=True)


def test_scans_of_usual_photographs_are_not_counted_under_a_checksum():
    class Uncounted(bytes):
        def __bytes__(self):
            raise AssertionError("counted")

    raw = image_codec.encode_jpeg(np.zeros((375, 500, 3), np.uint8), 90)
    photograph = Uncounted(raw.ljust(180_000, b"\0"))
    image_codec.check_jpeg(photograph, 375, 500, is_trusted=True)


def test_a_raw_image_of_another_size_is_refused():
    metadata, payload = encode(f.RGBImageField("raw"), np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(REFUSAL, match=r"^raw image: got 17 bytes, expected 18$"):
        f.RGBImageField().decode(metadata[0], payload[:-1])


@pytest.mark.parametrize("raw", [b"x", b"[]", b'[["", 3]]', b'[["", "object"]]', b'[["", "<f3"]]'])
def test_an_array_type_that_is_not_one_plain_type_is_refused(raw):
    with pytest.raises(REFUSAL, match=r"^got array type .*, expected one plain type$"):
        _parse_type(raw)


def test_an_array_type_of_an_impossible_size_is_refused():
    raw = np.zeros(beton.ARG_TYPE.itemsize, np.uint8)
    with pytest.raises(REFUSAL, match=r"^got an array type of 0 bytes, expected 1 to \d+$"):
        f.NDArrayField.from_binary(raw)


def test_an_array_type_that_torch_lacks_is_refused():
    raw = f.NDArrayField("S4", (2,)).to_binary()
    with pytest.raises(REFUSAL, match=r"^\|S4 has no torch counterpart \(.*\)$"):
        f.TorchTensorField.from_binary(np.frombuffer(raw.tobytes(), np.uint8))


def test_json_without_its_end_or_too_deep_is_refused():
    with pytest.raises(REFUSAL, match=r"^JSON text has no end mark$"):
        f.JSONField.unpack(np.frombuffer(b"{}", np.uint8))
    deep = b"[" * 10**5 + b"]" * 10**5 + encode(f.JSONField(), 0)[1][len(json.dumps(0)) :]
    with pytest.raises(REFUSAL, match=r"^JSON text is nested too deeply$"):
        f.JSONField.unpack(np.frombuffer(deep, np.uint8))


class Bare(f.IntField):
    """A field of a user's own that misses what it must define."""

    decode = base.Field.decode


def test_fields_and_decoders_without_their_methods_say_what_to_define():
    with pytest.raises(REFUSAL, match=r"^Bare has no method decode; define one to read samples$"):
        Bare().decode(0, b"")
    decoder = type("Mine", (base.Decoder,), {})()
    with pytest.raises(REFUSAL, match=r"^Mine has no method output_spec; define one$"):
        decoder.output_spec(None, None, "x")
    with pytest.raises(REFUSAL, match=r"^Mine has no method decode_batch; define one$"):
        decoder.decode_batch(None, None, None, None)


def test_a_name_that_the_image_module_lacks_is_refused():
    from ffcv_ssl.fields import rgb_image

    with pytest.raises(AttributeError, match=r"module '.*rgb_image' has no attribute 'Nothing'"):
        rgb_image.Nothing  # noqa: B018
