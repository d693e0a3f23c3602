"""A run's metrics: long files are read from their end, and cut back where a run resumes."""

import json
import os
import threading
import tracemalloc

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.training import metrics_log
from ffcv_ssl.training.metrics_log import (
    METRICS_FILE,
    MetricsLog,
    each_metric_from_the_end,
    read_metrics,
)


def write(folder, steps, last_step=None, tensorboard=False, evaluate_after=()):
    log = MetricsLog(folder, last_step, tensorboard)
    for step in steps:
        log.write({"step": step, "train/loss": step / 3})
        if step in evaluate_after:
            log.write({"step": step, "val/knn/top1": step / 100})
    log.sync()
    return log


def shown_by_tensorboard(folder, tag="train/loss"):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64, 1 << 18])
def test_lines_from_the_end_are_the_lines_reversed_wherever_a_chunk_ends(
    tmp_path, monkeypatch, chunk_bytes
):
    monkeypatch.setattr(metrics_log, "_CHUNK_BYTES", chunk_bytes)
    path, rng = tmp_path / METRICS_FILE, np.random.default_rng(0)
    for number in range(60):
        lines = [
            json.dumps({"step": step, "text": "x" * int(rng.integers(0, 9))})
            for step in range(int(rng.integers(0, 6)))
        ]
        ends = ["", '{"step": 7', "\n\n", "[]\n"]
        text = "".join(f"{line}\n" for line in lines) + ends[number % len(ends)]
        path.write_text(text)
        assert list(each_metric_from_the_end(tmp_path)) == read_metrics(tmp_path)[::-1]
        assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


@pytest.mark.parametrize("chunk_bytes", [5, 1 << 18])
def test_a_log_that_goes_on_ends_with_its_last_step_and_keeps_no_later_line(
    tmp_path, monkeypatch, chunk_bytes
):
    monkeypatch.setattr(metrics_log, "_CHUNK_BYTES", chunk_bytes)
    for last_step in (0, 1, 3, 4, 9, 100):
        write(tmp_path, range(1, 10), evaluate_after=(4, 8)).close()
        whole = (tmp_path / METRICS_FILE).read_bytes()
        with open(tmp_path / METRICS_FILE, "ab") as file:
            file.write(b'{"step": 1, "tr')  # a line that a kill has torn
        log = MetricsLog(tmp_path, last_step, tensorboard=False)
        assert log.has_evaluation(4) == (last_step >= 4)
        assert log.latest("val/").get("step") == {0: None, 1: None, 3: None, 4: 4}.get(last_step, 8)
        log.close()
        kept = (tmp_path / METRICS_FILE).read_bytes()
        assert whole.startswith(kept)
        assert [r["step"] for r in read_metrics(tmp_path) if "train/loss" in r] == [
            step for step in range(1, 10) if step <= last_step
        ]


def test_a_damaged_line_hides_nothing_else(tmp_path):
    write(tmp_path, [1, 2]).close()
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + b"[" * 100_000 + b'\n{"step": "three"}\n')
    write(tmp_path, [3, 4], last_step=2).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_long_log_goes_on_without_reading_or_keeping_it(tmp_path):
    line = '{"step": %d, "train/loss": 0.5, "train/loss/term": 0.25, "lr": 0.1}\n'
    text = "".join(line % step for step in range(1, 30_001))
    (tmp_path / METRICS_FILE).write_text(text)
    tracemalloc.start()
    log = MetricsLog(tmp_path, 29_990, tensorboard=False)
    for step in range(29_991, 30_001):
        log.write({"step": step, "train/loss": 0.5})
    assert not log.has_evaluation(30_000) and log.latest("train/")["step"] == 30_000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    log.close()
    assert peak_bytes < 4 << 20
    assert sum(1 for _ in each_metric_from_the_end(tmp_path)) == 30_000


def test_events_go_on_in_a_new_file_that_hides_those_after_the_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, range(1, 7), tensorboard=True).close()
    written = []
    monkeypatch.setattr(MetricsLog, "_write_events", lambda log, record: written.append(record))
    MetricsLog(tmp_path, 4, tensorboard=True).close()
    assert [record["step"] for record in written] == [4]  # nothing else is written again
    monkeypatch.undo()
    write(tmp_path, [5, 6, 7], last_step=4, tensorboard=True).close()
    write(tmp_path, [7], last_step=6, tensorboard=True).close()
    assert shown_by_tensorboard(tmp_path) == [(step, round(step / 3, 4)) for step in range(1, 8)]


def test_an_evaluation_whose_events_a_kill_has_lost_is_shown_after_all(tmp_path):
    log = write(tmp_path, [1, 2], tensorboard=True)  # here the checkpoint of step 2 is written
    monitor = log._events
    log._events = None  # as if a kill had come before the events were on disk
    log.write({"step": 2, "val/knn/top1": 0.25})
    log.close()
    monitor.close()
    write(tmp_path, [3], last_step=2, tensorboard=True).close()
    assert shown_by_tensorboard(tmp_path, "val/knn/top1") == [(2, 0.25)]
    assert [step for step, _ in shown_by_tensorboard(tmp_path)] == [1, 2, 3]


