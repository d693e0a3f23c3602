"""Probes on frozen features: a grid of settings at any depth, trained at once, chosen and measured.

Features are standardised by the training samples' mean and standard deviation. The setting is
chosen on a held-out part of the training labels and trained once more on all of them; that probe's
accuracy after the last epoch is `top1`. `best_top1` is the accuracy with early stopping: of the
probe with the setting and epoch that were best on the held-out part, as it was then.
"""

# N samples, B images per batch, D features, G members of the grid, K classes

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

from ffcv_ssl.errors import NonFiniteLoss, UserError
from ffcv_ssl.evaluation.confusion import confusion_matrix, per_class_accuracy
from ffcv_ssl.evaluation.datasets import open_datasets
from ffcv_ssl.evaluation.features import FeaturesConfig, extract_labelled
from ffcv_ssl.evaluation.probe_data import ROWS_AT_ONCE, AugmentedData, ProbeData
from ffcv_ssl.evaluation.probe_grid import (
    GridProbe,
    GridSGD,
    Selection,
    Totals,
    best_member,
    cosine,
    mean_scores,
    train_step,
)
from ffcv_ssl.evaluation.protocol_run import finish_frozen, open_frozen, stop_if_asked
from ffcv_ssl.evaluation.protocol_settings import FrozenConfig
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.console import Console
from ffcv_ssl.training.probes import topk_correct
from ffcv_ssl.training.world import World

ENOUGH_HELD_OUT = 500
"""Held-out images on which one split is enough to choose a setting by."""
NUM_PROGRESS_LINES = 5
LOGITS_AT_ONCE = 1 << 25
"""Logits of all members that are computed at once: 128 MB."""

Grid = list[tuple[float, float]]
"""(learning rate, weight decay) of each member."""


