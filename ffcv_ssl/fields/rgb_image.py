"""RGB images: JPEG bytes or raw pixels, with their size in the metadata.

The image decoders (`SimpleRGBImageDecoder`, `CenterCropRGBImageDecoder`,
`RandomResizedCropRGBImageDecoder`) are ops of `ffcv_ssl.transforms`; they can be imported from here
because FFCV has them here.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ssl.beton import IMAGE_METADATA_TYPE, IMAGE_MODE_JPG, IMAGE_MODE_RAW, MAX_IMAGE_PX
from ffcv_ssl.fields import image_codec
from ffcv_ssl.fields.base import ANY_SIZE, Field, Malloc, first_true
from ffcv_ssl.fields.image_codec import EncodedImage
from ffcv_ssl.kernels.hash import xxh3_64

if TYPE_CHECKING:
    from ffcv_ssl.transforms.base import ImageOp

_DECODERS = (
    "SimpleRGBImageDecoder",
    "CenterCropRGBImageDecoder",
    "RandomResizedCropRGBImageDecoder",
)
__all__ = ["EncodedImage", "RGBImageField", *_DECODERS]

WRITE_MODES = ("raw", "jpg", "smart", "proportion", "passthrough")
# Raw pixels need no decoder. Up to 64 x 64 px that is worth their bytes; larger ones would make the
# file too large.
DEFAULT_SMART_THRESHOLD_BYTES = 64 * 64 * 3
# Progressive grey JPEGs of one colour have 512 pixels per byte; no honest image has this many.
_MAX_PX_PER_BYTE = 1024


def __getattr__(name: str) -> Any:
    if name in _DECODERS:
        from ffcv_ssl import transforms

        return getattr(transforms, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RGBImageField(Field):
    """8-bit RGB images of up to 65,535 px per side.

    write_mode: what is stored of an image.
        "raw": its pixels. "jpg": a new JPEG.
        "passthrough": the original JPEG bytes if they can be kept, otherwise a new JPEG.
        "smart": the pixels if they are at most `smart_threshold` bytes, otherwise as "passthrough".
        "proportion": a new JPEG with probability `compress_probability`, otherwise the pixels. The
        choice depends on the pixels and `seed` alone.
    max_resolution: longest side in pixels; larger images are shrunk. smart_threshold: bytes; None
    means 12,288 (64 x 64 px), while FFCV's None never compresses. jpeg_quality: 1..100.

    Values: uint8 array (H, W, 3) or grey, PIL image, or EncodedImage (only its bytes can be kept).
    Source: FFCV's RGBImageField; "passthrough" is new, and that "smart" keeps JPEG bytes.
    """

    TYPE_ID = 2

    def __init__(
        self,
        write_mode: str = "raw",
        max_resolution: int | None = None,
        smart_threshold: int | None = None,
        jpeg_quality: int = 90,
        compress_probability: float = 0.5,
        *,
        seed: int = 0,
    ) -> None:
        if write_mode not in WRITE_MODES:
            expected = ", ".join(WRITE_MODES)
            raise ValueError(f"write_mode: got {write_mode!r}, expected one of {expected}")
        if max_resolution is not None and not 1 <= max_resolution <= image_codec.MAX_SIDE_PX:
            raise ValueError(
                f"max_resolution: got {max_resolution}, expected 1 to {image_codec.MAX_SIDE_PX}"
            )
        if not 1 <= int(jpeg_quality) <= 100:
            raise ValueError(f"jpeg_quality: got {jpeg_quality}, expected 1 to 100")
        if not 0 <= compress_probability <= 1:
            raise ValueError(f"compress_probability: got {compress_probability}, expected 0 to 1")
        self.write_mode = write_mode
        self.max_resolution = max_resolution
        self.smart_threshold = smart_threshold
        self.jpeg_quality = int(jpeg_quality)
        self.proportion = compress_probability
        self.seed = seed
        self._counts: Counter[str] = Counter()

    @property
    def metadata_type(self) -> np.dtype:
        return IMAGE_METADATA_TYPE

    @staticmethod
    def from_binary(binary: np.ndarray) -> RGBImageField:
        return RGBImageField()

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        mode, height, width, payload = self._encoded(value)
        destination["mode"], destination["height"], destination["width"] = mode, height, width
        destination["data_ptr"], buffer = malloc(len(payload))
        buffer[:] = np.frombuffer(payload, np.uint8)

    def _encoded(self, value: Any) -> tuple[int, int, int, bytes]:
        """(mode, height, width, payload); counts what was done and why."""
        reason = None
        if self.write_mode in ("smart", "passthrough"):
            reason, size = self._reason_to_encode(value)
            if size is not None:
                self._counts["original bytes kept"] += 1
                return IMAGE_MODE_JPG, *size, value.data
        pixels = image_codec.shrink(image_codec.to_rgb(value), self.max_resolution)
        height, width = pixels.shape[:2]
        if self._stays_raw(pixels):
            self._counts["raw"] += 1
            return IMAGE_MODE_RAW, height, width, pixels.tobytes()
        self._counts["encoded" if reason is None else f"encoded: {reason}"] += 1
        return IMAGE_MODE_JPG, height, width, image_codec.encode_jpeg(pixels, self.jpeg_quality)

    def _reason_to_encode(self, value: Any) -> tuple[str | None, tuple[int, int] | None]:
        """(reason, None) if the bytes cannot be kept, (None, (height, width)) if they can."""
        if not isinstance(value, EncodedImage):
            return "given as pixels", None
        reason, size = image_codec.reason_to_encode(value.data, self.max_resolution)
        if size is not None and self.write_mode == "smart" and self._is_small(*size):
            return "small", None
        return reason, size

    def _is_small(self, height: int, width: int) -> bool:
        threshold = self.smart_threshold
        return 3 * height * width <= (
            DEFAULT_SMART_THRESHOLD_BYTES if threshold is None else threshold
        )

    def _stays_raw(self, pixels: np.ndarray) -> bool:
        if self.write_mode == "smart":
            return self._is_small(*pixels.shape[:2])
        if self.write_mode == "proportion":
            key = int(self.seed).to_bytes(16, "little", signed=True)
            draw = xxh3_64(key + np.array(pixels.shape, "<u4").tobytes() + pixels.tobytes())
            return draw / 2**64 >= self.proportion
        return self.write_mode == "raw"

    def take_counts(self) -> dict[str, int]:
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def expected_sizes(self, column: np.ndarray) -> np.ndarray:
        pixel_bytes = _num_pixels(column) * np.uint64(3)
        return np.where(column["mode"] == IMAGE_MODE_RAW, pixel_bytes, ANY_SIZE)

    def find_bad_sample(
        self, column: np.ndarray, sizes: np.ndarray | None
    ) -> tuple[int, str] | None:
        assert sizes is not None, "images have payloads"
        num_pixels = _num_pixels(column)
        for bad, reason in (
            (column["mode"] > IMAGE_MODE_RAW, "image mode is neither 0 (jpg) nor 1 (raw)"),
            (num_pixels == 0, "image has no pixels"),
            (num_pixels > MAX_IMAGE_PX, f"image is larger than {MAX_IMAGE_PX} pixels"),
            (num_pixels // _MAX_PX_PER_BYTE > sizes, "image is too large for its few bytes"),
        ):
            index = first_true(bad)
            if index is not None:
                return index, reason
        return None

    def decode(self, metadata_row: Any, payload: bytes) -> np.ndarray:
        height, width = int(metadata_row["height"]), int(metadata_row["width"])
        if metadata_row["mode"] == IMAGE_MODE_JPG:
            return image_codec.decode_jpeg(payload, height, width)
        if len(payload) != height * width * 3:
            raise ValueError(f"raw image: got {len(payload)} bytes, expected {height * width * 3}")
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3).copy()

    def get_decoder_class(self) -> type[ImageOp]:
        from ffcv_ssl.transforms import SimpleRGBImageDecoder

        return SimpleRGBImageDecoder


def _num_pixels(column: np.ndarray) -> np.ndarray:
    return np.multiply(column["height"], column["width"], dtype=np.uint64)
