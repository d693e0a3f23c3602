"""What `knn` and `snn` share: labelled training images to compare with, shown part by part.

Guarantees: exact over the whole bank, in memory that grows neither with it nor with the number of
settings; of equally similar images the earlier one in the bank counts first, of classes with equal
scores the smaller one. Similarities are rounded to float64: where a product of matrices computes
them, as it does for many neighbours or for collapsed features, those of copies may differ in the
last bit, so that a later copy may count first.
"""

# Q queries, B of them at once, M images of a part of the bank, D features, K classes, C classes
# that may have a score

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.confusion import confusion_matrix, per_class_accuracy
from ffcv_ssl.evaluation.datasets import EvalDatasets, open_datasets
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.features import (
    Features,
    FeaturesConfig,
    check_finite,
    extract_labelled,
)
from ffcv_ssl.evaluation.image_loaders import augmented_loader
from ffcv_ssl.evaluation.protocol_run import finish_frozen, open_frozen, stop_if_asked
from ffcv_ssl.evaluation.protocol_settings import FrozenConfig
from ffcv_ssl.evaluation.results import results_folder
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.console import Phase
from ffcv_ssl.training.world import World

BANK_ROWS = 8192
"""Images of the bank that are compared at once."""
TOP_KS = (1, 5)
MAX_SIMILARITIES = 1 << 23
"""Similarities, or scores, that are computed at once: 64 MB."""
MAX_STATE = 1 << 28
"""Numbers that scorers keep at once, with their queries' features: 2 GB. More queries are taken in
several passes over the bank."""

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

    def state_size(self, num_classes: int) -> int:
        """Numbers that a scorer keeps for each query, besides its features, while it is shown the
        bank."""
        return 1


class Scores(NamedTuple):
    """What one setting says of some queries."""

    name: str
    values: torch.Tensor
    """Log scores (B, C) float64; -inf for a class that cannot be meant."""
    classes: torch.Tensor
    """(B, C) int64 in ascending order: the classes of the scores; all others have none."""


class Scorer(Protocol):
    """Scores the classes of queries against a bank that is shown part by part."""

    num_columns: int
    """The largest C."""

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""

    def scores(self, chosen: slice) -> Iterator[Scores]:
        """Yield what each setting says of some of the queries, the main setting first."""


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
    train = None
    if not config.num_views:
        train = extract_labelled("train", config, encoder, datasets, world, stop)
    labels = torch.from_numpy(datasets.val_labels[val.ids]).to(world.device)
    num_classes = datasets.num_classes
    numbers_per_query = config.state_size(num_classes) * len(config.depths) + sum(
        encoder.widths[depth] for depth in config.depths
    )
    passes = query_slices(len(labels), numbers_per_query, MAX_STATE)
    tallies = {depth: Tally(num_classes) for depth in config.depths}
    what = f"{protocol}: comparing {len(labels):,} images with {bank_size:,}"
    with (
        _open_bank(config, encoder, datasets, train, len(passes), world) as show_bank,
        world.console.phase(what, bank_size * len(passes), announced=True) as phase,
    ):
        for chosen in passes:
            scorers = {}
            for depth in config.depths:
                queries = unit_rows(torch.from_numpy(val.take(depth, chosen)).to(world.device))
                scorers[depth] = make_scorer(queries, num_classes)
            _show(_counted(show_bank(), phase), scorers, world, stop)
            for depth, scorer in scorers.items():
                tallies[depth].add(scorer, labels[chosen])
    metrics = {depth: tally.metrics() for depth, tally in tallies.items()}
    return finish_frozen(protocol, config, encoder, datasets, metrics, world)


@contextlib.contextmanager
def _open_bank(
    config: BankConfig,
    encoder: Encoder,
    datasets: EvalDatasets,
    train: Features | None,
    num_passes: int,
    world: World,
) -> Iterator[Callable[[], Iterable[BankPart]]]:
    """A function that shows the bank, to call once in each pass. train: the clean images' features;
    None: crops and flips are encoded."""
    if train is not None:
        yield partial(_stored_bank, train, config.depths, datasets)
        return
    bank = _in_blocks(_augmented_bank(config, encoder, datasets, world))
    if num_passes == 1:
        yield lambda: bank
        return
    size = config.num_views * len(datasets.chosen)
    with contextlib.ExitStack() as stack:
        with world.console.phase("features of the bank", size, announced=True) as phase:
            kept = _Repeated(_counted(bank, phase), results_folder(config))
            show_bank = stack.enter_context(kept)
        yield show_bank


def _counted(bank: Iterable[BankPart], phase: Phase) -> Iterator[BankPart]:
    """The same parts; each counts as done when the next one is asked for."""
    for part in bank:
        yield part
        phase.advance(len(part[1]))


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
    """Yield `config.num_views` crops and flips of each image, which is decoded once. Raises
    UserError where a feature is not finite."""
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
                for depth in config.depths:
                    check_finite(encoder.path, depth, features[depth][labels >= 0])
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


