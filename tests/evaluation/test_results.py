"""Results: the file holds every record, however many write at once; old names are still known."""

import errno
import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import results
from ffcv_ssl.evaluation.former_names import with_new_names, with_old_names
from ffcv_ssl.evaluation.results import (
    RESULTS_FILE,
    read_results,
    report,
    settings_key,
    writable_folder,
)


def test_a_record_is_a_line_of_json_and_nothing_else_is_written(tmp_path):
    record = {"protocol": "knn", "metrics": {"backbone": {"top1": 0.5}}, "ks": [1, 20], "x": None}
    written = report(record, tmp_path)
    assert read_results(tmp_path) == [written] and written.pop("time")[:2] == "20"
    assert written == record
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".results.lock"} == {RESULTS_FILE}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    report({"long": [0.123456] * 100, "loss": math.nan, "d": {"e": math.inf}}, tmp_path)
    (record,) = read_results(tmp_path)
    assert record["long"] == [0.123456] * 100 and record["loss"] is record["d"]["e"] is None


def test_writers_that_report_at_once_lose_nothing(tmp_path):
    def write(me):  # a lock holds between open files, be they of one process or of several
        for index in range(10):
            report({"writer": me, f"column {me}": index}, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    seen = [(row["writer"], row[f"column {row['writer']}"]) for row in read_results(tmp_path)]
    assert sorted(seen) == [(w, i) for w in range(4) for i in range(10)]


def test_a_killed_writers_half_line_is_left_out(tmp_path):
    written = report({"a": 1}, tmp_path)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps({"a": 2})[:4])
    assert read_results(tmp_path) == [written] and read_results(tmp_path / "none") == []


@pytest.mark.parametrize("old, new", [("0.5", "0.7"), ('"digest": "', '"digest": "0')])
def test_a_record_that_changed_since_it_was_written_is_left_out_and_named(
    tmp_path, capsys, old, new
):
    first = report({"a": 1}, tmp_path)
    report({"top1": 0.5}, tmp_path)
    path = tmp_path / RESULTS_FILE
    path.write_text(path.read_text().replace(old, new))
    kept = [] if old != "0.5" else [first]
    assert read_results(tmp_path) == kept
    line = f"{path}:2: changed since it was written, this result is left out; measure it again, or "
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


@pytest.mark.parametrize("half", ['{"a": 2, "b', '{"a": 2, "b": 1}'])
def test_the_record_after_a_killed_writers_half_line_is_kept(tmp_path, half):
    first = report({"a": 1}, tmp_path)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(half)
    rest = [report({"a": value}, tmp_path) for value in (3, 4)]
    records = read_results(tmp_path)
    assert [records[0], *records[-2:]] == [first, *rest] and len(records) == 3 + half.endswith("}")
    assert not (tmp_path / "results.jsonl").read_text().count("\n\n")


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file"):
        report({"a": 1}, tmp_path / "file")


def test_settings_differ_in_their_key_and_results_do_not():
    record = {"checkpoint": "a", "about": {"step": 1}, "data": {}, "settings": {"k": [1]}}
    assert settings_key(record) == settings_key({**record, "metrics": 1})
    assert settings_key(record) != settings_key({**record, "settings": {"k": [2]}})
    assert settings_key(record) == settings_key({**record, "settings": {"k": [1], "out": "x"}})
    assert flatten_as_text({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": "[]"}


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"k": [1, 5], "temperature": [0.1], "views": 0, "depths": ["backbone"]}, "624687ab"),
        ({"depths": ["backbone"], "splits": 3}, "992c233f"),
        ({"layer": 0, "epochs": 3}, "ee495de1"),
        ({"layer": 2, "epochs": 3}, "001404b4"),
    ],
)
def test_a_record_with_old_names_is_read_with_new_ones_and_keeps_its_key(tmp_path, settings, key):
    old = {"protocol": "p", "checkpoint": "a", "about": {}, "data": {}, "settings": settings}
    new = {**old, "settings": with_new_names(settings)}
    (tmp_path / RESULTS_FILE).write_text(json.dumps(old) + "\n")
    assert set(new["settings"]).isdisjoint({"k", "temperature", "views", "splits", "layer"})
    assert with_old_names(new["settings"]) == settings
    assert read_results(tmp_path) == [new]
    assert settings_key(old) == settings_key(new) == key  # as of before the new names


def test_a_damaged_record_is_left_out_equal_or_named(tmp_path, capsys):
    written = [report({"protocol": "knn", "top1": 0.5, "n": n}, tmp_path) for n in range(2)]
    path = tmp_path / RESULTS_FILE
    whole, rng = path.read_bytes(), random.Random(0)
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / RESULTS_FILE).write_bytes(damaged)
        records = read_results(folder)
        named = capsys.readouterr().err
        assert named.count("\n") <= 2
        assert records == written or f"{folder / RESULTS_FILE}:" in named, damaged


def test_a_changed_record_is_left_out_until_its_digest_is_removed(tmp_path, capsys):
    report({"protocol": "knn", "metrics": {"backbone": {"top1": 0.5}}}, tmp_path)
    path = tmp_path / RESULTS_FILE
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert read_results(tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}:1: changed since it was written, this result is left out; ")
    assert line.endswith("measure it again, or remove its 'digest' if you changed it by hand")
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_text(json.dumps(record) + "\n")
    assert read_results(tmp_path)[0]["metrics"]["backbone"]["top1"] == 0.9


def test_a_pipe_or_a_device_is_no_file_of_results_and_the_result_is_on_stdout(tmp_path, capsys):
    path = tmp_path / RESULTS_FILE
    path.symlink_to("/dev/null")
    for use in (lambda: report({"n": 1}, tmp_path), lambda: writable_folder(tmp_path)):
        with pytest.raises(UserError, match=rf"{RESULTS_FILE}: is a device, expected a regular"):
            use()
    assert json.loads(capsys.readouterr().out)["n"] == 1
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{RESULTS_FILE}: is a pipe, expected a regular file"):
        read_results(tmp_path)


def test_a_full_disk_loses_no_result_and_costs_one_line(tmp_path, monkeypatch, capsys):
    first = report({"n": 1}, tmp_path)
    before = (tmp_path / RESULTS_FILE).read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); this one"):
        report({"n": 2}, tmp_path)
    assert (tmp_path / RESULTS_FILE).read_bytes() == before
    monkeypatch.undo()
    with open(tmp_path / RESULTS_FILE, "a") as file:
        file.write(capsys.readouterr().out)
    assert [record["n"] for record in read_results(tmp_path)] == [first["n"], 2]
    assert capsys.readouterr().err == ""
