"""Loaders of an evaluation's images: centre crops to measure, random crops and flips to train."""

# B images per batch, V views, H W pixels

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.evaluation.datasets import EvalDatasets
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.training.run_data import RunData, make_loader
from ffcv_ssl.training.world import World
from ffcv_ssl.transforms import CenterCrop, RandomHorizontalFlip, RandomResizedCrop


def clean_ops(datasets: EvalDatasets) -> list:
    """The ops of a centre crop: what recipe `evaluation` makes."""
    return [CenterCrop(datasets.resolution_px, datasets.center_ratio)]


def augmented_ops(datasets: EvalDatasets) -> list:
    """The ops of crop and flip: what recipe `supervised` makes."""
    return [RandomResizedCrop(datasets.resolution_px), RandomHorizontalFlip()]


def clean_loader(
    dataset: RunData, datasets: EvalDatasets, world: World, indices: np.ndarray | None = None
) -> Loader:
    """Centre crops of one of the two datasets in the order of `indices` (default: all samples).

    Batches have `view_0`, float32 (B, 3, H, W), the label field, `indices` and `valid` (False where
    a rank's last batch is padded).
    """
    return make_loader(
        dataset, datasets.loading, {"view_0": clean_ops(datasets)}, world, True, indices=indices,
        batch_size=_batch_size_per_rank(datasets, world), order=OrderOption.SEQUENTIAL,
        drop_last=False, seed=0,
    )  # fmt: skip


def augmented_loader(
    dataset: RunData,
    datasets: EvalDatasets,
    world: World,
    seed: int,
    num_views: int = 1,
    **options: Any,
) -> Loader:
    """Random crops and flips of one of the two datasets, `view_0` to `view_V-1`, in random order.

    options: of `Loader`, over these defaults: batch_size (per rank), indices, order, drop_last...
    """
    views = {f"view_{index}": augmented_ops(datasets) for index in range(num_views)}
    options = {
        "batch_size": _batch_size_per_rank(datasets, world), "order": OrderOption.RANDOM,
        "drop_last": True, "seed": seed, **options,
    }  # fmt: skip
    return make_loader(dataset, datasets.loading, views, world, True, **options)


def _batch_size_per_rank(datasets: EvalDatasets, world: World) -> int:
    return max(1, datasets.loading.batch_size // world.size)
