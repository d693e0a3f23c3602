"""What probes are trained on: standardised features of stored or of augmented images."""

# N samples, B images a batch, D features

from __future__ import annotations

import numpy as np
import torch

from ffcv_ssl.evaluation import common
from ffcv_ssl.seeding import derive_seed

ROWS_AT_ONCE = 2048  # of a pass that has no batches of its own


class ProbeData:
    """Standardised features by depth, and labels, of three sets: rest, held out, val.

    config: a LinearConfig; pair: a Pair; train, val: Features.
    """

    def __init__(self, config, pair, train, val, device):
        self.device, self.num_classes = device, pair.num_classes
        self.features = {"train": train, "val": val}
        labels = {"train": pair.labels[train.ids], "val": pair.val.labels[val.ids]}
        known = {name: np.flatnonzero(values >= 0) for name, values in labels.items()}
        self.rows = {"all": ("train", known["train"]), "val": ("val", known["val"])}
        self.labels = {name: torch.from_numpy(values) for name, values in labels.items()}
        self.norms = {
            depth: standardisation(train, depth, known["train"], not config.hidden, device)
            for depth in config.depths
        }
        self.hold_out(config.holdout if config.select == "holdout" else 0.0, config.seed)

    def hold_out(self, share, seed):
        """Divide the training samples anew: a share of each class held out, the rest to learn."""
        held = np.empty(0, np.int64)
        if share:
            _, held = common.split_holdout(self.labels["train"].numpy(), share, seed)
        known = self.rows["all"][1]
        self.rows |= {"rest": ("train", np.setdiff1d(known, held)), "holdout": ("train", held)}

    def __len__(self):
        return self.size("all")

    @property
    def widths(self):
        """D by depth."""
        return {depth: len(mean) for depth, (mean, _) in self.norms.items()}

    def ids(self, part):
        """Sample ids of a part of the training file's rows."""
        return self.features["train"].ids[self.rows[part][1]]

    def size(self, part):
        """Rows in a part."""
        return len(self.rows[part][1])

    def batches(self, part, rows_per_step, order=None):
        """Yield ({depth: (B, D)}, labels (B,)) on the device, in nearly equal batches.

        order: a permutation of the part's rows, or None for their own order.
        """
        source, rows = self.rows[part]
        rows = rows if order is None else rows[order]
        for chosen in np.array_split(rows, max(1, -(-len(rows) // rows_per_step))):
            features = {
                depth: torch.from_numpy(self.features[source].take(depth, chosen))
                for depth in self.norms
            }
            yield (
                self.standardised(features),
                self.labels[source][torch.from_numpy(chosen)].to(self.device),
            )

    def standardised(self, features):
        """Features (B, D) by depth, standardised, on the device."""
        return {
            depth: (features[depth].to(self.device) - mean) * scale
            for depth, (mean, scale) in self.norms.items()
        }

    def epoch(self, part, rows_per_step, seed, epoch):
        """(steps, batches) of one pass over a part in random order."""
        key = derive_seed(seed, f"probe epoch {epoch}")
        order = np.random.Generator(np.random.Philox(key)).permutation(self.size(part))
        steps = max(1, -(-self.size(part) // rows_per_step))
        return steps, self.batches(part, rows_per_step, order)


def standardisation(features, depth, rows, to_unit_length, device):
    """(mean, scale) (D,) float32 that give `rows` of a depth mean 0 and variance 1, or 1 / D, so
    that a row's mean squared length is 1. A feature that hardly varies becomes 0 everywhere.
    """
    total, squares, count = 0.0, 0.0, 0
    first = features.take(depth, rows[:1]).astype(np.float64)  # differences from it stay exact
    for chosen in np.array_split(rows, max(1, len(rows) // ROWS_AT_ONCE)):
        values = features.take(depth, chosen) - first
        total, squares = total + values.sum(axis=0), squares + np.square(values).sum(axis=0)
        count += len(values)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    lively = std > 1e-5 * std.max(initial=0)
    scale = np.where(lively, 1 / np.where(lively, std, 1), 0)
    scale = scale / np.sqrt(len(scale)) if to_unit_length else scale
    pair = ((mean + first[0]).astype(np.float32), scale.astype(np.float32))
    return tuple(torch.from_numpy(values).to(device) for values in pair)


class AugmentedData:
    """The same for training on random crops and flips, encoded anew in each epoch.

    data: the ProbeData of the clean images, which standardises these too.
    """

    def __init__(self, data, encoder, pair, world):
        self.data, self.encoder, self.pair, self.world = data, encoder, pair, world

    def epoch(self, part, rows_per_step, seed, epoch):
        """(steps, batches) of one pass over a part in random order."""
        ids = np.unique(self.data.ids(part))
        loader = common.augmented_loader(
            self.pair.train, self.pair, self.world, derive_seed(seed, "probe views"), indices=ids,
            batch_size=min(rows_per_step, len(ids)),
        )  # fmt: skip
        loader.set_epoch(epoch)
        return len(loader), self._batches(loader)

    def _batches(self, loader):
        with loader:
            for batch in loader:
                # not the file's own: a corrupt sample's replacement may have one not allowed
                labels = torch.from_numpy(self.pair.labels[np.asarray(batch.indices)])
                known = torch.nonzero(labels >= 0)[:, 0].to(self.data.device)
                features = self.data.standardised(self.encoder.encode(batch.view_0))
                rows = {depth: values[known] for depth, values in features.items()}
                yield rows, labels.to(self.data.device)[known]
