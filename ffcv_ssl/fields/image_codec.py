"""Images while a file is written: any picture to upright 8-bit RGB, and which JPEG bytes can be
kept.

Everything here is deterministic: the same input gives the same bytes in every process.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from ffcv_ssl.beton import MAX_IMAGE_PX

MAX_SIDE_PX = 2**16 - 1  # the metadata's uint16
_EXIF_ORIENTATION = 0x0112
_SOF_NAMES = {0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless"}
# Progressive files of real encoders have about ten scans. Each scan costs a pass over the whole
# image, so a small hostile file with many could keep a decoder busy for hours.
_START_OF_SCAN, _MAX_SCANS = b"\xff\xda", 100
# Bytes times pixels. At this bound the worst file, all of it scans of 12 bytes (3 to 4 ns a pixel
# each), takes 9 s. Photographs of 500x375 px and 180 KB are below it.
_BOUNDED_WORK = 1 << 35
# Pillow starts Ghostscript for EPS, whatever the file's name. It opens what an IPTC file contains
# as any image, EPS too.
_FORMATS_THAT_RUN_PROGRAMS = ("EPS", "IPTC")
_FORMAT_OF_FIRST_BYTES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, RSTn, SOI: no length follows


class EncodedImage:
    """The bytes of an image file (JPEG, PNG, ...), which a writer can keep without encoding."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = bytes(data)


def to_rgb(value: Any) -> np.ndarray:
    """Upright RGB pixels, uint8 (H, W, 3), C-contiguous.

    value: an EncodedImage, a PIL image, or a uint8 array (H, W, 3), (H, W) or (H, W, 1). EXIF
    rotation is applied. Transparent pixels are laid over white, because the colour under them is
    often garbage. 16-bit grey is scaled to 8 bits (v / 257, rounded). CMYK, palette and other modes
    go through Pillow's conversion; colour profiles are ignored, as in other common loaders. Raises
    TypeError or ValueError for other values.
    """
    if isinstance(value, EncodedImage):
        return _pil_to_rgb(open_image(value.data))
    if isinstance(value, Image.Image):
        return _pil_to_rgb(value)
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"expected a uint8 array, a PIL image or EncodedImage, got {type(value).__name__}"
        )
    if value.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels, got {value.dtype}; scale them to 0 to 255 first")
    if value.ndim == 2:
        value = value[:, :, None]
    if value.ndim != 3 or value.shape[2] not in (1, 3):
        raise ValueError(f"expected (height, width, 3) or grey, got shape {value.shape}")
    check_size(value.shape[0], value.shape[1])
    return np.ascontiguousarray(np.broadcast_to(value, (*value.shape[:2], 3)))


def check_size(height_px: int, width_px: int) -> None:
    """Raise ValueError unless the format can hold an image of this size."""
    if not (1 <= height_px <= MAX_SIDE_PX and 1 <= width_px <= MAX_SIDE_PX):
        raise ValueError(
            f"image of {width_px}x{height_px} px, expected sides of 1 to {MAX_SIDE_PX} px"
        )
    if height_px * width_px > MAX_IMAGE_PX:
        raise ValueError(
            f"image of {width_px}x{height_px} px, expected at most {MAX_IMAGE_PX} pixels"
        )


def open_image(data: bytes) -> Image.Image:
    """A PIL image of encoded bytes, not decoded yet. Raises ValueError for unknown formats and for
    images that are larger than the format holds."""
    try:
        with warnings.catch_warnings():  # Pillow warns of every odd tag
            warnings.simplefilter("ignore")
            image = _identify(data) if data else None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged headers
        raise ValueError(f"not a readable image ({_in_words(error)})") from None
    if image is None:
        raise ValueError(f"not a readable image ({_looks_like(data)})")
    check_size(image.height, image.width)
    return image


