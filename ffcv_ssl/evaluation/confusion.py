"""Which classes a classifier takes for which: counts, accuracy by class, and a picture."""

# N images, K classes

from __future__ import annotations

from pathlib import Path

import numpy as np

from ffcv_ssl.files import save_figure

MAX_NAMED = 40  # classes whose names still fit on a picture


def confusion_matrix(labels, predictions, num_classes):
    """Counts (K, K) int64: row the label, column the prediction. labels, predictions: (N,) ints."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(matrix):
    """The share of each class that is recognised, K floats; None for a class without images."""
    totals = matrix.sum(axis=1)
    return [round(h / n, 6) if n else None for h, n in zip(matrix.diagonal().tolist(), totals)]


def draw_confusion(matrix, path, title, class_names=None):
    """Write a matrix (K, K) of counts as a PNG, each row as shares of its class; returns the path.

    Atomic: a reader never sees half a picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    num_classes = len(matrix)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = min(14.0, 4.0 + 0.3 * min(num_classes, MAX_NAMED))
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the class")
    panel.set(title=title, xlabel="predicted", ylabel="label")
    if num_classes <= MAX_NAMED:
        names = list(class_names or range(num_classes))
        panel.set_xticks(range(num_classes), names, rotation=90)
        panel.set_yticks(range(num_classes), names)
    if num_classes <= 12:
        for row, column in np.ndindex(num_classes, num_classes):
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = str(int(matrix[row, column]))
            panel.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    path = Path(path)
    save_figure(figure, path, dpi=100)
    return path
