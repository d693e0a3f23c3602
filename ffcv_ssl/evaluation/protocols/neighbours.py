"""`knn` and `snn`: classification by the similarity to labelled training images, nothing trained.

Guarantees: exact over the whole bank, in memory that does not grow with it; of equally similar
images the earlier one in the bank counts first, of classes with equal scores the smaller one.
"""

# Q queries, M images of a part of the bank, D features, K classes, k neighbours

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from ffcv_ssl import OrderOption
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import common
from ffcv_ssl.evaluation.confusion import confusion_matrix, per_class_accuracy
from ffcv_ssl.evaluation.features import FOLDER, FeaturesConfig, extract
from ffcv_ssl.seeding import derive_seed

BANK_ROWS = 8192  # at once
TOP = (1, 5)
MAX_SIMILARITIES = 1 << 23  # computed at once: 64 MB


@dataclass(frozen=True)
class NeighboursConfig(common.Evaluation):
    """What `knn` and `snn` have in common."""

    depths: list[str] = field(default_factory=lambda: ["backbone"])
    """Where the features are taken: backbone, projector_1 (after that layer)..."""
    temperature: list[PositiveFloat] = field(default_factory=lambda: [0.1])
    """Temperatures of the similarities; the first one's accuracy is `top1`."""
    views: NonNegativeInt = 0
    """Random crops and flips of each training image in the bank; 0: its centre crop."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self):
        for name in ("depths", "temperature", "k"):
            if not getattr(self, name, True):
                raise UserError(f"{name}: got an empty list, expected one value at least")


@dataclass(frozen=True)
class KNNConfig(NeighboursConfig):
    """Settings of k-nearest neighbours (Wu et al. 2018)."""

    k: list[PositiveInt] = field(default_factory=lambda: [20])
    """Numbers of neighbours that vote; with the first one's accuracy as `top1`."""
    weights: Literal["exp", "uniform"] = "exp"
    """exp: a vote weighs exp(similarity / temperature); uniform: all weigh the same."""


@dataclass(frozen=True)
class SNNConfig(NeighboursConfig):
    """Settings of SuNCEt's non-parametric inference (Assran et al. 2020, eq. 3, appendix G)."""

    views: NonNegativeInt = 1
    """Random crops and flips of each training image in the bank; 0: its centre crop."""


def run_knn(config, world, stop):
    """Protocol `knn`: returns the record. Raises UserError."""

    def start(queries, num_classes):
        return NearestNeighbours(queries, max(config.k))

    def scores(state, num_classes):
        temperatures = config.temperature if config.weights == "exp" else [None]
        for k in config.k:
            for t in temperatures:
                name = f"k{k}" if t is None else f"k{k}_t{t:g}"
                yield name, vote(*state.nearest(), num_classes, k, t)

    return _run("knn", config, world, stop, start, scores)


def run_snn(config, world, stop):
    """Protocol `snn`: returns the record. Raises UserError."""

    def start(queries, num_classes):
        return [ClassSimilarity(queries, num_classes, t) for t in config.temperature]

    def scores(states, num_classes):
        for t, state in zip(config.temperature, states):
            yield f"t{t:g}", state.log_probabilities()

    return _run("snn", config, world, stop, start, scores)


