"""The ops a pipeline is made of: per-sample image ops (rendered by kernels) and per-batch ops
(plain callables)."""

from ffcv_ssl.transforms.base import ImageOp
from ffcv_ssl.transforms.color_jitter import RandomColorJitter
from ffcv_ssl.transforms.crop import CenterCrop, Crop, RandomResizedCrop, SimpleRGBImageDecoder
from ffcv_ssl.transforms.equalize import RandomEqualize
from ffcv_ssl.transforms.flip import RandomHorizontalFlip
from ffcv_ssl.transforms.gaussian_blur import GaussianBlur
from ffcv_ssl.transforms.gaussian_noise import GaussianNoise
from ffcv_ssl.transforms.grayscale import RandomGrayscale
from ffcv_ssl.transforms.normalize import NormalizeImage
from ffcv_ssl.transforms.solarization import RandomSolarization
from ffcv_ssl.transforms.tensor import (
    BatchOp,
    Convert,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
    View,
)

RandomResizedCropRGBImageDecoder = RandomResizedCrop
CenterCropRGBImageDecoder = CenterCrop

__all__ = [
    "BatchOp",
    "CenterCrop",
    "CenterCropRGBImageDecoder",
    "Convert",
    "Crop",
    "GaussianBlur",
    "GaussianNoise",
    "ImageOp",
    "NormalizeImage",
    "RandomColorJitter",
    "RandomEqualize",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomResizedCropRGBImageDecoder",
    "RandomSolarization",
    "SimpleRGBImageDecoder",
    "Squeeze",
    "ToDevice",
    "ToTensor",
    "ToTorchImage",
    "View",
]