@dataclass(frozen=True)
class GridConfig(FrozenConfig):
    """Settings of every probe that is trained on frozen features."""

    hidden: list[PositiveInt] = field(default_factory=list)
    """Widths of the probe's hidden layers, each with batch-norm and ReLU; none: linear."""
    epochs: PositiveInt = 100
    """Passes over the training samples."""
    rows_per_step: PositiveInt = 256
    """Samples per step of the probes."""
    lrs: list[PositiveFloat] = field(default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    """Learning rates to try, for features whose mean squared length is 1; a cosine takes each to
    0."""
    weight_decays: list[NonNegativeFloat] = field(default_factory=lambda: [0.0])
    """Weight decays to try, with each of the rates."""
    momentum: ClosedUnitInterval = 0.9
    """Momentum of SGD."""
    holdout: ClosedUnitInterval = 0.1
    """Share of each class' training labels on which the setting is chosen."""
    max_splits: PositiveInt = 10
    """Where fewer than 500 images are held out, the held-out part is drawn several times, at most
    so often, until the parts have 500 images together; the best setting on average is chosen."""
    select: Literal["holdout", "val"] = "holdout"
    """Where the setting is chosen; `val` reports the best on the very images it is measured on."""
    augment: bool = False
    """Train on random crops and flips, encoded anew each epoch, instead of stored features."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self) -> None:
        for name in ("depths", "lrs", "weight_decays"):
            if not getattr(self, name):
                raise UserError(f"{name}: got an empty list, expected one value at least")
        for name in ("momentum", "holdout"):
            if getattr(self, name) == 1:
                raise UserError(f"{name}: got 1, expected below 1")

    @property
    def grid(self) -> Grid:
        """(learning rate, weight decay) of each member."""
        return list(itertools.product(self.lrs, self.weight_decays))

    def setting(self, member: int) -> dict[str, float]:
        """A member's setting by name."""
        return dict(zip(("lr", "weight_decay"), self.grid[member]))


def run_probes(
    protocol: str, config: GridConfig, world: World, stop: StopSignal | None
) -> dict[str, Any]:
    """Train, choose and measure probes on a checkpoint's features; returns the record."""
    encoder = open_frozen(protocol, config, world)
    datasets = open_datasets(config.data, config.labels, encoder)
    train = extract_labelled("train", config, encoder, datasets, world, stop)
    val = extract_labelled("val", config, encoder, datasets, world, stop)
    data = ProbeData(config, datasets, train, val, world.device)
    source = AugmentedData(data, encoder, datasets, world) if config.augment else data
    metrics = evaluate_probes(config, data, source, stop, world.say, world.console)
    return finish_frozen(protocol, config, encoder, datasets, metrics, world)


def evaluate_probes(
    config: GridConfig,
    data: ProbeData,
    source: ProbeData | AugmentedData | None = None,
    stop: StopSignal | None = None,
    say: Callable[[str], Any] = print,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Train and choose probes; returns {depth: metrics}.

    source: what they are trained on, `data` if None. Metrics are top1, top5, per_class, confusion
    (a ConfusionMatrix), lr, weight_decay, selected_on, and for early stopping best_top1, best_top5,
    best_epoch, best_lr, best_weight_decay. Raises UserError where there are settings to choose from
    and no images to choose on, and NonFiniteLoss where the probe to report has diverged.
    """
    source, console = data if source is None else source, console or Console()
    judge = config.select if data.size(config.select) else None
    if judge is None and len(config.grid) > 1:
        raise UserError(
            f"holdout: got {config.holdout:g} of {len(data)} labels, which holds out no label to "
            "choose settings on; use more labels, or one value for lrs and for weight_decays"
        )
    grids = dict.fromkeys(data.widths, config.grid)
    part = "all" if judge is None else "rest"
    scores: dict[str, list] = {depth: [] for depth in grids}
    num_splits = _num_splits(config, data, judge)
    for split in reversed(range(num_splits)):  # split 0 last: it stops early
        epochs = console.over(
            range(config.epochs), _split_in_words(judge, num_splits - split, num_splits),
            config.epochs, "epochs",
        )  # fmt: skip
        if judge == "holdout":
            data.hold_out(config.holdout, config.seed + split)
        given = (part, judge, grids, stop, say, epochs)
        probes, selections = train_probes(config, data, source, *given)
        for depth, selection in selections.items():
            scores[depth].append(selection.last_scores)
    if judge is None:
        chosen = dict.fromkeys(probes, 0)
    else:
        chosen = {depth: _best_on_average(config, depth, scores[depth]) for depth in probes}
    finals = {depth: probe.member(chosen[depth]) for depth, probe in probes.items()}
    if judge == "holdout":
        grids = {depth: [config.grid[member]] for depth, member in chosen.items()}
        name = "probes: the chosen settings on all labels"
        epochs = console.over(range(config.epochs), name, config.epochs, "epochs")
        finals, _ = train_probes(config, data, source, "all", None, grids, stop, say, epochs)
    metrics = {}
    for depth, probe in finals.items():
        metrics[depth] = _measure_setting(config, probe, data, depth, chosen[depth])
        metrics[depth]["selected_on"] = judge or "nothing"
        if judge is not None:
            metrics[depth]["selection_top1"] = mean_scores(scores[depth])[0][chosen[depth]].item()
            metrics[depth] |= _early_stopping(config, data, depth, selections[depth])
    return metrics


def _num_splits(config: GridConfig, data: ProbeData, judge: str | None) -> int:
    """How often the held-out part is drawn: a few images alone would choose by chance."""
    if judge != "holdout" or len(config.grid) == 1:
        return 1
    return min(config.max_splits, -(-ENOUGH_HELD_OUT // data.size("holdout")))


def _split_in_words(judge: str | None, number: int, num_splits: int) -> str:
    if judge != "holdout":
        return "probes"
    return f"probes: held-out split {number} of {num_splits}"


def _best_on_average(config: GridConfig, depth: str, scores: list) -> int:
    """The member that is best over all splits. Raises NonFiniteLoss where all have diverged."""
    member = best_member(scores)
    if mean_scores(scores)[0][member] < 0:
        raise _diverged(config, depth, member)
    return member


def train_probes(
    config: GridConfig,
    data: ProbeData,
    source: ProbeData | AugmentedData,
    part: str,
    judge: str | None,
    grids: dict[str, Grid],
    stop: StopSignal | None,
    say: Callable[[str], Any],
    epochs: Iterable[int],
) -> tuple[dict[str, GridProbe], dict[str, Selection]]:
    """Train a grid of probes at every depth on a `part` of the data, all in one pass over it.

    judge: the part on which the probes are scored after each epoch, or None. grids: the members at
    each depth. epochs: their numbers, from 0. Returns ({depth: GridProbe}, {depth: Selection}).
    """
    probes, optimizers = {}, {}
    for depth, grid in grids.items():
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "probe"))
        shape = (data.widths[depth], config.hidden, data.num_classes, len(grid))
        probes[depth] = GridProbe(*shape, generator).to(data.device)
        lrs, weight_decays = zip(*grid)
        optimizers[depth] = GridSGD(probes[depth], lrs, weight_decays, config.momentum)
    selections = {depth: Selection(probe) for depth, probe in probes.items()}
    for epoch in epochs:
        num_steps, batches = source.epoch(part, config.rows_per_step, config.seed, epoch)
        for step, (features, labels) in enumerate(batches):
            stop_if_asked(stop)
            share = cosine(epoch * num_steps + step, config.epochs * num_steps)
            for depth, probe in probes.items():
                train_step(probe, optimizers[depth], features[depth], labels, share)
        if judge is not None:
            _score(probes, selections, data, judge, epoch + 1)
            if (epoch + 1) % max(1, config.epochs // NUM_PROGRESS_LINES) == 0:
                best = [f"{d} {max(s.last_scores[0].tolist()):.1%}" for d, s in selections.items()]
                say(f"epoch {epoch + 1}/{config.epochs}  top-1 on {judge}: {'  '.join(best)}")
    return probes, selections


@torch.no_grad()
def _score(
    probes: dict[str, GridProbe],
    selections: dict[str, Selection],
    data: ProbeData,
    judge: str,
    epoch: int,
) -> None:
    totals = {depth: Totals() for depth in probes}
    rows_at_once = min(map(_rows_at_once, probes.values()))
    for features, labels in data.batches(judge, rows_at_once):
        for depth, probe in probes.items():
            totals[depth].add(probe.eval()(features[depth]), labels)
    for depth, selection in selections.items():
        selection.see(totals[depth], epoch)


def _rows_at_once(probe: GridProbe) -> int:
    """Rows per step of a pass that only measures: fewer with many members and classes."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (probe.num_members * probe.num_classes)))


@torch.no_grad()
def measure(probe: GridProbe, data: ProbeData, depth: str) -> dict[str, Any] | None:
    """top1, top5, per_class (K shares) and confusion of a grid of one member, on val; None where
    its loss on val or a weight is not finite."""
    probe.eval()
    totals, num_correct5 = Totals(), 0
    seen: list[tuple[np.ndarray, np.ndarray]] = []  # labels and predictions
    for features, labels in data.batches("val", _rows_at_once(probe)):
        logits = probe(features[depth])
        totals.add(logits, labels)
        num_correct5 += int(topk_correct(logits[0], labels, 5))
        seen.append((labels.cpu().numpy(), logits[0].argmax(dim=1).cpu().numpy()))
    weights = probe.state_dict().values()
    if not (totals.means()[1].isfinite() and all(w.isfinite().all() for w in weights)):
        return None
    all_labels, predictions = (np.concatenate(parts) for parts in zip(*seen))
    matrix = confusion_matrix(all_labels, predictions, data.num_classes)
    top1, top5 = matrix.trace() / totals.num_rows, num_correct5 / totals.num_rows
    per_class = per_class_accuracy(matrix)
    return {"top1": top1, "top5": top5, "per_class": per_class, "confusion": matrix}


def _measure_setting(
    config: GridConfig, probe: GridProbe, data: ProbeData, depth: str, member: int
) -> dict[str, Any]:
    """What `measure` returns, with the member's setting. Raises NonFiniteLoss."""
    measured = measure(probe, data, depth)
    if measured is None:
        raise _diverged(config, depth, member)
    return measured | config.setting(member)


def _diverged(config: GridConfig, depth: str, member: int) -> NonFiniteLoss:
    """The NonFiniteLoss of a probe that has no accuracy to report."""
    setting = ", ".join(f"{key} {value:g}" for key, value in config.setting(member).items())
    return NonFiniteLoss(
        f"{config.checkpoint}: probe on {depth}, {setting}: the loss or a weight is not finite; "
        "lower --lrs"
    )


def _early_stopping(
    config: GridConfig, data: ProbeData, depth: str, selection: Selection
) -> dict[str, Any]:
    """Metrics of the member and epoch that scored best, as the probe was at that epoch."""
    member, epoch, top1 = selection.winner()
    best = _measure_setting(config, selection.probe_at_best(member), data, depth, member)
    best |= {"epoch": epoch, "selection_top1": top1}
    del best["per_class"], best["confusion"]
    return {f"best_{key}": value for key, value in best.items()}
