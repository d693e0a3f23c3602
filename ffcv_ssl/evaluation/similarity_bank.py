"""What `knn` and `snn` share: labelled training images to compare with, shown part by part.

Guarantees: exact over the whole bank, in memory that does not grow with it; of equally similar
images the earlier one in the bank counts first, of classes with equal scores the smaller one.
"""

# Q queries, M images of a part of the bank, D features, K classes

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.confusion import confusion_matrix, per_class_accuracy
from ffcv_ssl.evaluation.datasets import EvalDatasets, open_datasets
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.features import Features, FeaturesConfig, extract_labelled
from ffcv_ssl.evaluation.image_loaders import augmented_loader
from ffcv_ssl.evaluation.protocol_run import finish_frozen, open_frozen, stop_if_asked
from ffcv_ssl.evaluation.protocol_settings import FrozenConfig
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World

BANK_ROWS = 8192
"""Images of the bank that are compared at once."""
TOP_KS = (1, 5)
MAX_SIMILARITIES = 1 << 23
"""Similarities that are computed at once: 64 MB."""

BankPart = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({depth: (M, D)}, labels (M,) in [0, K), -1: none)."""


@dataclass(frozen=True)
class BankConfig(FrozenConfig):
    """Settings of every protocol that compares with labelled training images."""

    temperatures: list[PositiveFloat] = field(default_factory=lambda: [0.1])
    """Temperatures of the similarities; the first one's accuracy is `top1`."""
    num_views: NonNegativeInt = 0
    """Random crops and flips of each training image in the bank; 0: its centre crop."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self) -> None:
        for name in ("depths", "temperatures", "ks"):
            if not getattr(self, name, True):
                raise UserError(f"{name}: got an empty list, expected one value at least")

    @property
    def max_k(self) -> int:
        """Images that the bank must have."""
        return 0


class Scorer(Protocol):
    """Scores the classes of queries against a bank that is shown part by part."""

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""

    def scores(self) -> dict[str, torch.Tensor]:
        """{name of a setting: log scores (Q, K)}, the main setting first."""


def classify(
    protocol: str,
    config: BankConfig,
    world: World,
    stop: StopSignal | None,
    make_scorer: Callable[[torch.Tensor, int], Scorer],
) -> dict[str, Any]:
    """Measure a protocol whose classes are scored by make_scorer(queries (Q, D), K); returns the
    record. Raises UserError."""
    encoder = open_frozen(protocol, config, world)
    datasets = open_datasets(config.data, config.labels, encoder)
    bank_size = len(datasets.chosen) * max(1, config.num_views)
    if config.max_k > bank_size:
        raise UserError(
            f"ks: got {config.max_k}, but the bank has {bank_size} images; "
            "give smaller --ks or more labels"
        )
    val = extract_labelled("val", config, encoder, datasets, world, stop)
    labels = torch.from_numpy(datasets.val_labels[val.ids]).to(world.device)
    scorers = {}
    for depth in config.depths:
        queries = unit_rows(torch.from_numpy(val.take(depth, slice(None))).to(world.device))
        scorers[depth] = make_scorer(queries, datasets.num_classes)
    if config.num_views:
        bank = _in_blocks(_augmented_bank(config, encoder, datasets, world))
    else:
        train = extract_labelled("train", config, encoder, datasets, world, stop)
        bank = _stored_bank(train, config.depths, datasets)
    _show(bank, scorers, world, stop)
    metrics = {
        depth: measure(scorer.scores(), labels, datasets.num_classes)
        for depth, scorer in scorers.items()
    }
    return finish_frozen(protocol, config, encoder, datasets, metrics, world)


def _show(
    bank: Iterable[BankPart], scorers: dict[str, Any], world: World, stop: StopSignal | None
) -> None:
    """Show the labelled images of a bank to every depth's scorer."""
    for rows, bank_labels in bank:
        stop_if_asked(stop)
        known = bank_labels >= 0
        for depth, scorer in scorers.items():
            part = unit_rows(rows[depth][known].to(world.device))
            scorer.add(part, bank_labels[known].to(world.device))


