"""Features of chosen images, by image: the same rows in the same order for any number of ranks.

Shapes: B images per batch, N chosen images, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ffcv_ssl.training.world import World


class ImageRows:
    """Collects the features of `images`, sorted ids (N,), from batches that ranks share out.

    Images that only pad a batch do not count, nor do those that a damaged image was replaced by.
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.values: dict[str, torch.Tensor] = {}
        self.resolution: dict[str, float] = {}
        """Relative precision in which the features of each name were computed."""

    def add(self, batch: Any, features: dict[str, torch.Tensor]) -> None:
        """Put the features by name, (B, D) each, of a loader's batch to their images' places."""
        indices = np.asarray(batch.indices)
        places = np.searchsorted(self.images, indices).clip(max=len(self.images) - 1)
        counts = self.images[places] == indices
        counts &= np.asarray(batch.valid) & ~np.asarray(batch.replaced)
        for name, rows in features.items():
            if name not in self.values:
                # the last column says whether there is a row
                size = (len(self.images), rows.shape[1] + 1)
                self.values[name] = torch.zeros(size, device=rows.device)
                self.resolution[name] = torch.finfo(rows.dtype).eps
            chosen = rows[torch.as_tensor(counts, device=rows.device)].float()
            ones = torch.ones_like(chosen[:, :1])
            where = torch.as_tensor(places[counts], device=rows.device)
            self.values[name][where] = torch.cat([chosen, ones], dim=1)

    def take(self, name: str, world: World) -> tuple[torch.Tensor, np.ndarray]:
        """(features (<= N, D) float32, their images' ids) of one name over all ranks, in the order
        of the ids; they are forgotten here. All ranks call it."""
        values = world.sum_(self.values.pop(name))  # exact: each row is 0 on all ranks but one
        has_row = values[:, -1] > 0
        return values[has_row, :-1], self.images[has_row.cpu().numpy()]
