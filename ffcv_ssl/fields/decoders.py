"""FFCV's import path of all decoders."""

from ffcv_ssl.fields.basics import FloatDecoder, IntDecoder
from ffcv_ssl.fields.bytes import BytesDecoder
from ffcv_ssl.fields.ndarray import NDArrayDecoder
from ffcv_ssl.transforms.crop import (
    CenterCrop,
    RandomResizedCrop,
    SimpleRGBImageDecoder,
)

RandomResizedCropRGBImageDecoder = RandomResizedCrop
CenterCropRGBImageDecoder = CenterCrop

__all__ = [
    "BytesDecoder",
    "CenterCropRGBImageDecoder",
    "FloatDecoder",
    "IntDecoder",
    "NDArrayDecoder",
    "RandomResizedCropRGBImageDecoder",
    "SimpleRGBImageDecoder",
]
