"""The ops a pipeline is made of: per-sample image ops (rendered by kernels) and per-batch ops
(plain callables).

`BUILT_IN_OPS` are the image ops of this folder, in the order in which view recipes apply them: a
file with a new one is found by itself. The imports below are for readers and type checkers.
"""

import pkgutil
from importlib import import_module

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


def _find_image_ops() -> tuple[type[ImageOp], ...]:
    found = []
    for file in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, ImageOp)
            and value.__module__ == module.__name__
            and value is not ImageOp
        ]
    return tuple(sorted(found, key=lambda op: (op.place, op.__name__)))


BUILT_IN_OPS = _find_image_ops()

__all__ = [
    "BUILT_IN_OPS",
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
for _op in BUILT_IN_OPS:  # those that are not imported above
    globals()[_op.__name__] = _op
    if _op.__name__ not in __all__:
        __all__.append(_op.__name__)
