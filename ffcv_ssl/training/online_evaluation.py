"""Online evaluation: probes and k-nearest neighbours on clean images, over all ranks, exactly.

Every labelled sample counts once for any number of ranks: each rank takes a part, padding is left
out, and the counts are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ffcv_ssl.config.settings import DataConfig, EvaluationConfig
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.training.probes import knn_scores, topk_correct
from ffcv_ssl.training.run_data import RunData, check_classes, make_loader
from ffcv_ssl.training.world import World


def labels_of(batch: Any, field: str) -> Any:
    """(B,) int64 labels of a batch; -1 where an image is unlabelled or only pads the batch. None
    where the loader has no such field."""
    if not hasattr(batch, field):
        return None
    labels, valid = getattr(batch, field).view(-1), np.asarray(batch.valid)
    if valid.all():  # `valid` is on the host; copying it to the device would wait at every step
        return labels
    return labels.masked_fill(torch.as_tensor(~valid, device=labels.device), -1)


def top1_in_words(results: dict[str, float]) -> str:
    """The accuracies of an evaluation by depth: `backbone 61.2%  projector_1 58.0%  knn 55.1%`."""
    names = [key.split("/") for key in results]  # val/backbone/top1
    shown = [name for kind, name, k in names if (kind, k) == ("val", "top1")]
    return "  ".join(f"{name} {results[f'val/{name}/top1']:.1%}" for name in shown)


def open_evaluation(
    train: RunData | None,
    val: RunData | None,
    data: DataConfig,
    settings: EvaluationConfig,
    ops: dict[str, list],
    seed: int,
    world: World,
    channels_last: bool,
) -> OnlineEvaluation | None:
    """The evaluation of a run that trains on `train` and validates on `val` (RunData, or None).

    Returns None, and says so, where one of the two has no labels. data: a DataConfig; settings: an
    EvaluationConfig; ops: view name -> list of ops, only for view_0. Raises UserError where the
    classes of the two differ, as `check_classes` does.
    """
    for dataset in (train, val):
        if dataset is not None and dataset.labels is None:
            world.say(
                f"{dataset.path}: no labels in field '{data.label_field}', so the run has no "
                "evaluation"
            )
        if dataset is None or dataset.labels is None:
            return None
    assert train is not None and val is not None
    check_classes(train, val, data.label_field)
    options: dict[str, Any] = {
        "batch_size": max(1, settings.batch_size // world.size), "drop_last": False, "seed": seed,
        "order": OrderOption.SEQUENTIAL,
    }  # fmt: skip
    bank_loader = None
    if settings.knn_k > 0:
        bank = train.draw_labelled(settings.knn_bank, seed)
        bank_loader = make_loader(train, data, ops, world, channels_last, indices=bank, **options)
    val_loader = make_loader(val, data, ops, world, channels_last, **options)
    return OnlineEvaluation(
        val_loader, bank_loader, data.label_field, settings, train.num_classes, world
    )


class OnlineEvaluation:
    """Holds the loader of the validation file and, for k-NN, the loader of the bank (None: no
    k-NN). `settings` has knn_k and knn_temperature."""

    def __init__(
        self,
        val_loader: Loader,
        bank_loader: Loader | None,
        label_field: str,
        settings: Any,
        num_classes: int,
        world: World,
    ) -> None:
        self.val_loader, self.bank_loader = val_loader, bank_loader
        self.label_field, self.settings = label_field, settings
        self.num_classes, self.world = num_classes, world

    @property
    def num_images(self) -> int:
        """Images of all ranks that one evaluation encodes."""
        loaders = filter(None, (self.val_loader, self.bank_loader))
        return sum(len(loader.indices) for loader in loaders)

    @torch.no_grad()
    def run(
        self,
        encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
        probes: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        before_batch: Callable[[], object],
    ) -> dict[str, float]:
        """{"val/<depth or knn>/top<1 or 5>": accuracy in [0, 1]}.

        encode: views (B, 3, H, W) -> features by depth. probes: features -> logits by depth.
        before_batch() is called before each batch and may raise to end the evaluation.
        """
        bank = self._encode_bank(encode, before_batch) if self.bank_loader is not None else None
        counts: dict[str, Any] = {}
        num_labelled: Any = 0
        for batch in self.val_loader:
            before_batch()
            labels, features = labels_of(batch, self.label_field), encode(batch.view_0)
            scores = probes(features)
            if bank is not None:
                queries = F.normalize(features["backbone"].float(), dim=1)
                k, temperature = self.settings.knn_k, self.settings.knn_temperature
                rows, classes = bank
                scores["knn"] = knn_scores(queries, rows, classes, self.num_classes, k, temperature)
            for name, values in scores.items():
                for k in (1, 5):
                    key = f"val/{name}/top{k}"
                    counts[key] = counts.get(key, 0) + topk_correct(values, labels, k)
            num_labelled = num_labelled + (labels >= 0).sum()
        totals = self.world.sum_(torch.stack([num_labelled, *counts.values()])).tolist()
        return {key: count / max(1, totals[0]) for key, count in zip(counts, totals[1:])}

    def _encode_bank(self, encode, before_batch):
        """Unit features (N, D) and labels (N,) of the whole bank, on every rank."""
        features, labels = [], []
        for batch in self.bank_loader:
            before_batch()
            features.append(F.normalize(encode(batch.view_0)["backbone"].float(), dim=1))
            labels.append(labels_of(batch, self.label_field))
        features = self.world.gather(torch.cat(features))
        labels = self.world.gather(torch.cat(labels))
        return features[labels >= 0], labels[labels >= 0]

    def close(self) -> None:
        """End the loaders' threads."""
        for loader in (self.val_loader, self.bank_loader):
            if loader is not None:
                loader.close()