def _run(protocol, config, world, stop, start, scores):
    encoder = common.open_frozen(protocol, config, world)
    pair = common.open_pair(config.data, config.labels, encoder)
    size, k = len(pair.chosen) * max(1, config.views), max(getattr(config, "k", [0]))
    if k > size:
        got = f"got {k}, but the bank has {size} images"
        raise UserError(f"k: {got}; give a smaller --k or more labels")
    folder = common.results_folder(config)
    store = (config.features.folder or folder / FOLDER, config.features.dtype, world, stop)
    ids = np.flatnonzero(pair.val.labels >= 0)
    val = extract(encoder, pair.val, pair, config.depths, *store, indices=ids)
    labels = torch.from_numpy(pair.val.labels[val.ids]).to(world.device)
    states = {}
    for depth in config.depths:
        queries = unit_rows(torch.from_numpy(val.take(depth, slice(None))).to(world.device))
        states[depth] = start(queries, pair.num_classes)
    if config.views:
        bank = _in_blocks(_augmented_bank(config, encoder, pair, world))
    else:
        train = extract(encoder, pair.train, pair, config.depths, *store, indices=pair.chosen)
        bank = _stored_bank(train, config.depths, pair)
    for rows, bank_labels in bank:
        common.stop_if_asked(stop)
        known = bank_labels >= 0
        for depth, state in states.items():
            part = unit_rows(rows[depth][known].to(world.device))
            for each in state if isinstance(state, list) else [state]:
                each.add(part, bank_labels[known].to(world.device))
    metrics = {}
    for depth, state in states.items():
        named = dict(scores(state, pair.num_classes))
        metrics[depth] = measure(named, labels, pair.num_classes)
    return common.finish(protocol, config, encoder, pair, metrics, folder, world)


def _stored_bank(features, depths, pair):
    """Yield ({depth: (M, D)}, labels (M,)) of the clean images."""
    for begin in range(0, len(features.ids), BANK_ROWS):
        chosen = slice(begin, begin + BANK_ROWS)
        rows = {depth: torch.from_numpy(features.take(depth, chosen)) for depth in depths}
        yield rows, torch.from_numpy(pair.labels[features.ids[chosen]])


def _augmented_bank(config, encoder, pair, world):
    """The same of `config.views` crops and flips of each image, each decoded once."""
    loader = common.augmented_loader(
        pair.train, pair, world, derive_seed(config.seed, "bank"), num_views=config.views,
        batch_size=max(1, pair.loading.batch_size // config.views), indices=pair.chosen,
        order=OrderOption.SEQUENTIAL, drop_last=False,
    )  # fmt: skip
    with loader:
        for batch in loader:
            labels = pair.labels[np.asarray(batch.indices)]
            labels = torch.from_numpy(np.where(np.asarray(batch.valid), labels, -1))
            for view in range(config.views):
                features = encoder.encode(getattr(batch, f"view_{view}"))
                yield {depth: features[depth] for depth in config.depths}, labels


def _in_blocks(bank):
    """The same rows in blocks of about BANK_ROWS: small ones cost as much in sums over classes."""
    waiting, count = [], 0
    for part in bank:
        waiting.append(part)
        count += len(part[1])
        if count >= BANK_ROWS:
            yield _joined(waiting)
            waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts):
    rows = {depth: torch.cat([rows[depth] for rows, _ in parts]) for depth in parts[0][0]}
    return rows, torch.cat([labels for _, labels in parts])


def unit_rows(rows):
    """Rows (N, D) as float64, scaled to length 1; a row of zeros stays.

    float32 would do for an accuracy, but its rounding decides which of two nearly equal images is
    the k-th neighbour: one of 3,925 predictions differed from scikit-learn's.
    """
    return F.normalize(rows.double(), dim=1)


class NearestNeighbours:
    """The k most similar images of a bank that is shown part by part. queries: (Q, D) unit rows."""

    def __init__(self, queries, k):
        self.queries, self.k = queries, k
        self.similarities = queries.new_empty(len(queries), 0)
        self.labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, bank, labels):
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        similarities, kept = [], []
        for chosen in _parts(len(self.queries), len(bank) + self.k):
            before = self.similarities[chosen], self.labels[chosen]
            now = self.queries[chosen] @ bank.T  # (Q, M)
            both = torch.cat([before[0], now], dim=1)
            both_labels = torch.cat([before[1], labels.expand(len(now), -1)], dim=1)
            columns = first_largest(both, self.k)
            similarities.append(both.gather(1, columns))
            kept.append(both_labels.gather(1, columns))
        self.similarities, self.labels = torch.cat(similarities), torch.cat(kept)

    def nearest(self):
        """(similarities, labels), (Q, k) each, the most similar first; fewer in a smaller bank."""
        return self.similarities, self.labels


