"""Ops on the whole batch: to a tensor, to a device, to channels first, and changes of dtype or
shape. As in FFCV.

They are callables: batch in, batch out. They run in the consumer's thread, in the order of the
list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TORCH_DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


def torch_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype of a torch or NumPy one. ValueError for one that torch lacks."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if np.dtype(dtype) not in TORCH_DTYPES:
        raise ValueError(f"got {dtype!r}, expected a dtype that torch has too")
    return TORCH_DTYPES[np.dtype(dtype)]


def is_tensor_type(dtype: np.dtype) -> bool:
    """Whether torch can take an array of this dtype as it is."""
    try:
        torch.from_numpy(np.empty(0, dtype))
    except TypeError:
        return False
    return True


class BatchOp:
    """Base of the built-in ops that act on a whole batch. `__call__(batch) -> batch`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


class ToTensor(BatchOp):
    """NumPy batch -> torch tensor on the same memory."""

    def __call__(self, batch: Any) -> Any:
        return batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch)


class ToDevice(BatchOp):
    """Move the batch to `device`. To a CUDA device the loader copies on a stream of its own and
    hands over by event."""

    def __init__(self, device: Any, non_blocking: bool = True) -> None:
        self.device, self.non_blocking = torch.device(device), non_blocking

    def __call__(self, batch: Any) -> Any:
        return batch.to(self.device, non_blocking=self.non_blocking)


class ToTorchImage(BatchOp):
    """(N, H, W, C) -> (N, C, H, W): a view in channels_last memory, or with channels_last=False a
    contiguous copy.

    convert_back_int16 is accepted for FFCV's sake and changes nothing.
    """

    def __init__(self, channels_last: bool = True, convert_back_int16: bool = True) -> None:
        self.channels_last = channels_last

    def __call__(self, batch: Any) -> Any:
        if batch.ndim != 4:
            raise ValueError(f"ToTorchImage: got shape {tuple(batch.shape)}, expected (N, H, W, C)")
        batch = torch.as_tensor(batch).permute(0, 3, 1, 2)
        return batch if self.channels_last else batch.contiguous()


class Squeeze(BatchOp):
    """Drop the dimensions `dims` of size 1 (default: all but the batch)."""

    def __init__(self, *dims: int) -> None:
        self.dims = dims

    def __call__(self, batch: Any) -> Any:
        dims = self.dims or tuple(d for d in range(1, batch.ndim) if batch.shape[d] == 1)
        return batch.squeeze(dims) if dims else batch


class Convert(BatchOp):
    """Values to another dtype (torch's or NumPy's)."""

    def __init__(self, target_dtype: Any) -> None:
        self.target_dtype = target_dtype

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, np.ndarray):
            return batch.astype(self.target_dtype)
        return batch.to(torch_dtype(self.target_dtype))


class View(BatchOp):
    """The same bytes as another dtype."""

    def __init__(self, target_dtype: Any) -> None:
        self.target_dtype = target_dtype

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, np.ndarray):
            return batch.view(self.target_dtype)
        return batch.view(torch_dtype(self.target_dtype))
