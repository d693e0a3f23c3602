"""Which classes are confused with which: counts, accuracy per class, and a picture."""

# N images, K classes

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ffcv_ssl.files import save_figure

MAX_NAMED = 40
"""So many classes have their names on the picture."""
MAX_COUNTED = 12
"""So many classes have their counts in the picture's cells."""


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (K, K) int64: label by row, prediction by column. labels, predictions: (N,) ints."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(matrix: np.ndarray) -> list[float | None]:
    """The share of each class that is recognised, K floats; None for a class without images."""
    totals, num_correct = matrix.sum(axis=1), matrix.diagonal().tolist()
    return [round(c / n, 6) if n else None for c, n in zip(num_correct, totals)]


def draw_confusion(
    matrix: np.ndarray, path: str | Path, title: str, class_names: Sequence[str] | None = None
) -> Path:
    """Write a matrix (K, K) of counts as a PNG, each row as shares of its class; returns the path.

    Atomic: a reader never sees half a picture.
    """
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    num_classes = len(matrix)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = min(14.0, 4.0 + 0.3 * min(num_classes, MAX_NAMED))
    figure = Figure(figsize=(side, side), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the class")
    panel.set(title=title, xlabel="predicted", ylabel="label")
    if num_classes <= MAX_NAMED:
        names = [str(name) for name in class_names or range(num_classes)]
        panel.set_xticks(range(num_classes), names, rotation=90)
        panel.set_yticks(range(num_classes), names)
    if num_classes <= MAX_COUNTED:
        for row, column in np.ndindex(num_classes, num_classes):
            color = "white" if shares[row, column] > 0.5 else "black"
            count = str(int(matrix[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    path = Path(path)
    save_figure(figure, path, dpi=100)
    return path
