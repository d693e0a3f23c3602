"""Online evaluation: probes and k-nearest neighbours on clean images, over all ranks, exactly, and
the health of the representation.

Every labelled sample counts once for any number of ranks: each rank takes a part, padding is left
out, and the counts are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ffcv_ssl.config.settings import DataConfig, EvaluationConfig
from ffcv_ssl.loader import Loader, OrderOption
from ffcv_ssl.training.fitted_probes import fit_probe
from ffcv_ssl.training.health_check import MAX_CLEAN, HealthCheck
from ffcv_ssl.training.image_rows import ImageRows
from ffcv_ssl.training.probes import knn_scores, topk_correct
from ffcv_ssl.training.run_data import RunData, check_classes, make_loader
from ffcv_ssl.training.run_files import RunFiles
from ffcv_ssl.training.world import World

Encode = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Views (B, 3, H, W) -> features by depth."""
Classify = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Features by depth -> logits by depth."""


def labels_of(batch: Any, field: str) -> Any:
    """(B,) int64 labels of a batch; -1 where an image is unlabelled or only pads the batch. None
    where the loader has no such field."""
    if not hasattr(batch, field):
        return None
    labels, valid = getattr(batch, field).view(-1), np.asarray(batch.valid)
    if valid.all():  # `valid` is on the host; copying it to the device would wait at every step
        return labels
    return labels.masked_fill(torch.as_tensor(~valid, device=labels.device), -1)


def open_evaluation(
    files: RunFiles,
    data: DataConfig,
    settings: EvaluationConfig,
    ops: dict[str, list],
    pair: dict[str, list],
    seed: int,
    world: World,
    channels_last: bool,
) -> OnlineEvaluation | None:
    """The evaluation of a run on these files; None where there is nothing to measure.

    settings: an EvaluationConfig; ops: view name -> list of ops, only for view_0; pair: the same
    for the training views that the health check compares. Where a file has no labels, accuracies
    are left out, and a line says so. Raises UserError where the classes of two files differ, as
    `check_classes` does.
    """
    bank_set, measures = files.bank, files.has_accuracies
    if (missing := files.what_is_missing()) is not None:
        world.say(missing)
    # a labelled run without a validation file is one whose user wants no evaluation
    watches = settings.health and (files.val is not None or bank_set.labels is None)
    if not measures and not watches:
        return None
    options: dict[str, Any] = {
        "batch_size": max(1, settings.batch_size // world.size), "drop_last": False, "seed": seed,
        "order": OrderOption.SEQUENTIAL,
    }  # fmt: skip
    size = MAX_CLEAN if watches else 0
    if measures and (settings.knn_k > 0 or files.probes is not None):
        size = settings.knn_bank
    bank, bank_loader, val_loader, health = bank_set.draw(size, seed), None, None, None
    if size:
        bank_loader = make_loader(
            bank_set, data, ops, world, channels_last, indices=bank, **options
        )
    if measures:
        assert files.val is not None
        check_classes(bank_set, files.val, data.label_field)
        val_loader = make_loader(files.val, data, ops, world, channels_last, **options)
    if watches:
        health = HealthCheck(bank_set, data, pair, settings.batch_size, seed, world, channels_last)
    return OnlineEvaluation(
        val_loader, bank_loader, data.label_field, settings, bank_set.num_classes, world, health,
        files.probes, bank,
    )  # fmt: skip


class OnlineEvaluation:
    """Holds the loader of the validation file and that of the bank, for k-NN, for the health check
    and for the probes that are fitted to it; each may be None.

    `settings` has knn_k and knn_temperature. fitted_to: the file whose images `bank`, sorted ids,
    are to fit the probes, or None: `run` is given probes.
    """

    def __init__(
        self,
        val_loader: Loader | None,
        bank_loader: Loader | None,
        label_field: str,
        settings: Any,
        num_classes: int,
        world: World,
        health: HealthCheck | None = None,
        fitted_to: RunData | None = None,
        bank: np.ndarray | None = None,
    ) -> None:
        self.val_loader, self.bank_loader = val_loader, bank_loader
        self.label_field, self.settings = label_field, settings
        self.num_classes, self.world = num_classes, world
        self.health, self.fitted_to, self.bank = health, fitted_to, bank

    @property
    def num_images(self) -> int:
        """Images of all ranks that one evaluation encodes."""
        loaders = filter(None, (self.val_loader, self.bank_loader))
        return sum(len(loader.indices) for loader in loaders)

    @torch.no_grad()
    def run(
        self, encode: Encode, probes: Classify | None, before_batch: Callable[[], object]
    ) -> dict[str, float]:
        """{"val/<depth or knn>/top<1 or 5>": accuracy in [0, 1]}, and the health check's numbers.

        probes: None where they are fitted here, or where nothing is measured on labels.
        before_batch() is called before each batch and may raise to end the evaluation.
        """
        bank, fitted = self._encode_bank(encode, before_batch)
        results: dict[str, float] = {}
        if self.val_loader is not None:
            results = self._accuracies(encode, fitted or probes, bank, before_batch)
        if self.health is not None:
            results |= self.health.finish(encode, before_batch)
        return results

    def _accuracies(self, encode, probes, bank, before_batch):
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
        """(unit features (N, D) and labels (N,) of the whole bank, on every rank; probes that were
        fitted to it), each of them None where it is not needed."""
        if self.bank_loader is None:
            return None, None
        serves_knn = self.val_loader is not None and self.settings.knn_k > 0
        features, labels, all_rows = [], [], ImageRows(self.bank)
        for batch in self.bank_loader:
            before_batch()
            encoded = encode(batch.view_0)
            if serves_knn:
                features.append(F.normalize(encoded["backbone"].float(), dim=1))
                labels.append(labels_of(batch, self.label_field))
            if self.health is not None:
                self.health.see(batch, encoded)
            if self.fitted_to is not None:
                all_rows.add(batch, encoded)
        bank = None
        if serves_knn:
            rows = self.world.gather(torch.cat(features))
            classes = self.world.gather(torch.cat(labels))
            bank = rows[classes >= 0], classes[classes >= 0]
        return bank, self._fit(all_rows, before_batch) if self.fitted_to is not None else None

    def _fit(self, all_rows, before_batch):
        """Probes at every depth, fitted to the bank."""
        probes = {}
        for depth in list(all_rows.values):
            before_batch()
            rows, images = all_rows.take(depth, self.world)
            labels = torch.as_tensor(self.fitted_to.labels[images], device=rows.device)
            probes[depth] = fit_probe(rows, labels, self.num_classes)
        return lambda features: {depth: probe(features[depth]) for depth, probe in probes.items()}

    def close(self) -> None:
        """End the loaders' threads."""
        for part in (self.val_loader, self.bank_loader, self.health):
            if part is not None:
                part.close()


def in_words(results: Mapping[str, float]) -> str:
    """What `run` has found, for a line of the log."""
    names = [key.split("/") for key in results]  # val/backbone/top1, health/backbone/rankme
    top1 = [f"{name[1]} {results['/'.join(name)]:.1%}" for name in names if name[-1] == "top1"]
    ranks = [
        f"{name[1]} {results['/'.join(name)]:.1f}" for name in names if name[-1] == "effective_rank"
    ]
    parts = [f"top-1 on val: {'  '.join(top1)}"] if top1 else []
    parts += [f"effective rank: {'  '.join(ranks)}"] if ranks else []
    return "  ".join(parts)