def _identify(data: bytes) -> Image.Image | None:
    """What Image.open gives, without its limit of 178,956,970 pixels, which is process-wide and
    lower than the format's; None for an unknown format. Sizes are not checked yet."""
    for load_plugins in (Image.preinit, Image.init):  # the usual formats, then all
        load_plugins()
        for name in Image.ID:
            make, accept = Image.OPEN[name]
            if name in _FORMATS_THAT_RUN_PROGRAMS:
                continue
            try:
                accepted = not accept or accept(data[:16])
                if accepted and not isinstance(accepted, str):  # a text says what is not installed
                    return make(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # of another format, as Image.open takes it
    return None


def _looks_like(data: bytes) -> str:
    for start, name in _FORMAT_OF_FIRST_BYTES.items():
        if data.startswith(start):
            return f"{len(data)} bytes of a {name} whose header is damaged or cut"
    if not data:
        return "an empty file"
    return f"{len(data)} bytes that start with {data[:8]!r}, expected a JPEG, PNG, ..."


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (OSError, ValueError)) else repr(error)


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    check_size(image.height, image.width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # as for headers
        raise ValueError(f"corrupt image ({_in_words(error)})") from None
    check_size(image.height, image.width)  # some formats know their size only now
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("got a floating-point image, expected 8 bits; scale it first")
    if image.mode.startswith("I"):
        image = _narrow(image)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return np.ascontiguousarray(image.convert("RGB"))


def _narrow(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: 65535 -> 255, 0 -> 0, rounded to nearest."""
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        low, high = wide.min(), wide.max()
        raise ValueError(f"got grey values {low} to {high}, expected 0 to 65535; scale them first")
    return Image.fromarray(((wide * 2 + 257) // 514).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 also for a broken EXIF block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow's EXIF parser raises nearly anything on damaged blocks
        return 1
    return value if value in range(1, 9) else 1


def shrink(pixels: np.ndarray, max_side_px: int | None) -> np.ndarray:
    """Resize to at most `max_side_px` on the longer side; never enlarge. None leaves all as it is.

    Lanczos, because Pillow's BOX weighs whole pixels only: close to ratio 1, where most photographs
    of a 500 px data set are, it becomes nearest-neighbour.
    """
    height, width = pixels.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return pixels
    ratio = max_side_px / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A baseline 4:2:0 JPEG, with the accurate DCT. pixels: uint8 (H, W, 3), C-contiguous."""
    return simplejpeg.encode_jpeg(
        pixels, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def check_jpeg(
    payload: bytes | np.ndarray, height_px: int, width_px: int, is_trusted: bool = False
) -> None:
    """Raise ValueError unless a JPEG has the promised size and a sane number of scans. Decodes
    nothing.

    payload: bytes, or a uint8 array. is_trusted: the bytes match their checksum, so the scans of a
    small image are not counted (counting takes 50 us for 60 KB, the rest 1 us). But anyone can
    write matching checksums, so those of a larger image are.
    """
    count_scans = not is_trusted or len(payload) * height_px * width_px > _BOUNDED_WORK
    if count_scans and bytes(payload).count(_START_OF_SCAN) > _MAX_SCANS:
        raise ValueError(f"got a JPEG of more than {_MAX_SCANS} scans, expected at most that many")
    height, width, _ = jpeg_header(payload)
    if (height, width) != (height_px, width_px):
        raise ValueError(f"JPEG is {width}x{height} px, the metadata says {width_px}x{height_px}")


def jpeg_header(payload: bytes | np.ndarray) -> tuple[int, int, str]:
    """(H, W, colour space) of a JPEG. Raises ValueError for what is none, or none that simplejpeg
    can decode."""
    try:
        return simplejpeg.decode_jpeg_header(payload)[:3]
    except KeyError:  # of its own: it knows no name for 4:4:1
        raise ValueError("got a chroma subsampling that simplejpeg does not know") from None


def decode_jpeg(payload: bytes, height_px: int, width_px: int) -> np.ndarray:
    """Decode a JPEG to uint8 (H, W, 3): strictly, accurate DCT, smooth chroma upsampling.

    Compares the JPEG's size with the promised one before anything is allocated. Raises ValueError
    if they differ or the data is corrupt.
    """
    check_jpeg(payload, height_px, width_px)
    return simplejpeg.decode_jpeg(payload, "RGB", fastdct=False, fastupsample=False)


def reason_to_encode(
    data: bytes, max_side_px: int | None
) -> tuple[str | None, tuple[int, int] | None]:
    """(reason, None) if these bytes cannot be kept, (None, (height, width)) if they can.

    8-bit baseline grey or YCbCr JPEGs can be kept if they decode strictly, need no resize and carry
    no EXIF rotation: this library, FFCV and every other program show them alike.
    """
    reason = _jpeg_kind(data)
    if reason is not None:
        return reason, None
    try:
        image = open_image(data)
        height, width, color_space = jpeg_header(data)
    except ValueError:
        return "not strictly decodable", None
    if color_space not in ("YCbCr", "Gray"):
        return color_space, None
    if orientation(image) != 1:
        return "rotated by EXIF", None
    if max_side_px is not None and max(height, width) > max_side_px:
        return "larger than max_resolution", None
    try:
        decode_jpeg(data, height, width)  # as a reader will: keep nothing that it refuses
    except ValueError:
        return "not strictly decodable", None
    return None, (height, width)


def _jpeg_kind(data: bytes) -> str | None:
    """None for an 8-bit baseline JPEG of one or three components, else what it is."""
    if data[:2] != b"\xff\xd8":
        return "not a JPEG"
    frame = _frame_header(data)
    if frame is None:
        return "not strictly decodable"
    marker, precision, components = frame
    if marker != 0xC0:
        return _SOF_NAMES.get(marker, "not baseline")
    if precision != 8:
        return f"{precision} bits"
    return None if components in (1, 3) else "CMYK"


def _frame_header(data: bytes) -> tuple[int, int, int] | None:
    """(marker, precision in bits, number of components) of the first frame header, if any."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _BARE_MARKERS:
            at += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (marker, data[at + 4], data[at + 9]) if at + 10 <= len(data) else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
