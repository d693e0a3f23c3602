"""`knn`: votes of the nearest training images in feature space, nothing trained.

Guarantees: the neighbours are those by float64 similarities. float32 only rules out images that
cannot be among them, by the bound on its error.
"""

# Q queries, B of them at once, M images of a part of the bank, D features, K classes, k neighbours,
# P pairs (query, image) whose similarity is computed in float64

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import open_frozen_data
from ffcv_ssl.evaluation.similarity_bank import BankConfig, Scores, classify, query_slices
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World

MAX_EXACT_SHARE = 1 / 32
"""Where more pairs than this share must be computed in float64, one product of matrices is
faster."""
MAX_WIDTH = 1 << 16
"""Features are fewer than this where float32 is of use."""
PRODUCTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class KNNConfig(BankConfig):
    """Settings of k-nearest neighbours (Wu et al. 2018)."""

    ks: list[PositiveInt] = field(default_factory=lambda: [20])
    """Numbers of neighbours that vote; the first one's accuracy is `top1`."""
    weights: Literal["exp", "uniform"] = "exp"
    """exp: a vote weighs exp(similarity / temperature); uniform: all votes weigh the same."""

    @property
    def max_k(self) -> int:
        return max(self.ks)

    def state_size(self, num_classes: int) -> int:
        return 2 * self.max_k


