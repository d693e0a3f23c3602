"""Normalization of a batch of images, on the device that the batch is on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ffcv_ssl.transforms.tensor import BatchOp, torch_dtype


class NormalizeImage(BatchOp):
    """(v - mean) / std per channel. mean, std: of values in 0..255, one number a channel; type: the
    result's dtype.

    Stands anywhere after the image ops: on NumPy (N, H, W, C), on a tensor before ToTorchImage (N,
    H, W, C) or after it (N, C, H, W). After ToDevice it runs on the device, so that bytes cross the
    bus. Computed in float32.
    """

    def __init__(self, mean: Any, std: Any, type: Any = np.float32) -> None:
        self.mean = np.asarray(mean, np.float32).reshape(-1)
        self.std = np.asarray(std, np.float32).reshape(-1)
        self.type = type
        self.channels_first = False  # set by the pipeline when a ToTorchImage stands before it
        self._on_device: dict[tuple, tuple[torch.Tensor, ...]] = {}
        if self.mean.shape != self.std.shape or not (self.std > 0).all():
            raise ValueError(
                f"NormalizeImage: got mean {self.mean.tolist()} and std {self.std.tolist()}, "
                "expected one number per channel in each, and std above 0"
            )

    def __call__(self, batch: Any) -> Any:
        channels = batch.shape[1 if self.channels_first else -1]
        if channels != len(self.mean):
            raise ValueError(
                f"NormalizeImage: got {channels} channels (shape {tuple(batch.shape)}), "
                f"expected {len(self.mean)}, the length of mean"
            )
        if isinstance(batch, np.ndarray):
            return ((batch.astype(np.float32) - self.mean) / self.std).astype(self.type)
        mean, std = self._constants(batch.device)
        return batch.to(torch.float32).sub_(mean).div_(std).to(torch_dtype(self.type))

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        key = (device, self.channels_first)
        if key not in self._on_device:
            shape = (1, -1, 1, 1) if self.channels_first else (-1,)
            tensors = (torch.from_numpy(a.copy()).view(shape) for a in (self.mean, self.std))
            self._on_device[key] = tuple(t.to(device) for t in tensors)
        return self._on_device[key]
