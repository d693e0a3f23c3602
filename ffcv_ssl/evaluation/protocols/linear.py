"""`linear` and `mlp`: probes on frozen features at any depth, a grid of settings at once.

Features are standardised by the training samples' mean and standard deviation. The setting of the
grid is chosen on a held-out part of the training labels and trained once more on all of them; that
probe's accuracy after the last epoch is `top1`. `best_top1` is that of early stopping: the setting
and the epoch that were best on the held-out part, as they were then.
"""

# N samples, B images a batch, D features, G members of the grid, K classes

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

from ffcv_ssl.errors import NonFiniteLoss, UserError
from ffcv_ssl.evaluation import common
from ffcv_ssl.evaluation.confusion import confusion_matrix, per_class_accuracy
from ffcv_ssl.evaluation.features import FOLDER, FeaturesConfig, extract
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
from ffcv_ssl.seeding import derive_seed
from ffcv_ssl.training.probes import hits

ENOUGH_HELD_OUT = 500


@dataclass(frozen=True)
class LinearConfig(common.Evaluation):
    """Settings of a linear probe."""

    depths: list[str] = field(default_factory=lambda: ["backbone"])
    """Where the features are taken: backbone, projector_1 (after that layer)..."""
    hidden: list[PositiveInt] = field(default_factory=list)
    """Widths of the probe's hidden layers, each with batch-norm and ReLU; none: linear."""
    epochs: PositiveInt = 100
    """Passes over the training samples."""
    rows_per_step: PositiveInt = 256
    """Samples a step of the probes."""
    lrs: list[PositiveFloat] = field(default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    """Learning rates to try, for features whose mean squared length is 1; a cosine takes each to
    0."""
    weight_decays: list[NonNegativeFloat] = field(default_factory=lambda: [0.0])
    """Weight decays to try, with each of the rates."""
    momentum: ClosedUnitInterval = 0.9
    """Momentum of SGD."""
    holdout: ClosedUnitInterval = 0.1
    """Share of each class' training labels on which the setting is chosen."""
    splits: PositiveInt = 10
    """Where fewer than 500 images are held out, so many splits at most are tried, until they make
    500, and the setting that is best on average is chosen."""
    select: Literal["holdout", "val"] = "holdout"
    """Where it is chosen; `val` reports the best on the very images it is measured on."""
    augment: bool = False
    """Train on random crops and flips, encoded anew each epoch, instead of stored features."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self):
        for name in ("depths", "lrs", "weight_decays"):
            if not getattr(self, name):
                raise UserError(f"{name}: got an empty list, expected one value at least")
        for name in ("momentum", "holdout"):
            if getattr(self, name) == 1:
                raise UserError(f"{name}: got 1, expected below 1")

    @property
    def grid(self):
        """(learning rate, weight decay) of each member."""
        return list(itertools.product(self.lrs, self.weight_decays))

    def setting(self, member):
        """A member's setting by name."""
        return dict(zip(("lr", "weight_decay"), self.grid[member]))


@dataclass(frozen=True)
class MLPConfig(LinearConfig):
    """Settings of the MLP probe (Bordes et al. 2023: 2048-2048-classes)."""

    hidden: list[PositiveInt] = field(default_factory=lambda: [2048, 2048])
    """Widths of the probe's hidden layers, each with batch-norm and ReLU."""
    epochs: PositiveInt = 30
    """Passes over the training samples."""
    lrs: list[PositiveFloat] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    """Learning rates to try, for features of variance 1; a cosine takes each to 0."""


def run_linear(config, world, stop):
    """Protocol `linear`: returns the record. Raises UserError."""
    return _run("linear", config, world, stop)


def run_mlp(config, world, stop):
    """Protocol `mlp`: returns the record. Raises UserError."""
    return _run("mlp", config, world, stop)


def _run(protocol, config, world, stop):
    encoder = common.open_frozen(protocol, config, world)
    pair = common.open_pair(config.data, config.labels, encoder)
    folder = common.results_folder(config)
    store = (config.features.folder or folder / FOLDER, config.features.dtype, world, stop)
    val_ids = np.flatnonzero(pair.val.labels >= 0)
    train = extract(encoder, pair.train, pair, config.depths, *store, indices=pair.chosen)
    val = extract(encoder, pair.val, pair, config.depths, *store, indices=val_ids)
    data = ProbeData(config, pair, train, val, world.device)
    source = AugmentedData(data, encoder, pair, world) if config.augment else data
    metrics = evaluate_probes(config, data, source, stop, world.say)
    return common.finish(protocol, config, encoder, pair, metrics, folder, world)


def evaluate_probes(config, data, source=None, stop=None, say=print):
    """Train and choose probes as a LinearConfig says; returns {depth: metrics}.

    data: a ProbeData; source: what they are trained on, an AugmentedData or None for `data`.
    Metrics are top1, top5, per_class, confusion (K, K), lr, weight_decay, selected_on, and for
    early stopping best_top1, best_top5, best_epoch, best_lr, best_weight_decay. Raises UserError
    where there is a choice to make and nothing to choose on, and NonFiniteLoss where the probe that
    is to be reported diverged.
    """
    source = data if source is None else source
    judge = config.select if data.size(config.select) else None
    if judge is None and len(config.grid) > 1:
        got = f"got {config.holdout:g} of {len(data)} labels, which leaves none to choose on"
        raise UserError(f"holdout: {got}; use more labels, or one of lrs and of weight_decays")
    grids = dict.fromkeys(data.widths, config.grid)
    part = "all" if judge is None else "rest"
    scores = {depth: [] for depth in grids}
    for split in reversed(range(_num_splits(config, data, judge))):  # early stopping is the first's
        if judge == "holdout":
            data.hold_out(config.holdout, config.seed + split)
        probes, selections = train_probes(config, data, source, part, judge, grids, stop, say)
        for depth, selection in selections.items():
            scores[depth].append(selection.last_scores)
    chosen = dict.fromkeys(probes, 0)
    if judge is not None:
        chosen = {depth: best_member(scores[depth]) for depth in probes}
        for depth, member in chosen.items():
            if mean_scores(scores[depth])[0][member] < 0:  # so have all of them
                raise _diverged(config, depth, member)
    finals = {depth: probe.member(chosen[depth]) for depth, probe in probes.items()}
    if judge == "holdout":
        grids = {depth: [config.grid[member]] for depth, member in chosen.items()}
        finals, _ = train_probes(config, data, source, "all", None, grids, stop, say)
    metrics = {}
    for depth, probe in finals.items():
        metrics[depth] = _measure_setting(config, probe, data, depth, chosen[depth])
        metrics[depth]["selected_on"] = judge or "nothing"
        if judge is not None:
            metrics[depth]["selection_top1"] = mean_scores(scores[depth])[0][chosen[depth]].item()
            metrics[depth] |= _early_stopping(config, data, depth, selections[depth])
    return metrics


def _num_splits(config, data, judge):
    """How often the held-out part is drawn: few images alone would choose by chance."""
    if judge != "holdout" or len(config.grid) == 1:
        return 1
    return min(config.splits, -(-ENOUGH_HELD_OUT // data.size("holdout")))


def train_probes(config, data, source, part, judge, grids, stop, say):
    """Train a grid of probes at every depth on a `part` of the data, all in one pass over it.

    judge: the part on which the probes are scored after each epoch, or None. grids: for each depth
    its members' (learning rate, weight decay). Returns ({depth: GridProbe}, {depth: Selection}).
    """
    probes, optimizers = {}, {}
    for depth, grid in grids.items():
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "probe"))
        shape = (data.widths[depth], config.hidden, data.num_classes, len(grid))
        probes[depth] = GridProbe(*shape, generator).to(data.device)
        optimizers[depth] = GridSGD(probes[depth], *zip(*grid), config.momentum)
    selections = {depth: Selection(probe) for depth, probe in probes.items()}
    for epoch in range(config.epochs):
        steps, batches = source.epoch(part, config.rows_per_step, config.seed, epoch)
        for step, (features, labels) in enumerate(batches):
            common.stop_if_asked(stop)
            share = cosine(epoch * steps + step, config.epochs * steps)
            for depth, probe in probes.items():
                train_step(probe, optimizers[depth], features[depth], labels, share)
        if judge is not None:
            _score(probes, selections, data, judge, epoch + 1)
            if (epoch + 1) % max(1, config.epochs // 5) == 0:
                best = [f"{d} {max(s.last_scores[0].tolist()):.1%}" for d, s in selections.items()]
                say(f"epoch {epoch + 1}/{config.epochs}  top-1 on {judge}: {'  '.join(best)}")
    return probes, selections


@torch.no_grad()
def _score(probes, selections, data, judge, epoch):
    totals = {depth: Totals() for depth in probes}
    for features, labels in data.batches(judge, ROWS_AT_ONCE):
        for depth, probe in probes.items():
            totals[depth].add(probe.eval()(features[depth]), labels)
    for depth, selection in selections.items():
        selection.see(totals[depth], epoch)


@torch.no_grad()
def measure(probe, data, depth):
    """top1, top5, per_class (K shares) and confusion (K, K) of a grid of one, on val, or None where
    its loss there or a weight is not finite."""
    probe.eval()
    totals, top5 = Totals(), 0
    matrix = np.zeros((data.num_classes, data.num_classes), np.int64)
    for features, labels in data.batches("val", ROWS_AT_ONCE):
        logits = probe(features[depth])
        totals.add(logits, labels)
        top5 += int(hits(logits[0], labels, 5))
        predictions = logits[0].argmax(dim=1).cpu().numpy()
        matrix += confusion_matrix(labels.cpu().numpy(), predictions, data.num_classes)
    weights = probe.state_dict().values()
    if not (totals.means()[1].isfinite() and all(w.isfinite().all() for w in weights)):
        return None
    top1, top5 = int(matrix.trace()) / totals.num_rows, top5 / totals.num_rows
    per_class = per_class_accuracy(matrix)
    return {"top1": top1, "top5": top5, "per_class": per_class, "confusion": matrix}


def _measure_setting(config, probe, data, depth, member):
    """What `measure` says, with the member's setting. Raises NonFiniteLoss."""
    measured = measure(probe, data, depth)
    if measured is None:
        raise _diverged(config, depth, member)
    return measured | config.setting(member)


def _diverged(config, depth, member):
    """The NonFiniteLoss of a probe that has no accuracy to report."""
    setting = ", ".join(f"{key} {value:g}" for key, value in config.setting(member).items())
    where = f"{config.checkpoint}: probe on {depth}, {setting}"
    return NonFiniteLoss(f"{where}: the loss or a weight is not finite; lower --lrs")


def _early_stopping(config, data, depth, selection):
    """The member and the epoch that the judge liked best, and its scores there."""
    member, epoch, top1 = selection.winner()
    best = _measure_setting(config, selection.probe_at_best(member), data, depth, member)
    best |= {"epoch": epoch, "selection_top1": top1}
    del best["per_class"], best["confusion"]
    return {f"best_{key}": value for key, value in best.items()}
