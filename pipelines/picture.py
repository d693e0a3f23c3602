"""A picture of views: each image with its crop boxes, and beside it all draws of every view."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ffcv_ssl.files import own_temporary, save_figure
from ffcv_ssl.transforms import ImageOp
from pipelines.view import OPS

# One color per view, for its crop boxes and its captions; readable on light and dark images.
COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
COLUMN_INCHES, ROW_INCHES = 1.9, 2.4


def caption(row: np.void, op_classes: Iterable[type[ImageOp]] = tuple(OPS.values())) -> str:
    """The drawn parameters of one view of one image in a few short lines: one per op that acted.

    row: an element of `batch.params[view]`. op_classes: the ops of the view, in order.
    """
    names = row.dtype.names or ()
    known = (op for op in op_classes if all(name in names for name, _ in op.columns))
    text = ", ".join(filter(None, (op.caption(row) for op in known)))
    lines = (line.strip(", ") for line in text.split("\n"))
    return "\n".join(filter(None, lines))


def draw_grid(
    originals: Sequence[np.ndarray],
    draws: Sequence[tuple[str, np.ndarray, np.ndarray]],
    ops: Mapping[str, Sequence[type[ImageOp]]],
    title: str,
    path: str,
) -> None:
    """Write the grid as a PNG.

    originals: N arrays (H, W, 3) uint8, as stored. draws: per column (view name, N arrays (h, w, 3)
    uint8, structured array (N,) of parameters). ops: the op classes of each view. path: the file to
    write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows, num_columns = len(originals), 1 + len(draws)
    size = (COLUMN_INCHES * num_columns + 0.2, ROW_INCHES * num_rows + 0.5)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    colors = _colors(draws)
    for row, original in enumerate(originals):
        _show(axes[row, 0], original, f"{original.shape[1]}x{original.shape[0]}", "black")
        for column, (name, images, params) in enumerate(draws, 1):
            _box(axes[row, 0], params[row], colors[name])
            _show(axes[row, column], images[row], caption(params[row], ops[name]), colors[name])
    for axis, name in zip(axes[0], ["stored image", *(name for name, _, _ in draws)]):
        axis.set_title(name, fontsize=9, color=colors.get(name, "black"))
    figure.suptitle(title, fontsize=10)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save_figure(figure, path, 110, own_temporary(path))


def _colors(draws: Sequence[tuple]) -> dict[str, str]:
    names = list(dict.fromkeys(name for name, _, _ in draws))
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}


def _show(axis: Any, image: np.ndarray, text: str, color: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(text, fontsize=6.5, color=color, loc="left")


def _box(axis: Any, row: np.void, color: str) -> None:
    from matplotlib.patches import Rectangle

    if "crop" in (row.dtype.names or ()):
        top, left, height, width = (int(value) for value in row["crop"])
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(Rectangle(corner, width, height, fill=False, color=color, linewidth=1.2))
