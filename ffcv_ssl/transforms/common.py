"""FFCV's import path of `Squeeze`."""

from ffcv_ssl.transforms.tensor import Squeeze

__all__ = ["Squeeze"]
