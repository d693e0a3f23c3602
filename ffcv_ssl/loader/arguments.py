"""The checks of the loader's arguments. A mistake raises a ValueError of one line."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import UserError
from ffcv_ssl.reader import Reader
from ffcv_ssl.traversal_order import QuasiRandom, Random, Sequential, TraversalOrder


class OrderOption(Enum):
    """FFCV's names of the built-in orders."""

    SEQUENTIAL = 1
    RANDOM = 2
    QUASI_RANDOM = 3


_ORDERS = {
    OrderOption.SEQUENTIAL: Sequential,
    OrderOption.RANDOM: Random,
    OrderOption.QUASI_RANDOM: QuasiRandom,
}


def check_positive(name: str, value: Any) -> None:
    if value != int(value) or value < 1:
        raise ValueError(f"Loader: {name} is {value!r}, must be at least 1")


def count_workers(num_workers: Any) -> int:
    if num_workers != int(num_workers) or num_workers < -1:
        raise ValueError(
            f"Loader: num_workers is {num_workers!r}, must be -1 (one per core) or more"
        )
    if num_workers > 0:
        return int(num_workers)
    return len(usable_cores())


def make_order(order: Any) -> TraversalOrder:
    if order in _ORDERS:
        return _ORDERS[order]()
    if isinstance(order, type) and issubclass(order, TraversalOrder):
        return order()
    if isinstance(order, TraversalOrder):
        return order
    raise ValueError(f"Loader: order is {order!r}, must be an OrderOption or a TraversalOrder")


def check_indices(reader: Reader, indices: Any) -> np.ndarray:
    """The samples to load, int64 (N,), from ids, which may repeat, or a mask of all samples."""
    if indices is None:
        return reader.once("all samples", lambda: _read_only(np.arange(reader.num_samples)))
    array = _as_array(reader, indices)
    if array.dtype == bool and array.shape == (reader.num_samples,):
        return np.flatnonzero(array)
    if array.dtype == bool and array.ndim == 1:
        raise UserError(
            f"{reader.path}: got indices that are a mask of {len(array)} booleans, expected "
            f"{reader.num_samples}, one for every sample of the file"
        )
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(
            f"{reader.path}: got indices of type {array.dtype} and shape {array.shape}, expected "
            "whole numbers in one dimension, or a mask of booleans"
        )
    if len(array) and not (array.min() >= 0 and array.max() < reader.num_samples):
        raise ValueError(
            f"{reader.path}: got indices from {array.min()} to {array.max()}, expected "
            f"0 to {reader.num_samples - 1}, the samples of the file"
        )
    return np.array(array, np.int64)  # a copy: the caller may change the original


def _as_array(reader: Reader, indices: Any) -> np.ndarray:
    """`indices` with the type they have; booleans among numbers stay visible, as objects."""
    try:
        array = np.asarray(indices)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise UserError(
            f"{reader.path}: got indices of type {type(indices).__name__}, expected whole numbers "
            f"in one dimension ({what})"
        ) from None
    is_mixed = isinstance(indices, (list, tuple)) and array.dtype.kind in "iu"
    if is_mixed and any(isinstance(index, (bool, np.bool_)) for index in indices):
        return np.array(indices, object)
    return array


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def find_rank(distributed: bool, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size): as given, else from the process group, else (0, 1)."""
    if rank is None and world_size is None and distributed:
        import torch.distributed as group

        if not group.is_initialized():
            raise ValueError(
                "Loader: distributed is True, but there is no process group; call "
                "torch.distributed.init_process_group first, or give rank and world_size"
            )
        rank, world_size = group.get_rank(), group.get_world_size()
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"Loader: got rank {rank} and world_size {world_size}; give both or neither"
        )
    if rank is None or world_size is None:
        return 0, 1
    rank, world_size = int(rank), int(world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"Loader: rank is {rank}, must be 0 to {world_size - 1} (world_size - 1)")
    return rank, world_size
