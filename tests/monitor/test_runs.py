"""What a board says of runs' folders, sound and hostile, and what changes in them."""

import fcntl
import json
import os
import shutil

import pytest
from support.metric_runs import (
    evaluation_record,
    records_of,
    training_record,
    write_config,
    write_metric_run,
    write_records,
    write_views,
)

from ffcv_ssl.monitor import activity, extras
from ffcv_ssl.monitor import board as board_module
from ffcv_ssl.monitor.board import Board
from ffcv_ssl.monitor.find import find_runs, names_of
from ffcv_ssl.training import run_folder, weight_files
from ffcv_ssl.training.metrics_log import X_AXES


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Folders are searched at each refresh."""
    monkeypatch.setattr(board_module, "_SEARCH_INTERVAL_S", 0)
    monkeypatch.setattr(board_module, "_SEARCH_PATIENCE", 0)


def look(*paths):
    """All that a fresh board says: {name: parts}."""
    board = Board(paths)
    board.refresh()
    update = board.since("", 0)
    json.dumps(update, allow_nan=False)
    return {run["info"]["name"]: run for run in update["runs"]}


def test_every_number_of_a_short_run_is_on_the_board(tmp_path):
    records = list(records_of(40))
    records[3]["train/loss"] = None
    tables = look(write_metric_run(tmp_path / "a"))["a"]["tables"]
    write_records(tmp_path / "a", records)
    tables = look(tmp_path / "a")["a"]["tables"]
    for table, mark in ((tables["training"], "train/"), (tables["evaluation"], "val/")):
        own = [record for record in records if any(key.startswith(mark) for key in record)]
        for axis in X_AXES:
            assert table["axes"][axis] == [record[axis] for record in own]
        keys = {key for record in own for key in record} - set(X_AXES)
        assert set(table["columns"]) == keys
        for key in keys:
            assert table["columns"][key] == [record[key] for record in own]


def test_headline_numbers_are_the_last_and_the_best(tmp_path):
    write_config(write_records(tmp_path / "a", []), epochs=10)
    tops = [0.1, 0.7, 0.4]
    for step, top1 in zip((0, 10, 20), tops):
        record = {**evaluation_record(step), "val/backbone/top1": top1, "val/knn/top1": top1 / 2}
        write_records(tmp_path / "a", [record, training_record(step + 1)], "a")
    info = look(tmp_path / "a")["a"]["info"]
    key = "val/backbone/top1"
    assert info["accuracy"] == {"key": key, "last": 0.4, "best": 0.7, "epoch": 1.0}
    assert info["knn"]["last"] == 0.2 and info["knn"]["best"] == 0.35
    assert (info["epoch"], info["epochs"], info["step"]) == (2.1, 10, 21)
    assert info["images_per_s"] == training_record(21)["train/images_per_s"]
    finals = look(tmp_path / "a")["a"]["finals"]
    assert finals["train/loss"]["last"] == training_record(21)["train/loss"]
    assert finals["val/layer4/top1"]["last"] == evaluation_record(20)["val/layer4/top1"]


def test_the_remaining_time_of_a_running_run_is_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(activity, "is_held", lambda path: True)
    write_metric_run(tmp_path / "a", 20, epochs=8)
    info = look(tmp_path / "a")["a"]["info"]
    assert info["state"] == "running"
    assert info["seconds_left"] == pytest.approx(5.0 / 2 * 6)


def test_names_of_files_are_those_that_training_uses():
    assert activity.BACKBONE == run_folder.BACKBONE
    assert activity.CHECKPOINT == run_folder.CHECKPOINT
    assert activity.FINETUNED == weight_files.FINETUNED
    assert extras.CONFIG_FILE == run_folder.CONFIG
    assert extras.VIEWS_PICTURE == run_folder.VIEWS_PICTURE
    assert extras.VIEWS_FILE == run_folder.VIEWS_FILE


def old(folder):
    """The folder, with metrics of long ago."""
    os.utime(folder / "metrics.jsonl", (1e9, 1e9))
    return folder


def test_the_state_of_a_run(tmp_path):
    def state(folder):
        return look(folder)[folder.name]["info"]["state"]

    assert state(old(write_metric_run(tmp_path / "finished"))) == "finished"
    assert state(old(write_metric_run(tmp_path / "copied", is_finished=False))) == "finished"
    broken = old(write_metric_run(tmp_path / "broken", 15, is_finished=False))
    assert state(broken) == "interrupted"
    extended = old(write_metric_run(tmp_path / "extended", 40, epochs=9))
    assert state(extended) == "interrupted"
    (tmp_path / "new").mkdir()
    (tmp_path / "new/checkpoint.pt").touch()
    assert state(tmp_path / "new") == "no records yet"
    tuned = old(write_metric_run(tmp_path / "tuned", 15, is_finished=False))
    (tuned / activity.FINETUNED).touch()
    assert state(tuned) == "finished"
    os.utime(broken / "metrics.jsonl")  # it just wrote, and has no lock that could be seen
    assert state(broken) == "running"


def test_a_run_that_holds_its_lock_is_running_and_one_that_let_it_go_is_not(tmp_path):
    folder = write_metric_run(tmp_path / "a", 15, is_finished=False)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not activity.is_held(folder / ".lock"):
            pytest.skip("this system does not list its locks in /proc/locks")
        assert look(folder)["a"]["info"]["state"] == "running"
    assert look(folder)["a"]["info"]["state"] == "interrupted"  # though it has just written


def test_news_are_only_what_is_new(tmp_path):
    folder = write_metric_run(tmp_path / "a", 10, is_finished=False)
    board = Board([folder])
    board.refresh()
    first = board.since("", 0)
    board.refresh()
    assert board.since(first["boot"], first["version"])["runs"] == []
    write_records(folder, [training_record(11)], "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "epo')  # a line that is just being written
    board.refresh()
    (news,) = board.since(first["boot"], first["version"])["runs"]
    assert set(news) == {"id", "info", "finals", "tables"}
    assert set(news["tables"]) == {"training"}
    assert news["tables"]["training"]["from"] == 10
    assert news["tables"]["training"]["axes"]["step"] == [11]
    assert board.since("another process", first["version"])["from"] == 0


def test_a_run_that_starts_again_is_read_anew(tmp_path):
    folder = write_metric_run(tmp_path / "a", 40, is_finished=False)
    board = Board([folder])
    board.refresh()
    version = board.version
    write_records(folder, [*records_of(20), training_record(21, lift=1.0)])
    board.refresh()
    (news,) = board.since(board.boot, version)["runs"]
    table = news["tables"]["training"]
    assert (table["from"], table["axes"]["step"]) == (0, list(range(1, 22)))
    assert table["columns"]["train/loss"][-1] == training_record(21, 1.0)["train/loss"]
    assert news["info"]["accuracy"]["best"] == evaluation_record(20)["val/backbone/top1"]


def test_runs_come_and_go_while_the_board_is_watched(tmp_path):
    (tmp_path / "runs").mkdir()
    board = Board([tmp_path / "runs", tmp_path / "later"])
    board.refresh()
    assert board.since("", 0)["order"] == []
    write_metric_run(tmp_path / "runs/a", 10)
    write_metric_run(tmp_path / "later", 10)
    board.refresh()
    update = board.since("", 0)
    assert [run["info"]["name"] for run in update["runs"]] == ["a", "later"]
    shutil.rmtree(tmp_path / "runs/a")
    board.refresh()
    news = board.since(board.boot, update["version"])
    assert news["order"] == update["order"][1:] and news["runs"] == []


def test_a_parent_folder_stands_for_all_runs_below_it(tmp_path):
    for name in ("b/deep/run", "a", "a/tuned", ".hidden/run"):
        write_metric_run(tmp_path / name, 1)
    os.symlink(tmp_path / "a", tmp_path / "link")
    found = find_runs([tmp_path])
    assert found == [tmp_path / name for name in ("a", "a/tuned", "b/deep/run")]
    assert find_runs([tmp_path / "a", tmp_path / "link"]) == [tmp_path / "a"]


def test_names_are_as_short_as_they_can_be(tmp_path):
    folders = [tmp_path / name for name in ("x/a", "y/a", "y/b")]
    assert names_of(folders) == ["x/a", "y/a", "b"]
    assert names_of([tmp_path, tmp_path]) == [str(tmp_path)] * 2


HOSTILE = {
    "metrics": '{"step": 1, "train/loss": NaN, "a": {"b": 1}}\n{"step": 2, "epoch": 1e999}\n\0\n',
    "config": "epochs: &a [1, *a]\n",
    "results": '{"metrics": {"top1": "a", "b": [1]}, "settings": 3}\nnothing\n',
}


def test_hostile_files_cost_their_part_and_are_named(tmp_path, capsys):
    folder = write_metric_run(tmp_path / "a", 10)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(HOSTILE["metrics"])
    (folder / "config.yaml").write_text("a: " + "[" * 3000)
    (folder / "results.jsonl").write_text(HOSTILE["results"])
    (folder / "views.png").write_bytes(b"no picture" * 9)
    run = look(folder)["a"]
    assert run["tables"]["training"]["records"] == 12
    assert run["config"] is None and run["views"] is None
    assert run["evaluations"][0]["metrics"] == {}
    notes = "\n".join(run["info"]["notes"])
    assert "lines of metrics.jsonl that are no records: 1" in notes
    assert "views.png: got no PNG picture; remove it" in notes
    assert len(run["info"]["notes"]) == 3


def test_files_of_another_kind_or_size_are_left_out(tmp_path, monkeypatch):
    folder = write_metric_run(tmp_path / "a", 10)
    (folder / "config.yaml").write_text("- a\n")
    os.mkfifo(folder / "results.jsonl")
    (folder / "views.png").mkdir()
    notes = "\n".join(look(folder)["a"]["info"]["notes"])
    assert "config.yaml: got no mapping of settings; restore it" in notes
    assert "results.jsonl: is a pipe, expected a regular file; it is left out" in notes
    assert "views.png: is a folder, expected a regular file; it is left out" in notes
    with open(folder / "config.yaml", "w") as file:
        file.truncate(2 << 20)
    notes = "\n".join(look(folder)["a"]["info"]["notes"])
    assert "config.yaml: got 2 MiB, expected at most 1 MiB; it is left out" in notes
    os.unlink(folder / "metrics.jsonl")
    os.mkfifo(folder / "metrics.jsonl")
    assert "metrics.jsonl: is a pipe" in look(folder)["a"]["info"]["notes"][0]


def test_views_come_with_what_was_drawn(tmp_path):
    folder = write_metric_run(tmp_path / "a", 10)
    write_views(folder)
    views = look(folder)["a"]["views"]
    assert views["picture"].startswith("data:image/png;base64,iVBOR")
    assert (views["width"], views["height"], views["resolution"]) == (40, 20, "96")
    ((first, second),) = [sample["views"] for sample in views["samples"]]
    assert first["name"] == "view_0"
    assert first["drawn"][0] == ["RandomResizedCrop", "crop 3, 4, 50, 60"]
    assert second["drawn"] == [["flip", "true"]]


def test_pictures_of_many_runs_are_bounded(tmp_path, monkeypatch):
    for name in "ab":
        write_views(write_metric_run(tmp_path / name, 1))
    monkeypatch.setattr(board_module, "MAX_VIEWS_BYTES", 200)
    runs = look(tmp_path)
    assert runs["a"]["views"]["picture"] and runs["b"]["views"]["picture"] is None


def test_texts_for_the_page_are_short():
    assert len(extras.text("x" * 10_000)) < 400
    assert extras.text([1.0, 2, None, True, {"a": 0.1 + 0.2}]) == "1, 2, null, true, a 0.3"
    assert extras.text("a\nb") == "a b"


def test_evaluations_are_those_that_evaluate_wrote(tmp_path):
    folder = write_metric_run(tmp_path / "a", 10)
    metrics = {"backbone": {"top1": 0.5, "top5": 0.9}}
    record = {"protocol": "linear", "metrics": metrics, "settings": {"lrs": [0.1, 1.0]}}
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    (found,) = look(folder)["a"]["evaluations"]
    assert found["metrics"] == {"backbone.top1": 0.5}
    assert found["settings"] == {"lrs": "[0.1, 1.0]"}