def first_largest(values, k):
    """Columns (Q, k) of each row's k largest values (Q, M), largest first, of equal ones the first;
    all M where there are fewer. torch.topk takes any of equal ones."""
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    order = values.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


def vote(similarities, labels, num_classes, k, temperature=None):
    """Logarithms (Q, K) float64 of the votes of the first k neighbours, exp(similarity /
    temperature) each, or one without a temperature; -inf for a class without votes. similarities,
    labels: (Q, at least k where the bank has)."""
    similarities, labels = similarities[:, :k], labels[:, :k]
    if temperature is None:
        logits = torch.zeros_like(similarities)
    else:  # over the largest: its precision is that of differences
        logits = (similarities - similarities[:, :1]) / temperature
    largest = logits.new_full((len(labels), num_classes), -math.inf)
    largest.scatter_reduce_(1, labels, logits, "amax")
    sums = torch.zeros_like(largest)
    sums.scatter_add_(1, labels, torch.exp(logits - largest.gather(1, labels)))
    return largest + sums.log()


class ClassSimilarity:
    """SuNCEt's non-parametric inference over a bank that is shown part by part.

    p(c | z) = sum_{i of class c} exp(sim(z, z_i) / t) / sum_i exp(sim(z, z_i) / t) (eq. 3).
    queries: (Q, D) unit rows. A maximum is kept for each class, so that no sum under- or overflows.
    """

    def __init__(self, queries, num_classes, temperature):
        self.queries, self.temperature = queries, temperature
        shape = (len(queries), num_classes)
        self.largest = queries.new_full(shape, -math.inf)
        self.sums = queries.new_zeros(shape)  # of exp(sim/t - largest)

    def add(self, bank, labels):
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        for chosen in _parts(len(self.queries), max(len(bank), self.sums.shape[1])):
            logits = self.queries[chosen] @ bank.T / self.temperature  # (Q, M)
            columns = labels.expand(len(logits), -1)
            before = self.largest[chosen]
            largest = before.scatter_reduce(1, columns, logits, "amax")
            scale = torch.exp(before - largest).nan_to_num(0.0)  # of a class not seen yet
            sums = self.sums[chosen] * scale
            sums.scatter_add_(1, columns, torch.exp(logits - largest.gather(1, columns)))
            self.largest[chosen], self.sums[chosen] = largest, sums

    def log_probabilities(self):
        """log p (Q, K) float64; -inf for a class that the bank lacks, and for that alone: p itself
        underflows where the temperature is low."""
        return torch.log_softmax(self.largest + self.sums.log(), dim=1)


def measure(named, labels, num_classes):
    """Metrics of log scores (Q, K) by the name of their setting; labels: (Q,) in [0, K).

    {name: {"top1", "top5"}}, and the first one's top1, top5, per_class and confusion. A class whose
    score is -inf or NaN is never among the best.
    """
    results = {}
    for name, scores in named.items():
        own = scores.gather(1, labels[:, None])
        smaller = torch.arange(num_classes, device=labels.device) < labels[:, None]
        rank = ((scores > own) | ((scores == own) & smaller)).sum(dim=1)
        rank = rank.masked_fill(~(own[:, 0] > -math.inf), num_classes + max(TOP))
        results[name] = {f"top{k}": float((rank < k).double().mean()) for k in TOP}
    first = next(iter(named.values())).argmax(dim=1)
    matrix = confusion_matrix(labels.cpu().numpy(), first.cpu().numpy(), num_classes)
    head = {**next(iter(results.values())), "per_class": per_class_accuracy(matrix)}
    return {**head, "confusion": matrix, **results}


def _parts(num_queries, num_columns):
    """Slices of the queries that bound what is computed at once."""
    step = max(1, MAX_SIMILARITIES // max(1, num_columns))
    return [slice(begin, begin + step) for begin in range(0, num_queries, step)]