def run(config: KNNConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Classify by k-NN; returns the record. Raises UserError."""
    return classify("knn", config, world, stop, partial(KNNScorer, config))


class KNNScorer:
    """Votes of the nearest neighbours, for every k and temperature of a KNNConfig."""

    def __init__(self, config: KNNConfig, queries: torch.Tensor, num_classes: int) -> None:
        self.config, self.num_classes, self.num_columns = config, num_classes, config.max_k
        self.neighbours = NearestNeighbours(queries, config.max_k)
        self.add = self.neighbours.add

    def scores(self, chosen: slice) -> Iterator[Scores]:
        """Yield log votes of the neighbours' classes, by the name `k20_t0.1`, or `k20` where all
        votes weigh the same."""
        weighed = self.config.weights == "exp"
        temperatures = self.config.temperatures if weighed else [None]
        similarities, labels = (values[chosen] for values in self.neighbours.nearest())
        classes, numbers = distinct(labels, self.num_classes)
        for k in self.config.ks:
            for t in temperatures:
                votes = vote(similarities, numbers, classes.shape[1], k, t)
                yield Scores(f"k{k}" if t is None else f"k{k}_t{t:g}", votes, classes)


class NearestNeighbours:
    """The k most similar images of a bank that is shown part by part. queries: (Q, D) unit rows."""

    def __init__(self, queries: torch.Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.float32_helps = torch.get_float32_matmul_precision() == "highest" and (
            queries.shape[1] <= MAX_WIDTH
        )
        self.similarities = queries.new_empty(len(queries), 0)
        self.labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, bank: torch.Tensor, labels: torch.Tensor) -> None:
        """Look at more of the bank: unit rows (M, D) and their labels (M,) in [0, K)."""
        rough_bank = bank.float()
        parts = [
            self._with_more(chosen, bank, rough_bank, labels)
            for chosen in query_slices(len(self.queries), len(bank) + self.k)
        ]
        self.similarities, self.labels = (torch.cat(part) for part in zip(*parts))

    def _with_more(self, chosen, bank, rough_bank, labels):
        """(similarities, labels) of some queries' neighbours, among these images too."""
        queries, before = self.queries[chosen], self.similarities[chosen]
        candidates = self._candidates(queries, before, rough_bank)
        if candidates is None:
            now = queries @ bank.T  # (B, M)
            now_labels = labels.expand(len(now), -1)
        else:
            now, columns = _in_rows(queries, bank, candidates)
            now_labels = labels[columns]
        both = torch.cat([before, now], dim=1)
        both_labels = torch.cat([self.labels[chosen], now_labels], dim=1)
        columns = first_largest(both, min(self.k, before.shape[1] + len(bank)))
        return both.gather(1, columns), both_labels.gather(1, columns)

    def _candidates(self, queries, before, rough_bank):
        """(B, M) bool: all images that may be among the k nearest, and few others; None where these
        are so many that float64 throughout is faster, or where float32 is not what it says.

        Collapsed features are so near each other that float32 tells few apart. Where it rules out
        too few once, it is not tried again: both products cost 1.3 times the float64 one.
        """
        if not self.float32_helps:
            return None
        (size, width), k = rough_bank.shape, min(self.k, len(rough_bank))
        max_pairs = int(MAX_EXACT_SHARE * len(queries) * size)
        is_full = before.shape[1] == self.k
        if not is_full and len(queries) * k > max_pairs:
            return None
        rough, error = queries.float() @ rough_bank.T, rough_error(width)
        candidates = rough >= (before[:, -1:] - error).float() if is_full else None
        if candidates is None or candidates.sum() > 2 * k * len(queries):
            # at least k images are at least as similar as the k-th here, minus the error
            least = rough.topk(k, dim=1).values[:, -1:].double() - 2 * error
            if is_full:
                least = torch.maximum(least, before[:, -1:] - error)
            candidates = rough >= least.float()
        num_pairs = candidates.sum()
        if num_pairs <= max_pairs:
            return candidates
        self.float32_helps = bool(num_pairs <= 2 * k * len(queries))  # False: k is not the reason
        return None

    def nearest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(similarities, labels), (Q, k) each, the most similar first; fewer in a smaller bank."""
        return self.similarities, self.labels


def rough_error(width: int) -> float:
    """How far a float32 similarity of unit rows may be from the float64 one.

    With u = 2^-24 and D features below 2^16: rounding both rows to float32 costs at most 2u + u^2,
    and their product, summed in any order, at most D u / (1 - D u) (Higham 2002, section 3.1; by
    Cauchy-Schwarz the products' magnitudes sum to at most 1). The rest is for the float64 sum, and
    for a bound on similarities that is itself rounded to float32.
    """
    return 1.01 * (width + 4) * 2.0**-24


def exact_similarities(
    queries: torch.Tensor, rows: torch.Tensor, bank: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Similarities (P,) of queries (Q, D) at `rows` (P,) and images of a bank (M, D) at `columns`.

    Halves are added up until one number is left: the same bits for any P, so that copies of an
    image are equally similar wherever they are in the bank. A product of matrices does not promise
    that.
    """
    found = queries.new_empty(len(rows))
    step = max(1, PRODUCTS_AT_ONCE // queries.shape[1])
    for begin in range(0, len(rows), step):
        chosen = slice(begin, begin + step)
        products = queries[rows[chosen]].mul_(bank[columns[chosen]])
        while (width := products.shape[1]) > 1:
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:]
            products = products[:, :half]
        found[chosen] = products[:, 0]
    return found


def _in_rows(queries, bank, candidates):
    """(similarities, columns) of a mask (B, M), (B, most in a row) each, in the bank's order; -inf
    and 0 fill the rows."""
    rows, columns = candidates.nonzero(as_tuple=True)
    counts = candidates.sum(dim=1)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(queries), int(counts.max()))
    similarities = queries.new_full(shape, -math.inf)
    similarities[rows, places] = exact_similarities(queries, rows, bank, columns)
    return similarities, torch.zeros(shape, dtype=torch.int64, device=rows.device).index_put_(
        (rows, places), columns
    )


def distinct(labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's different labels (B, k) in ascending order, num_classes where there are no more,
    and the labels' numbers among them (B, k)."""
    ordered, order = labels.sort(dim=1)
    numbers = torch.zeros_like(labels)
    numbers[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    classes = torch.full_like(labels, num_classes).scatter_(1, numbers, ordered)
    return classes, torch.empty_like(labels).scatter_(1, order, numbers)


def first_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Columns (Q, k) of each row's k largest values (Q, M), largest first; all M where there are
    fewer. Of equal values the first ones count, where torch.topk takes any."""
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    order = values.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


def vote(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    k: int,
    temperature: float | None = None,
) -> torch.Tensor:
    """Logarithms (Q, K) float64 of the votes of the first k neighbours; -inf for a class without
    votes. A vote weighs exp(similarity / temperature), or 1 without a temperature. similarities,
    labels: (Q, at least k, or the whole bank)."""
    similarities, labels = similarities[:, :k], labels[:, :k]
    if temperature is None:
        logits = torch.zeros_like(similarities)
    else:  # minus the largest: differences keep their precision
        logits = (similarities - similarities[:, :1]) / temperature
    largest = logits.new_full((len(labels), num_classes), -math.inf)
    largest.scatter_reduce_(1, labels, logits, "amax")
    sums = torch.zeros_like(largest)
    sums.scatter_add_(1, labels, torch.exp(logits - largest.gather(1, labels)))
    return largest + sums.log()


COMMAND = Command(KNNConfig, run, "votes of the nearest training images", open_frozen_data)
