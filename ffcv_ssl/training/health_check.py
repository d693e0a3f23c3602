"""The health of the representation at each evaluation: on clean images, and on two training views.

Needs no labels. Guarantees: the images, and the views of each image, are the same at every
evaluation, so that numbers compare over time; every rank has the numbers of a single process; no
random number of the training is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ffcv_ssl.config.settings import DataConfig
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training import health
from ffcv_ssl.training.image_rows import ImageRows
from ffcv_ssl.training.run_data import RunData, make_loader
from ffcv_ssl.training.world import World

MAX_CLEAN = 2048
"""Clean images looked at. A rank is at most their number; of 2,048 rows, all is computed in seconds
for any D."""
MAX_PAIRS = 512
"""Images looked at in two views: 130,000 pairs for uniformity, and 1,024 passes in all."""


def pair_of(views: Mapping[str, Any]) -> dict[str, Any]:
    """The views to compare, by name: a run's first two (a dict of Views), or its only one twice,
    with other draws. Where one of the two takes draws of a further view, all views are there."""
    names = list(views)[:2]
    if len(names) == 1:
        return {names[0]: views[names[0]], f"{names[0]}_again": views[names[0]]}
    if any(views[name].link not in (None, *names) for name in names):
        return dict(views)
    return {name: views[name] for name in names}


class HealthCheck:
    """Collects features of clean images from batches that an evaluation encodes anyhow (`see`),
    encodes the pairs itself, and turns both into numbers (`finish`).

    dataset: the file, of whose labelled images (all, where none is) it draws with `seed`. ops: view
    name -> list of ops; the first two are compared. batch_size: over all ranks.
    """

    def __init__(
        self,
        dataset: RunData,
        data: DataConfig,
        ops: dict[str, list],
        batch_size: int,
        seed: int,
        world: World,
        channels_last: bool,
    ) -> None:
        self.world, self.pair = world, list(ops)[:2]
        # these begin with the same draws as the k-NN bank, so they are images of the bank
        self.images = dataset.draw(MAX_CLEAN, seed)
        self.pair_images = dataset.draw(MAX_PAIRS, seed)
        self.loader = make_loader(
            dataset, data, ops, world, channels_last, indices=self.pair_images, drop_last=False,
            order=OrderOption.SEQUENTIAL, seed=derive_seed(seed, "health"),
            batch_size=max(1, batch_size // 2 // world.size),
        )  # fmt: skip
        self.clean = ImageRows(self.images)

    def see(self, batch: Any, features: dict[str, torch.Tensor]) -> None:
        """Keep what is needed of a batch of clean images and its features by depth."""
        self.clean.add(batch, {depth: features[depth] for depth in _watched(features)})

    def finish(
        self,
        encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
        before_batch: Callable[[], object],
    ) -> dict[str, float]:
        """{"health/<depth>/<std, effective_rank or rankme>": ..., "health/alignment": ...,
        "health/uniformity": ...}, once `see` has seen all images; arguments as those of
        OnlineEvaluation.run."""
        numbers = {}
        for depth in list(self.clean.values):
            rows, _ = self.clean.take(depth, self.world)
            resolution = self.clean.resolution[depth]
            numbers[f"health/{depth}/std"] = health.standard_deviation(rows)
            numbers[f"health/{depth}/effective_rank"] = health.effective_rank(rows, resolution)
            numbers[f"health/{depth}/rankme"] = health.rankme(rows)
        first, second = self._encode_pairs(encode, before_batch)
        numbers["health/alignment"] = health.alignment(first, second)
        each = [health.uniformity(rows) for rows in (first, second)]
        return {**numbers, "health/uniformity": sum(each) / 2}

    def _encode_pairs(self, encode, before_batch):
        """The last depth's features of both views, (N, D) each, of the same images."""
        rows = ImageRows(self.pair_images)
        self.loader.set_epoch(0)  # the same views each time
        for batch in self.loader:
            before_batch()
            features = {}
            for name in self.pair:
                *_, features[name] = encode(getattr(batch, name)).values()
            rows.add(batch, features)
        return [rows.take(name, self.world)[0] for name in self.pair]

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()


def _watched(features: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The depths whose ranks are looked at: the backbone and the last one."""
    return tuple(dict.fromkeys(("backbone", next(reversed(features)))))
