"""A picture of views: each image with its crop boxes, and beside it every view with its draws."""

from __future__ import annotations

import os

# One colour a view, for its crop boxes and its captions; readable on light and dark images.
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
COLUMN_INCHES, ROW_INCHES = 1.9, 2.4
_STEPS = ("brightness", "contrast", "saturation", "hue")
_SWITCHES = ("gray", "solarize", "equalize", "noise")


def caption(row):
    """The drawn parameters of one view of one image as a few short lines, one an op that acted.

    row: an element of `batch.params[view]`. Jitter factors stand in the order in which they act.
    """
    names = row.dtype.names or ()
    lines = []
    if "crop" in names:
        top, left, height, width = (int(value) for value in row["crop"])
        flip = ", flip" if "flip" in names and row["flip"] else ""
        lines.append(f"crop {width}x{height} at {left},{top}{flip}")
    if "jitter" in names and row["jitter"]["applied"]:
        lines.append(_jitter_text(row["jitter"]))
    last = [f"blur {row['sigma']:.2f}"] if "sigma" in names and row["sigma"] > 0 else []
    last += [name for name in _SWITCHES if name in names and row[name]]
    if last:
        lines.append(", ".join(last))
    return "\n".join(lines)


def _jitter_text(jitter):
    steps = [_STEPS[step] for step in jitter["order"]]
    return " ".join(
        f"h{jitter[step]:+.2f}" if step == "hue" else f"{step[0]}{jitter[step]:.2f}"
        for step in steps
    )


def draw_grid(originals, draws, title, path):
    """Write the grid as a PNG.

    originals: N arrays (H, W, 3) uint8, as stored. draws: for each column (view name, N arrays
    (h, w, 3) uint8, structured array (N,) of parameters). path: the file to make.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows, num_columns = len(originals), 1 + len(draws)
    size = (COLUMN_INCHES * num_columns + 0.2, ROW_INCHES * num_rows + 0.5)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    colours = _colours(draws)
    for row, original in enumerate(originals):
        _show(axes[row, 0], original, f"{original.shape[1]}x{original.shape[0]}", "black")
        for column, (name, images, params) in enumerate(draws, 1):
            _box(axes[row, 0], params[row], colours[name])
            _show(axes[row, column], images[row], caption(params[row]), colours[name])
    for axis, name in zip(axes[0], ["stored image", *(name for name, _, _ in draws)]):
        axis.set_title(name, fontsize=9, color=colours.get(name, "black"))
    figure.suptitle(title, fontsize=10)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path)


def _colours(draws):
    names = list(dict.fromkeys(name for name, _, _ in draws))
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _show(axis, image, text, colour):
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(text, fontsize=6.5, color=colour, loc="left")


def _box(axis, row, colour):
    from matplotlib.patches import Rectangle

    if "crop" in (row.dtype.names or ()):
        top, left, height, width = (int(value) for value in row["crop"])
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(Rectangle(corner, width, height, fill=False, color=colour, linewidth=1.2))
