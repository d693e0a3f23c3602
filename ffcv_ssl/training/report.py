"""The picture of a run, `report.png`: loss, probes by depth, k-NN, and what the views look like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl.files import StrPath, explained, save_figure
from ffcv_ssl.training.metrics_log import each_metric

REPORT_FILE = "report.png"
_ACCURACY = re.compile("val/[^/]+/top1")
_LARGEST = 1e100  # matplotlib's axes overflow before float64 does


def draw_report(folder: StrPath, views: list[np.ndarray] | None = None) -> Path:
    """Draw the run in `folder` from its metrics; returns the picture's path.

    views: a uint8 (B, H, W, 3) array per view, all of the same B images; or None. Panels without
    data (no labels, no evaluation) are left out, and so are values that are no numbers: a line of
    the metrics with a wrong bit may still be JSON. The picture is written atomically.
    Raises CheckpointError where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    records = [_drawn_part(record) for record in each_metric(folder)]
    has_probes = any(_is_accuracy(key) for record in records for key in record)
    figure = Figure(figsize=(13, 9 if views else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(2 if views else 1, 1, squeeze=False)[:, 0]
    panels = rows[0].subplots(1, 3 if has_probes else 1, squeeze=False)[0]
    _draw_loss(panels[0], records)
    if has_probes:
        _draw_accuracies(panels[1], records, "linear probes", lambda name: name != "knn")
        _draw_accuracies(panels[2], records, "k-NN on the backbone", lambda name: name == "knn")
    if views:
        _draw_views(rows[1], views)
    figure.suptitle(str(folder), parse_math=False)  # a name may have dollars
    path = Path(folder) / REPORT_FILE
    with explained(path):
        save_figure(figure, path, dpi=90)
    return path


def _drawn_part(record: dict[str, Any]) -> dict[str, float]:
    """What is drawn of a record: a long run has many records, and many more numbers in them."""
    if not _is_number(record.get("epoch")):
        return {}
    return {
        key: value
        for key, value in record.items()
        if (key in ("epoch", "train/loss") or _is_accuracy(key)) and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _is_accuracy(key):
    return _ACCURACY.fullmatch(key) is not None


def _draw_loss(panel, records):
    points = [r for r in records if "train/loss" in r]
    panel.plot([r["epoch"] for r in points], [r["train/loss"] for r in points], color="black")
    panel.set(title="training loss", xlabel="epoch", ylabel="loss")
    panel.grid(alpha=0.3)


def _draw_accuracies(panel, records, title, wanted):
    accuracies = [key for r in records for key in r if _is_accuracy(key)]
    names = dict.fromkeys(key.split("/")[1] for key in accuracies)  # val/backbone/top1
    shown = [name for name in names if wanted(name)]
    for name in shown:
        line = [(r["epoch"], r[f"val/{name}/top1"]) for r in records if f"val/{name}/top1" in r]
        epochs, shares = zip(*line)
        panel.plot(epochs, [100 * share for share in shares], marker=".", label=name)
    panel.set(title=title, xlabel="epoch", ylabel="top-1 on val, %")
    panel.grid(alpha=0.3)
    if shown:
        panel.legend()


def _draw_views(figure, views):
    """A grid: one column per image, one row per view. All images lie on one panel: a panel each
    would take longer to draw than a short run trains."""
    panel, gap = figure.subplots(), 0.06
    for row, images in enumerate(views):
        for column, image in enumerate(images):
            place = (column, column + 1 - gap, row + 1 - gap, row)  # left, right, bottom, top
            panel.imshow(np.asarray(image), interpolation="nearest", extent=place)
    panel.set(xlim=(0, len(views[0]) - gap), ylim=(len(views) - gap, 0), xticks=[])
    panel.set_yticks([row + 0.5 - gap / 2 for row in range(len(views))])
    panel.set_yticklabels([f"view {row}" for row in range(len(views))])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.suptitle("views of the first images in epoch 0")
