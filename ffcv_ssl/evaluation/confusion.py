"""Which classes are confused with which: counts, accuracy per class, and a picture.

Guarantees: no array has a cell for each pair of classes, as 22,000 classes have 484 million pairs.
"""

# N images, K classes, P pairs (label, prediction) that occur, C cells along a picture's side

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_ssl.files import save_figure

MAX_NAMED = 40
"""So many classes have their names on the picture."""
MAX_COUNTED = 12
"""So many classes have their counts in the picture's cells."""
MAX_CELLS = 1000
"""So many cells has a picture along a side; of more classes, neighbouring ones share a cell."""


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Counts of (label, prediction), of the pairs that occur. Methods are named as NumPy's."""

    num_classes: int
    labels: np.ndarray
    """(P,) int64, ascending."""
    predictions: np.ndarray
    """(P,) int64."""
    counts: np.ndarray
    """(P,) int64, at least 1."""

    def sum(self, axis: int | None = None) -> np.ndarray:
        """Number of images, or those with each label (axis 1) or each prediction (axis 0), (K,)."""
        if axis is None:
            return self.counts.sum()
        classes = self.labels if axis == 1 else self.predictions
        return _summed(classes, self.counts, self.num_classes)

    def diagonal(self) -> np.ndarray:
        """(K,) int64: number of images of each class that are recognised."""
        right = self.labels == self.predictions
        return _summed(self.labels[right], self.counts[right], self.num_classes)

    def trace(self) -> int:
        """Number of images that are recognised."""
        return int(self.diagonal().sum())

    def binned(self, classes_per_cell: int) -> np.ndarray:
        """Counts (C, C) int64 with so many consecutive classes per cell; the last may have fewer
        classes. With 1, a matrix (K, K), label by row."""
        side = -(-self.num_classes // classes_per_cell)
        cells = self.labels // classes_per_cell * side + self.predictions // classes_per_cell
        return _summed(cells, self.counts, side**2).reshape(side, side)


def confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> ConfusionMatrix:
    """The counts of (N,) labels and predictions, ints in [0, K)."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    pairs, counts = np.unique(pairs, return_counts=True)
    return ConfusionMatrix(num_classes, *np.divmod(pairs, num_classes), counts)


def per_class_accuracy(matrix: ConfusionMatrix) -> list[float | None]:
    """The share of each class that is recognised, K floats; None for a class without images."""
    totals, num_correct = matrix.sum(axis=1).tolist(), matrix.diagonal().tolist()
    return [round(c / n, 6) if n else None for c, n in zip(num_correct, totals)]


def draw_confusion(
    matrix: ConfusionMatrix, path: str | Path, title: str, class_names: Sequence[str] | None = None
) -> Path:
    """Write the counts as a PNG, each row as shares of its class; returns the path. Of more than
    MAX_CELLS classes, consecutive ones share a row and a column.

    Atomic: a reader never sees half a picture.
    """
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    num_classes = matrix.num_classes
    classes_per_cell = -(-num_classes // MAX_CELLS)
    counts = matrix.binned(classes_per_cell)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(14.0, 4.0 + 0.3 * min(num_classes, MAX_NAMED))
    figure = Figure(figsize=(side, side), layout="constrained")
    panel = figure.subplots()
    end = len(counts) * classes_per_cell - 0.5  # so that the axes count classes, not cells
    image = panel.imshow(
        shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(-0.5, end, end, -0.5)
    )
    what, bins = "class", ""
    if classes_per_cell > 1:
        what, bins = f"{classes_per_cell} classes", f" ({classes_per_cell} classes per cell)"
    figure.colorbar(image, ax=panel, shrink=0.8, label=f"share of the {what}")
    panel.set(title=title, xlabel=f"predicted{bins}", ylabel=f"label{bins}")
    if num_classes <= MAX_NAMED:
        names = [str(name) for name in class_names or range(num_classes)]
        panel.set_xticks(range(num_classes), names, rotation=90)
        panel.set_yticks(range(num_classes), names)
    if num_classes <= MAX_COUNTED:
        for row, column in np.ndindex(num_classes, num_classes):
            color = "white" if shares[row, column] > 0.5 else "black"
            count = str(int(counts[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    path = Path(path)
    save_figure(figure, path, dpi=100)
    return path


def _summed(cells: np.ndarray, counts: np.ndarray, num_cells: int) -> np.ndarray:
    """(num_cells,) int64: the sum of the counts in each cell."""
    sums = np.zeros(num_cells, np.int64)
    np.add.at(sums, cells, counts)
    return sums