def _stored_bank(
    features: Features, depths: list[str], datasets: EvalDatasets
) -> Iterator[BankPart]:
    """Yield the clean images in parts."""
    for begin in range(0, len(features.ids), BANK_ROWS):
        chosen = slice(begin, begin + BANK_ROWS)
        rows = {depth: torch.from_numpy(features.take(depth, chosen)) for depth in depths}
        yield rows, torch.from_numpy(datasets.labels[features.ids[chosen]])


def _augmented_bank(
    config: BankConfig, encoder: Encoder, datasets: EvalDatasets, world: World
) -> Iterator[BankPart]:
    """Yield `config.num_views` crops and flips of each image, which is decoded once."""
    loader = augmented_loader(
        datasets.train, datasets, world, derive_seed(config.seed, "bank"),
        num_views=config.num_views, indices=datasets.chosen,
        batch_size=max(1, datasets.loading.batch_size // config.num_views),
        order=OrderOption.SEQUENTIAL, drop_last=False,
    )  # fmt: skip
    with loader:
        for batch in loader:
            labels = datasets.labels[np.asarray(batch.indices)]
            labels = torch.from_numpy(np.where(np.asarray(batch.valid), labels, -1))
            for view in range(config.num_views):
                features = encoder.encode(getattr(batch, f"view_{view}"))
                yield {depth: features[depth] for depth in config.depths}, labels


def _in_blocks(bank: Iterable[BankPart]) -> Iterator[BankPart]:
    """The same rows in blocks of about BANK_ROWS: a small block's sums over classes cost as much as
    a large one's."""
    waiting: list[BankPart] = []
    count = 0
    for part in bank:
        waiting.append(part)
        count += len(part[1])
        if count >= BANK_ROWS:
            yield _joined(waiting)
            waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[BankPart]) -> BankPart:
    rows = {depth: torch.cat([rows[depth] for rows, _ in parts]) for depth in parts[0][0]}
    return rows, torch.cat([labels for _, labels in parts])


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) as float64, scaled to length 1; a row of zeros stays.

    float32 is enough for an accuracy, but its rounding decides which of two nearly equal images is
    the k-th neighbour: one of 3,925 predictions differed from scikit-learn's.
    """
    return F.normalize(rows.double(), dim=1)


def measure(
    named: dict[str, torch.Tensor], labels: torch.Tensor, num_classes: int
) -> dict[str, Any]:
    """Metrics of log scores (Q, K) by the name of their setting; labels: (Q,) in [0, K).

    {name: {"top1", "top5"}}, and the first setting's top1, top5, per_class and confusion. A class
    whose score is -inf or NaN is never among the best.
    """
    results: dict[str, dict[str, float]] = {}
    for name, scores in named.items():
        own = scores.gather(1, labels[:, None])  # (Q, 1), of each query's label
        smaller = torch.arange(num_classes, device=labels.device) < labels[:, None]
        rank = ((scores > own) | ((scores == own) & smaller)).sum(dim=1)
        rank = rank.masked_fill(~(own[:, 0] > -math.inf), num_classes + max(TOP_KS))
        results[name] = {f"top{k}": float((rank < k).double().mean()) for k in TOP_KS}
    first = next(iter(named.values())).argmax(dim=1)
    matrix = confusion_matrix(labels.cpu().numpy(), first.cpu().numpy(), num_classes)
    head = {**next(iter(results.values())), "per_class": per_class_accuracy(matrix)}
    return {**head, "confusion": matrix, **results}


def query_slices(num_queries: int, num_columns: int) -> list[slice]:
    """Slices of the queries that bound what is computed at once."""
    step = max(1, MAX_SIMILARITIES // max(1, num_columns))
    return [slice(begin, begin + step) for begin in range(0, num_queries, step)]
