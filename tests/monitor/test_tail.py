"""Metrics are read on from where the last reading ended, whatever happens to the file meanwhile."""

import json
import os

import pytest
from support.metric_runs import records_of, write_records

from ffcv_ssl.errors import UserError
from ffcv_ssl.monitor import tail
from ffcv_ssl.monitor.tail import Tail


def line(step, **others):
    return json.dumps({"step": step, **others}) + "\n"


def steps(reader):
    return [record["step"] for record in reader.records()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def append(path, text):
    with open(path, "ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def test_a_whole_file_gives_what_plain_json_gives(tmp_path):
    folder = write_records(tmp_path, records_of(30))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert list(Tail(folder / "metrics.jsonl").records()) == list(map(json.loads, lines))


def test_small_chunks_give_the_same_records(tmp_path, monkeypatch):
    path = write_records(tmp_path, records_of(30)) / "metrics.jsonl"
    whole = list(Tail(path).records())
    monkeypatch.setattr(tail, "_CHUNK_BYTES", 7)
    assert list(Tail(path).records()) == whole


def test_each_record_comes_once_and_half_a_line_waits(path):
    reader = Tail(path)
    assert steps(reader) == []  # no file yet
    append(path, line(1) + line(2)[:5])
    assert steps(reader) == [1]
    assert steps(reader) == []
    append(path, line(2)[5:] + line(3))
    assert reader.holds() and steps(reader) == [2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, len(line(1))),
        lambda path: (os.truncate(path, len(line(1))), append(path, line(4) + line(5))),
        lambda path: path.write_text(line(1) + line(7)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), append(path, line(1) + line(9) + line(3))),
    ],
)
def test_metrics_that_were_cut_back_replaced_or_deleted_are_noticed(path, change):
    append(path, line(1) + line(2))
    reader = Tail(path)
    assert steps(reader) == [1, 2] and reader.holds()
    change(path)
    assert not reader.holds()
    reader.forget()
    expected = path.read_text().splitlines() if path.exists() else []
    assert steps(reader) == [json.loads(text)["step"] for text in expected]


def test_lines_that_are_no_records_are_counted_and_left_out(path):
    append(path, line(1) + "\n{\n[1]\n" + '{"step": "a"}\n{"step": -1}\n')
    append(path, b"\xff\xfe\n" + b'{"step": 2, "a": ' + b"[" * 5000 + b"\n" + line(3).encode())
    reader = Tail(path)
    assert steps(reader) == [1, 3]
    assert reader.num_damaged == 7


def test_a_line_without_end_is_not_kept_in_memory(path, monkeypatch):
    monkeypatch.setattr(tail, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(tail, "_MAX_LINE_BYTES", 3000)
    append(path, line(1) + "x" * 10_000)
    reader = Tail(path)
    assert steps(reader) == [1]
    append(path, "x" * 10 + "\n" + line(2))
    assert reader.holds() and steps(reader) == [2]
    assert reader.num_damaged == 1


def test_a_pipe_a_folder_and_a_file_that_may_not_be_read_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(UserError, match=f"is {kind}, expected a regular file"):
            steps(Tail(tmp_path / name))
    append(tmp_path / "file", line(1))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Tail, "_open", refuse)
    with pytest.raises(UserError, match=r"file: cannot be read \(Permission denied\)"):
        steps(Tail(tmp_path / "file"))
