"""Our JPEG decoder: each byte is simplejpeg's, whole or in a box; the unusual is left to it."""

import io
import random
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from support import jpeg_twin
from torture import jpegs
from torture.jpeg_mutants import encoded, mutant, picture, seeds

from ffcv_ssl.kernels.jpeg import MARGIN, JpegDecoder, work_bytes

DECODER = JpegDecoder()


def decode(data, box=None, to_end=True, shape=None):
    """Our pixels (H, W, 3), poisoned outside the box; None where it is left to simplejpeg."""
    height, width = shape or simplejpeg.decode_jpeg_header(data)[:2]
    data = np.frombuffer(data, np.uint8)
    pixels = np.full(3 * height * width + MARGIN, 99, np.uint8)
    work = np.full(work_bytes(len(data), height, width), 99, np.uint8)
    box = box or (0, 0, height, width)
    if not DECODER.decode(data, (height, width), box, to_end, pixels, work):
        return None
    return pixels[: 3 * height * width].reshape(height, width, 3)


def oracle(data):
    return simplejpeg.decode_jpeg(data, "RGB", strict=True)


@pytest.mark.parametrize("sampling", ["420", "422", "444", "Gray", "restarts", "optimized"])
@pytest.mark.parametrize("quality", [5, 50, 90, 98, 100])
def test_pixels_are_simplejpegs(sampling, quality):
    for number in range(25):
        data = encoded(picture(number), sampling, quality)
        pixels = decode(data)
        # libjpeg treats very narrow chroma in another way
        assert pixels is not None or picture(number).shape[1] < 6
        assert pixels is None or np.array_equal(pixels, oracle(data))


def test_pixels_of_a_box_are_those_of_the_whole_image():
    rng = np.random.default_rng(0)
    for data in seeds()[:100]:
        whole = decode(data)
        for _ in range(6 if whole is not None else 0):
            height, width = whole.shape[:2]
            top, left = rng.integers(0, height), rng.integers(0, width)
            bottom, right = rng.integers(top + 1, height + 1), rng.integers(left + 1, width + 1)
            box = tuple(map(int, (top, left, bottom, right)))
            pixels = decode(data, box, to_end=bool(rng.integers(2)))
            inside = slice(top, bottom), slice(left, right)
            assert np.array_equal(pixels[inside], whole[inside])


@pytest.mark.parametrize(
    "box",
    [
        (-1, 0, 8, 8),
        (0, -9, 8, 8),
        (0, 0, 10_000, 8),
        (0, 0, 8, 10_000),
        (5, 0, 5, 8),
        (0, 9, 8, 8),
    ],
)
def test_a_box_outside_the_image_or_without_pixels_is_refused(box):
    assert decode(encoded(picture(7), "420", 90), box) is None


def test_the_twin_makes_the_same_pixels():
    for number, sampling in enumerate(["420", "422", "444", "Gray", "restarts", "optimized"]):
        data = encoded(picture(number + 40)[:40, :50], sampling, 85)
        assert np.array_equal(jpeg_twin.decode(data), oracle(data))
        assert np.array_equal(decode(data), jpeg_twin.decode(data))


@pytest.mark.slow
def test_photographs_of_any_size_and_quality_are_simplejpegs(data_folder):
    rng = np.random.default_rng(1)
    with tarfile.open(data_folder / "imagenette224.tar") as tar:
        files = [member for member in tar if member.isfile()]
        for k in rng.permutation(len(files))[:600]:
            data = tar.extractfile(files[k]).read()
            kinds = [data]
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for sampling in ("420", "422", "444"):
                size = tuple(int(side) for side in rng.integers(6, 260, 2))
                pixels = np.asarray(image.resize(size))
                kinds.append(encoded(pixels, sampling, int(rng.integers(1, 101))))
            for kind in kinds:
                pixels = decode(kind)
                assert pixels is not None and np.array_equal(pixels, oracle(kind))


def test_a_change_of_tables_from_image_to_image_is_noticed():
    """Tables are kept from image to image; a damaged one is not taken for the one before it."""
    optimized = [encoded(picture(k), "optimized", 80) for k in (3, 4, 5)]
    for data in [*optimized, seeds()[0], *optimized[::-1]]:
        assert np.array_equal(decode(data), oracle(data))
    sound = optimized[0]
    place = sound.index(b"\xff\xc4") + 5
    wrong = sound[:place] + b"\xff" + sound[place + 1 :]
    assert decode(wrong, shape=picture(3).shape[:2]) is None
    assert decode(wrong, shape=picture(3).shape[:2]) is None
    assert np.array_equal(decode(sound), oracle(sound))


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["progressive", "CMYK", "narrow", "Adobe RGB", "4:4:0", "sizes"])
def test_what_is_not_plain_is_left_to_simplejpeg(kind):
    image, shape = Image.fromarray(picture(7)), None
    data = saved(image, quality=90)
    if kind == "progressive":
        data = saved(image, progressive=True)
    elif kind == "CMYK":
        data = saved(image.convert("CMYK"))
    elif kind == "narrow":
        data = saved(image.resize((3, 40)), subsampling=2)
    elif kind == "Adobe RGB":
        data = data[:2] + b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\0" + data[2:]
    elif kind == "4:4:0":
        data = simplejpeg.encode_jpeg(picture(7), 90, "RGB", "440")
    else:
        shape = (picture(7).shape[0] + 1, picture(7).shape[1])
    assert decode(data, shape=shape) is None


def test_a_scan_that_ends_elsewhere_than_the_image_is_refused_unless_only_a_box_counts():
    data = encoded(np.repeat(picture(7), 2, axis=0), "420", 90)
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    assert decode(data[:-30], shape=(height, width)) is None
    longer = data[:-2] + b"\x12\x34" + data[-2:]  # extraneous bytes
    with pytest.raises(ValueError):
        oracle(longer)
    assert decode(longer) is None
    top = (0, 0, 8, width)
    assert np.array_equal(decode(longer, top, to_end=False)[:8], oracle(data)[:8])


def test_coefficients_beyond_the_range_of_16_bits_are_left_to_simplejpeg():
    """There libjpeg-turbo's vector code and its C code differ."""
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 1), np.uint8) * 255
    data = bytearray(simplejpeg.encode_jpeg(np.ascontiguousarray(noise), 100, "GRAY", "Gray"))
    assert np.array_equal(decode(bytes(data)), oracle(bytes(data)))
    place = data.index(b"\xff\xdb") + 5
    data[place : place + 64] = bytes([255]) * 64
    assert decode(bytes(data)) is None


def test_mutants_between_pages_that_nobody_may_touch():
    """A sample of `make torture ONLY=jpegs`, whose million trials are in docs/reliability.md."""
    choose = random.Random(5)
    outcomes = [
        jpegs.try_mutant(mutant(choose.choice(seeds()), choose), choose) for _ in range(4000)
    ]
    assert {"equal pixels", "refused by both", "left to simplejpeg"} <= set(outcomes)
    accepted = sum(outcome in ("equal pixels", "left to simplejpeg") for outcome in outcomes)
    assert accepted > 0.3 * len(outcomes)