class _Repeated:
    """A bank that is computed once and shown several times: a call shows it once more. Meanwhile
    its rows are in files without a name, which end with the process. Raises UserError."""

    def __init__(self, bank: Iterable[BankPart], folder: Path) -> None:
        self.bank, self.folder = bank, folder
        self.labels: list[torch.Tensor] = []
        self.files: dict[str, Any] = {}
        self.widths: dict[str, int] = {}

    def __enter__(self) -> _Repeated:
        try:
            for rows, labels in self.bank:
                self.labels.append(labels)
                for depth, values in rows.items():
                    if depth not in self.files:
                        self.files[depth] = tempfile.TemporaryFile(dir=self.folder)
                        self.widths[depth] = values.shape[1]
                    self.files[depth].write(values.float().cpu().contiguous().numpy().data)
            for file in self.files.values():
                file.flush()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise UserError(
                    f"{self.folder}: the images to compare with cannot be kept there "
                    f"({error.strerror}); free some space, or use another --out"
                ) from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of bytes that a full disk has not taken
                file.close()

    def __call__(self) -> Iterator[BankPart]:
        for file in self.files.values():
            file.seek(0)
        for labels in self.labels:
            yield {d: self._read(d, len(labels)) for d in self.files}, labels

    def _read(self, depth: str, num_rows: int) -> torch.Tensor:
        width = self.widths[depth]
        values = np.frombuffer(self.files[depth].read(4 * num_rows * width), np.float32)
        return torch.from_numpy(values.reshape(num_rows, width).copy())


def _joined(parts: list[BankPart]) -> BankPart:
    rows = {depth: torch.cat([rows[depth] for rows, _ in parts]) for depth in parts[0][0]}
    return rows, torch.cat([labels for _, labels in parts])


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) as float64, scaled to length 1; a row of zeros stays.

    float32 is enough for an accuracy, but its rounding decides which of two nearly equal images is
    the k-th neighbour: one of 3,925 predictions differed from scikit-learn's.
    """
    return F.normalize(rows.double(), dim=1)


class Tally:
    """The ranks of the queries' labels in every setting, gathered part by part."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.ranks: dict[str, list[torch.Tensor]] = {}
        self.labels: list[torch.Tensor] = []
        self.predictions: list[torch.Tensor] = []  # of the main setting

    def add(self, scorer: Scorer, labels: torch.Tensor) -> None:
        """Take the scores of all queries of a scorer. labels: (Q,) in [0, K)."""
        for chosen in query_slices(len(labels), scorer.num_columns):
            for number, scores in enumerate(scorer.scores(chosen)):
                self.ranks.setdefault(scores.name, []).append(self._ranks(scores, labels[chosen]))
                if number == 0:
                    best = scores.values.argmax(dim=1, keepdim=True)
                    self.predictions.append(scores.classes.gather(1, best)[:, 0])
        self.labels.append(labels)

    def _ranks(self, scores: Scores, labels: torch.Tensor) -> torch.Tensor:
        """(B,) number of classes before each query's label; more than K for a label whose score is
        -inf or NaN, or that has none."""
        values, classes = scores.values, scores.classes
        own = values.masked_fill(classes != labels[:, None], -math.inf).amax(dim=1, keepdim=True)
        smaller = classes < labels[:, None]
        rank = ((values > own) | ((values == own) & smaller)).sum(dim=1)
        return rank.masked_fill(~(own[:, 0] > -math.inf), self.num_classes + max(TOP_KS))

    def metrics(self) -> dict[str, Any]:
        """{name: {"top1", "top5"}} of every setting, and the first one's top1, top5, per_class and
        confusion. A class whose score is -inf or NaN is never among the best."""
        results: dict[str, dict[str, float]] = {}
        for name, parts in self.ranks.items():
            rank = torch.cat(parts)
            results[name] = {f"top{k}": float((rank < k).double().mean()) for k in TOP_KS}
        labels, first = (torch.cat(x).cpu().numpy() for x in (self.labels, self.predictions))
        matrix = confusion_matrix(labels, first, self.num_classes)
        head = {**next(iter(results.values())), "per_class": per_class_accuracy(matrix)}
        return {**head, "confusion": matrix, **results}


def query_slices(num_queries: int, num_columns: int, max_numbers: int | None = None) -> list[slice]:
    """Slices of the queries whose columns are at most `max_numbers` numbers in each; None:
    MAX_SIMILARITIES."""
    if max_numbers is None:
        max_numbers = MAX_SIMILARITIES
    step = max(1, max_numbers // max(1, num_columns))
    return [slice(begin, begin + step) for begin in range(0, num_queries, step)]