def test_events_are_hidden_though_a_kill_has_torn_the_last_and_the_clock_was_put_back(tmp_path):
    write(tmp_path, range(1, 7), tensorboard=True).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    path.rename(path.with_name("events.out.tfevents.9999999999.host.1.0"))
    write(tmp_path, [4, 5], last_step=3, tensorboard=True).close()
    assert [step for step, _ in shown_by_tensorboard(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_that_had_no_events_shows_all_its_lines_once_it_has_them(tmp_path):
    write(tmp_path, [1, 2, 3]).close()
    write(tmp_path, [3], last_step=2, tensorboard=True).close()
    assert [step for step, _ in shown_by_tensorboard(tmp_path)] == [1, 2, 3]


def test_events_are_those_that_torchs_writer_would_write(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    rng = np.random.default_rng(0)
    records = [
        {"step": step, "train/loss": float(rng.normal()), "lr": 1e-9 * step, "val/n": step}
        for step in range(5)
    ]
    log = MetricsLog(tmp_path, tensorboard=True)
    theirs = SummaryWriter(str(tmp_path / "theirs" / "tensorboard"))
    for record in records:
        log.write({**record, "epoch": 1.5, "val/text": "a", "val/none": None})
        for tag in ("train/loss", "lr", "val/n"):
            theirs.add_scalar(tag, record[tag], record["step"])
    log.close()
    theirs.close()
    shown = []
    for folder in (tmp_path, tmp_path / "theirs"):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        tags = events.Tags()["scalars"]
        shown.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})
    assert shown[0] == shown[1] and len(shown[0]) == 3


def test_events_are_in_the_file_when_they_are_logged_and_no_thread_writes_them(tmp_path):
    before = threading.active_count()
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write({"step": 1, "train/loss": 0.25})
    assert threading.active_count() == before
    assert shown_by_tensorboard(tmp_path) == [(1, 0.25)]
    log.close()


def test_events_that_a_full_disk_does_not_take_are_one_line(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=True)
    log._events.records._writer = open("/dev/full", "wb", 0)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"tensorboard/events.*No space left on device"):
        log.write({"step": 1, "train/loss": 0.25})
    log.close()


def test_numbers_that_tensorboard_cannot_hold_are_left_out(tmp_path):
    huge = "1" + "0" * 400
    lines = [f'{{"step": {huge}, "a": 1}}', f'{{"step": 1, "a": {huge}, "b": 2}}']
    (tmp_path / METRICS_FILE).write_text("".join(f"{line}\n" for line in lines))
    MetricsLog(tmp_path, 1, tensorboard=True).close()
    assert shown_by_tensorboard(tmp_path, "b") == [(1, 2.0)]


def test_a_pipe_or_a_device_is_no_file_of_metrics(tmp_path):
    path = tmp_path / METRICS_FILE
    for make, kind in ((os.mkfifo, "pipe"), (lambda p: p.symlink_to("/dev/null"), "device")):
        make(path)
        for use in (MetricsLog, read_metrics, lambda f: list(each_metric_from_the_end(f))):
            with pytest.raises(UserError, match=f"is a {kind}, expected a regular file"):
                use(tmp_path)
        path.unlink()


# ---- Pictures and texts --------------------------------------------------------------------------


def png(shade):
    """A PNG of one color."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def pictures_of(folder, tag="views"):
    """[(step, PNG)] that TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    known = tag in events.Tags()["images"]
    return [(i.step, i.encoded_image_string) for i in events.Images(tag)] if known else []


def test_pictures_after_the_checkpoint_are_hidden_and_those_of_its_step_shown_again(tmp_path):
    path = tmp_path / "views.png"
    log = MetricsLog(tmp_path, None, tensorboard=True)
    for step in (0, 2, 4):
        log.write({"step": step, "val/knn/top1": 0.5})
        path.write_bytes(png(step))
        log.picture("views", path, step)
    log.close()
    assert pictures_of(tmp_path) == [(step, png(step)) for step in (0, 2, 4)]
    MetricsLog(tmp_path, 4, pictures={"views": (path, 4)}).close()
    assert pictures_of(tmp_path) == [(step, png(step)) for step in (0, 2, 4)]
    log = MetricsLog(tmp_path, 2, pictures={"views": (path, 4)})  # the picture is of later
    path.write_bytes(png(7))
    log.picture("views", path, 3)
    log.close()
    assert pictures_of(tmp_path) == [(0, png(0)), (3, png(7))]


def test_a_run_that_had_no_events_shows_the_picture_that_it_has(tmp_path):
    write(tmp_path, [1, 2]).close()
    (tmp_path / "views.png").write_bytes(png(9))
    pictures = {"views": (tmp_path / "views.png", 1), "report": (tmp_path / "none.png", 2)}
    MetricsLog(tmp_path, 2, pictures=pictures).close()
    assert pictures_of(tmp_path) == [(1, png(9))]


def test_the_settings_are_a_text_of_every_start(tmp_path):
    for last_step, about in ((None, "a: 1\nb: [2]\n"), (4, "a: 2\n")):
        log = MetricsLog(tmp_path, last_step, about=about)
        log.write({"step": 5, "train/loss": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("config")]
    assert texts == [(0, "    a: 1\n    b: [2]\n"), (4, "    a: 2\n")]
    plugin = events.SummaryMetadata("config").plugin_data
    assert plugin.plugin_name == "text"
