"""Confusion counts and pictures cost little with any number of classes, and lose no result."""

import tracemalloc
from types import SimpleNamespace

import numpy as np

from ffcv_ssl.evaluation import confusion, protocol_run
from ffcv_ssl.evaluation.confusion import confusion_matrix, draw_confusion, per_class_accuracy
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.training.world import World


def test_counts_and_picture_of_many_classes_take_little_memory(tmp_path):
    num_classes = 10_000  # a matrix of counts would take 800 MB
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, num_classes, (2, 30_000))
    draw_confusion(confusion_matrix([0], [0], 1), tmp_path / "first.png", "imports, untraced")
    tracemalloc.start()
    matrix = confusion_matrix(labels, predictions, num_classes)
    assert len(per_class_accuracy(matrix)) == num_classes
    assert tracemalloc.get_traced_memory()[1] < 10e6
    draw_confusion(matrix, tmp_path / "a.png", "title")
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()
    assert matrix.sum() == 30_000 and matrix.trace() == (labels == predictions).sum()


def test_cells_of_several_classes_hold_the_sums_of_their_counts():
    labels, predictions = np.random.default_rng(0).integers(0, 10, (2, 500))
    matrix = confusion_matrix(labels, predictions, 10)
    expected = confusion_matrix(labels // 4, predictions // 4, 3)
    np.testing.assert_array_equal(matrix.binned(4), expected.binned(1))


def test_a_picture_that_cannot_be_drawn_loses_no_result(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(protocol_run, "draw_confusion", fail)
    monkeypatch.setattr(
        protocol_run, "make_record", lambda *args: {"protocol": "knn", "metrics": args[-1]}
    )
    encoder = SimpleNamespace(name="run")
    datasets = SimpleNamespace(describe=dict, class_names=None)
    config = SimpleNamespace(out=str(tmp_path))
    metrics = {"backbone": {"top1": 0.5, "confusion": confusion_matrix([0, 1], [0, 0], 2)}}
    record = protocol_run.finish_frozen("knn", config, encoder, datasets, metrics, World())
    assert read_results(tmp_path) == [record]
    (line,) = capsys.readouterr().err.splitlines()
    assert "not drawn (MemoryError); the result is recorded" in line
    assert confusion.MAX_CELLS == 1000
