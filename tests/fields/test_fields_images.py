"""Images at writing: which bytes are kept, and how everything else becomes upright 8-bit RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from support.beton_files import encode, pattern

from ffcv_ssl import fields as f
from ffcv_ssl.fields import image_codec


def image_file(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f.EncodedImage(out.getvalue())


def photo(height_px=40, width_px=30):
    return Image.fromarray(pattern(1, height_px, width_px))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image_file(photo(), "PNG", exif=exif)
    with Image.open(io.BytesIO(image.data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(image_codec.to_rgb(image), expected)
    assert expected.shape == ((40, 30, 3) if orientation < 5 else (30, 40, 3))


@pytest.mark.parametrize("kind", ["png", "pil"])
def test_transparency_is_laid_over_white(kind):
    rgb, alpha = pattern(2, 9, 8), np.linspace(0, 255, 72).astype(np.uint8).reshape(9, 8)
    image = Image.fromarray(np.dstack([rgb, alpha]))
    got = image_codec.to_rgb(image_file(image, "PNG") if kind == "png" else image)
    weight = alpha[..., None] / 255
    assert np.abs(got - (rgb * weight + 255 * (1 - weight))).max() <= 1
    assert (got[alpha == 0] == 255).all()


def test_sixteen_bit_grey_is_scaled_to_the_nearest_level():
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.round(wide / 257).astype(np.uint8)
    got = image_codec.to_rgb(image_file(Image.fromarray(wide), "PNG"))
    assert np.array_equal(got, expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "LA", "HSV"])
def test_every_mode_becomes_three_channels_of_its_own_colours(mode):
    image = photo().convert(mode)
    got = image_codec.to_rgb(image)
    assert np.array_equal(got, np.asarray(image.convert("RGB")))


def test_palette_transparency_is_laid_over_white():
    image = Image.new("P", (4, 3))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = 0
    assert (image_codec.to_rgb(image) == 255).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_grey_arrays_are_repeated_over_the_channels(shape):
    grey = np.arange(30, dtype=np.uint8).reshape(shape)
    assert np.array_equal(image_codec.to_rgb(grey)[..., 2], grey.reshape(6, 5))


@pytest.mark.parametrize(
    "size, limit, expected",
    [
        ((40, 30), 20, (20, 15)),
        ((30, 41), 20, (15, 20)),
        ((20, 9), 20, (20, 9)),
        ((500, 1), 9, (9, 1)),
    ],
)
def test_images_are_shrunk_to_the_limit_and_never_enlarged(size, limit, expected):
    assert image_codec.shrink(pattern(0, *size), limit).shape[:2] == expected


def test_new_jpegs_are_baseline_with_half_chroma_and_close_to_the_pixels():
    pixels = np.asarray(photo(64, 64))
    metadata, payload = encode(f.RGBImageField("jpg", jpeg_quality=95), pixels)
    assert simplejpeg.decode_jpeg_header(payload)[2:] == ("YCbCr", "420")
    assert image_codec._frame_header(payload)[:2] == (0xC0, 8)
    smooth = np.asarray(photo(64, 64).resize((4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    metadata, payload = encode(f.RGBImageField("jpg", jpeg_quality=95), smooth)
    got = f.RGBImageField().decode(metadata[0], payload)
    assert np.abs(got.astype(int) - smooth).mean() < 3


def rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_file(photo(), exif=exif)


def broken_exif_jpeg():
    good = image_file(photo()).data
    block = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    return f.EncodedImage(
        good[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + good[2:]
    )


def rgb_jpeg():
    return image_file(photo(), keep_rgb=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: image_file(photo(), quality=80),
        lambda: image_file(photo(), quality=80, subsampling=0),
        lambda: image_file(photo().convert("L")),
        broken_exif_jpeg,
    ],
)
@pytest.mark.parametrize("mode", ["passthrough", "smart"])
def test_original_bytes_are_kept_where_they_serve(make, mode):
    image, field = make(), f.RGBImageField(mode, smart_threshold=100)
    metadata, payload = encode(field, image)
    assert payload == image.data
    assert (metadata["height"][0], metadata["width"][0], metadata["mode"][0]) == (40, 30, 0)
    assert field.take_counts() == {"original bytes kept": 1}
    assert field.take_counts() == {}


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: image_file(photo(), progressive=True), "progressive"),
        (lambda: image_file(photo().convert("CMYK")), "CMYK"),
        (lambda: image_file(photo(), "PNG"), "not a JPEG"),
        (lambda: image_file(photo(200, 30)), "larger than max_resolution"),
        (rotated_jpeg, "rotated by EXIF"),
        (rgb_jpeg, "RGB"),
        (lambda: photo(), "given as pixels"),
        (lambda: pattern(0, 40, 30), "given as pixels"),
    ],
)
def test_everything_else_is_encoded_anew_and_counted_by_reason(make, reason):
    field = f.RGBImageField("passthrough", max_resolution=100)
    metadata, payload = encode(field, make())
    assert field.take_counts() == {f"encoded: {reason}": 1}
    assert image_codec._frame_header(payload)[0] == 0xC0
    assert field.decode(metadata[0], payload).shape[2] == 3
    assert reason != "rotated by EXIF" or metadata["width"][0] == 40


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xda"])  # first table, start of scan
def test_a_jpeg_that_only_lenient_decoders_take_is_encoded_anew(marker):
    good = image_file(photo()).data
    at = good.index(marker)
    odd = f.EncodedImage(good[:at] + b"\0\0\0" + good[at:])
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(odd.data, "RGB")
    field = f.RGBImageField("passthrough")
    metadata, payload = encode(field, odd)
    assert field.take_counts() == {"encoded: not strictly decodable": 1}
    assert field.decode(metadata[0], payload).shape == (40, 30, 3)


def test_smart_keeps_small_images_raw_and_compresses_large_ones():
    field = f.RGBImageField("smart")
    assert encode(field, pattern(0, 64, 64))[0]["mode"][0] == 1
    assert encode(field, pattern(0, 64, 65))[0]["mode"][0] == 0
    small = image_file(photo())
    metadata, payload = encode(field, small)
    assert np.array_equal(field.decode(metadata[0], payload), simplejpeg.decode_jpeg(small.data))
    assert field.take_counts() == {"raw": 2, "encoded: given as pixels": 1}


def test_proportion_depends_on_pixels_and_seed_alone_and_meets_its_probability():
    def modes(seed):
        field = f.RGBImageField("proportion", compress_probability=0.3, seed=seed)
        return [int(encode(field, pattern(i, 3, 1 + i % 17))[0]["mode"][0]) for i in range(600)]

    first = modes(0)
    assert first == modes(0)
    assert first != modes(1)
    assert 0.22 < 1 - np.mean(first) < 0.38


@pytest.mark.parametrize("change", [{"width": 29}, {"height": 65535, "width": 65535}, {"mode": 1}])
def test_metadata_that_contradicts_the_payload_is_refused(change):
    metadata, payload = encode(f.RGBImageField("jpg"), pattern(0, 40, 30))
    for name, value in change.items():
        metadata[name] = value
    with pytest.raises(ValueError):
        f.RGBImageField().decode(metadata[0], payload)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mode": 2}, "mode"),
        ({"height": 0}, "no pixels"),
        ({"height": 65535, "width": 65535}, "larger than"),
        ({"height": 9000, "width": 9000}, "too large for its few bytes"),
    ],
)
def test_impossible_images_are_found_in_the_metadata_alone(change, reason):
    column = np.concatenate(
        [encode(f.RGBImageField("jpg"), pattern(i, 40, 30))[0] for i in range(3)]
    )
    sizes = np.full(3, 900, np.uint64)
    assert f.RGBImageField().find_bad_sample(column, sizes) is None
    for name, value in change.items():
        column[name][1] = value
    index, text = f.RGBImageField().find_bad_sample(column, sizes)
    assert index == 1
    assert reason in text


def test_truncated_and_flipped_jpegs_never_decode_to_another_size():
    payload = encode(f.RGBImageField("jpg"), pattern(0, 40, 30))[1]
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(payload[: rng.integers(0, len(payload) + 1)])
        for at in rng.integers(0, max(1, len(damaged)), 2):
            if damaged:
                damaged[at] ^= 1 << int(rng.integers(8))
        try:
            assert image_codec.decode_jpeg(bytes(damaged), 40, 30).shape == (40, 30, 3)
        except ValueError:
            continue


def test_a_jpeg_whose_subsampling_simplejpeg_cannot_name_is_refused_and_not_kept():
    """It raises KeyError for 4:4:1."""
    data = bytearray(
        simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), colorsubsampling="444")
    )
    data[data.index(b"\xff\xc0") + 11] = 0x14  # of the luma: 1 across, 4 down
    with pytest.raises(ValueError, match="got a chroma subsampling that simplejpeg does not know"):
        image_codec.check_jpeg(bytes(data), 16, 16)
    assert image_codec.reason_to_encode(bytes(data), None)[0] == "not strictly decodable"


def test_a_jpeg_of_very_many_scans_is_refused():
    payload = image_file(photo(), progressive=True).data
    assert image_codec.decode_jpeg(payload, 40, 30).shape == (40, 30, 3)
    start = payload.rindex(b"\xff\xda")
    scan = payload[start:-2]
    with pytest.raises(ValueError, match="scans"):
        image_codec.decode_jpeg(payload[:start] + scan * 200 + payload[-2:], 40, 30)


def of_size(kind, height_px, width_px):
    """A small file whose header promises an image of that size."""
    data = bytearray(image_file(photo(), kind).data)
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height_px, width_px)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", width_px, height_px)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        data[18:26] = struct.pack("<II", width_px, height_px)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_the_limit_of_2_to_the_28_pixels_holds_on_both_sides(kind):
    side_px = 1 << 14
    assert image_codec.open_image(of_size(kind, side_px, side_px)).size == (side_px, side_px)
    with pytest.raises(ValueError, match="16384x16385 px, expected at most 268435456 pixels"):
        image_codec.open_image(of_size(kind, side_px + 1, side_px))
    image_codec.check_size(side_px, side_px)
    pixel = np.zeros((1, 1, 3), np.uint8)  # an array of that many takes no memory
    with pytest.raises(ValueError, match="expected at most 268435456 pixels"):
        f.image_codec.to_rgb(np.broadcast_to(pixel, (side_px + 1, side_px, 3)))


def test_a_reader_has_the_same_limit_as_the_writer():
    column, sizes = encode(f.RGBImageField("jpg"), photo())[0], np.full(1, 1 << 20, np.uint64)
    column["height"] = column["width"] = 1 << 14
    assert f.RGBImageField().find_bad_sample(column, sizes) is None
    column["height"] += 1
    assert f.RGBImageField().find_bad_sample(column, sizes)[1].startswith("image is larger than")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"<html>", "6 bytes that start with b'<html>', expected a JPEG, PNG"),
        (b"\xff\xd8" + bytes(98), "100 bytes of a JPEG whose header is damaged or cut"),
        (b"\x89PNG\r\n", "6 bytes of a PNG whose header is damaged or cut"),
    ],
)
def test_an_unreadable_image_says_what_its_bytes_are(data, message):
    with pytest.raises(ValueError, match="not a readable image") as error:
        image_codec.to_rgb(f.EncodedImage(data))
    assert message in str(error.value) and "0x" not in str(error.value)


def test_no_image_starts_another_program():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="not a readable image"):
        image_codec.to_rgb(f.EncodedImage(postscript))
