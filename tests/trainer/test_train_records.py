"""Checkpoints, metrics and the report: what a run leaves on disk."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch

from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from ffcv_ssl.training.report import draw_report


def test_checkpoint_loads_with_weights_only_and_equals_what_was_saved(tmp_path):
    state = {
        "weights": torch.arange(4.0),
        "numbers": [np.int64(3), np.float32(0.5), True, None],
        "version": torch.__version__,  # a subclass of str, which weights_only refuses as it is
        "path": tmp_path,
        "nested": {"array": np.arange(3), "pair": (1, "a")},
        "rng": checkpoint.rng_state(),
    }
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["numbers"] == [3, 0.5, True, None]
    assert loaded["version"] == str(torch.__version__) and loaded["path"] == str(tmp_path)
    assert loaded["nested"]["array"].tolist() == [0, 1, 2]
    assert loaded["nested"]["pair"] == (1, "a")


def test_checkpoint_with_an_object_is_refused_by_name_and_the_old_one_stays(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(TypeError, match=r"state\.a\[1\] is a object"):
        checkpoint.save(path, {"a": [1, object()]})
    assert checkpoint.load(path) == {"step": 1}


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written \(disk full\)"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_an_unreadable_checkpoint_is_one_line_with_a_remedy(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match="restore a kept copy") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_kept_copy_stays_when_the_checkpoint_goes_on(tmp_path):
    path, kept = tmp_path / "c.pt", tmp_path / "kept.pt"
    checkpoint.save(path, {"step": 1})
    checkpoint.keep_copy(path, kept)
    checkpoint.save(path, {"step": 2})
    assert (checkpoint.load(kept), checkpoint.load(path)) == ({"step": 1}, {"step": 2})


def test_random_numbers_go_on_where_they_were_saved():
    torch.manual_seed(7)
    state = checkpoint.rng_state()
    first = torch.rand(5)
    checkpoint.restore_rng_state(state)
    assert torch.equal(torch.rand(5), first)


def write_metrics(folder, steps, **options):
    log = MetricsLog(folder, tensorboard=False, **options)
    for step in steps:
        log.write({"step": step, "train/loss": step / 3})
    log.sync()
    log.close()


def test_a_resumed_log_loses_the_steps_after_the_checkpoint_and_a_torn_line(tmp_path):
    write_metrics(tmp_path, [2, 4, 6, 8])
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "tr')
    write_metrics(tmp_path, [6, 8], last_step=4)
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["train/loss"] for line in lines] == [2 / 3, 4 / 3, 6 / 3, 8 / 3]


def test_a_fresh_log_starts_empty_whatever_lay_there(tmp_path):
    write_metrics(tmp_path, [2, 4])
    write_metrics(tmp_path, [1])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_events_are_cut_back_with_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last_step, steps in ((None, [1, 2, 3]), (1, [2])):
        log = MetricsLog(tmp_path, last_step, tensorboard=True)
        for step in steps:
            log.write({"step": step, "seconds": 1.0, "train/loss": float(step)})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Tags()["scalars"] == ["train/loss"]


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"step": 1, "train/loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": None}]


@pytest.mark.parametrize("evaluated", [True, False])
def test_report_is_drawn_with_and_without_evaluations_and_views(tmp_path, evaluated):
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 4):
        log.write({"step": step, "epoch": step / 2, "train/loss": 1 / step})
        if evaluated:
            accuracies = {"val/backbone/top1": 0.1 * step, "val/knn/top1": 0.2 * step}
            log.write({"step": step, "epoch": step / 2, **accuracies})
    log.close()
    views = [np.full((3, 16, 16, 3), value, np.uint8) for value in (40, 200)] if evaluated else None
    picture = matplotlib.image.imread(draw_report(tmp_path, views))
    assert picture.shape[1] > 800 and picture.std() > 0.05
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]
