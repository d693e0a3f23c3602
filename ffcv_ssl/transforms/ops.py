"""FFCV's import path of the tensor ops."""

from ffcv_ssl.transforms.tensor import Convert, ToDevice, ToTensor, ToTorchImage, View

__all__ = ["Convert", "ToDevice", "ToTensor", "ToTorchImage", "View"]
