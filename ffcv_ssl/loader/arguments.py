"""The checks of the loader's arguments. A mistake raises a ValueError of one line."""

from __future__ import annotations

import os
from enum import Enum
from typing import Any

import numpy as np

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
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def make_order(order: Any) -> TraversalOrder:
    if order in _ORDERS:
        return _ORDERS[order]()
    if isinstance(order, type) and issubclass(order, TraversalOrder):
        return order()
    if isinstance(order, TraversalOrder):
        return order
    raise ValueError(f"Loader: order is {order!r}, must be an OrderOption or a TraversalOrder")


def check_indices(reader: Reader, indices: Any) -> np.ndarray:
    if indices is None:
        return np.arange(reader.num_samples, dtype=np.int64)
    indices = np.ascontiguousarray(np.asarray(indices).reshape(-1), np.int64)
    if len(indices) and not (indices.min() >= 0 and indices.max() < reader.num_samples):
        raise ValueError(
            f"{reader.path}: got indices from {indices.min()} to {indices.max()}, expected "
            f"0 to {reader.num_samples - 1}, the samples of the file"
        )
    return indices


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
