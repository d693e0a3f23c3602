"""The picture of a run: one damaged line of the metrics costs no more than its point."""

import json

import matplotlib.image

from ffcv_ssl.training.metrics_log import METRICS_FILE
from ffcv_ssl.training.report import draw_report

LINES = [
    {"step": step, "epoch": step / 2, "train/loss": 1 / step, "val/backbone/top1": 0.1 * step}
    for step in (1, 2, 3)
]


def drawn(folder, lines):
    """The pixels of the picture of a run with such lines."""
    folder.mkdir()
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / METRICS_FILE).write_text(text)
    return matplotlib.image.imread(draw_report(folder))[60:]  # without the folder's name


DAMAGED = [
    {"step": 2, "epocj": 1.0, "train/loss": 0.5, "val/backbone/top1": 0.5},
    {"step": 2, "epoch": "1.0", "train/loss": 0.5, "val/backbone/top1": 0.5},
    {"step": 2, "epoch": None, "train/loss": 0.5},
    {"step": 2, "epoch": 1.0, "train/loss": "0.5", "val/backbone/top1": [0.5]},
    {"step": 2, "epoch": 1.0, "train/loss": {}, "val/top1": 0.5, "val/a/b/top1": 0.5},
    '{"step": 2, "epoch": 1.0, "train/loss": 1%s}\n' % ("0" * 400),
    '{"step": 2, "epoch": 1e308, "train/loss": NaN, "val/backbone/top1": Infinity}\n',
]  # fmt: skip


def test_lines_whose_names_or_values_are_damaged_are_left_out(tmp_path):
    expected = drawn(tmp_path / "a", LINES)
    found = drawn(tmp_path / "b", [LINES[0], *DAMAGED, *LINES[1:]])
    assert expected.shape == found.shape and (expected == found).all()


def test_a_folders_name_is_no_formula(tmp_path):
    assert drawn(tmp_path / "$x_$_$", LINES).std() > 0.05
