"""Results: both files hold every record, whatever the columns and however many write at once."""

import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from ffcv_ssl.config.plain import flatten
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.results import read_results, report, settings_key


def table(folder):
    path = folder / "results.csv"
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


def test_a_record_is_a_line_of_json_and_a_row_of_the_table(tmp_path):
    record = {"protocol": "knn", "metrics": {"backbone": {"top1": 0.5}}, "k": [1, 20], "x": None}
    written = report(record, tmp_path)
    assert read_results(tmp_path) == [written] and written.pop("time")[:2] == "20"
    assert written == record
    (row,) = table(tmp_path)
    assert row["metrics.backbone.top1"] == "0.5" and row["k"] == "[1, 20]" and row["x"] == ""


def test_new_columns_go_to_the_end_and_leave_earlier_rows_as_they_were(tmp_path):
    report({"a": 'quote " and, comma', "b": "two\nlines"}, tmp_path)
    report({"a": 1}, tmp_path)
    report({"c": 3, "a": 2}, tmp_path)
    rows = table(tmp_path)
    assert list(rows[0]) == ["time", "a", "b", "c"]
    assert [row["a"] for row in rows] == ['quote " and, comma', "1", "2"]
    assert [row["b"] for row in rows] == ["two\nlines", "", ""]
    assert [row["c"] for row in rows] == ["", "", "3"]


def test_long_lists_are_in_the_record_alone_and_what_is_not_finite_is_null(tmp_path):
    report(
        {"short": [1], "long": [0.123456] * 100, "loss": math.nan, "d": {"e": math.inf}}, tmp_path
    )
    (record,) = read_results(tmp_path)
    assert record["long"] == [0.123456] * 100 and record["loss"] is record["d"]["e"] is None
    assert list(table(tmp_path)[0]) == ["time", "short", "loss", "d.e"]


def test_writers_that_report_at_once_lose_nothing(tmp_path):
    def write(me):  # a lock holds between open files, be they of one process or of several
        for index in range(10):
            report({"writer": me, f"column {me}": index}, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    for rows in (table(tmp_path), read_results(tmp_path)):
        seen = [(int(row["writer"]), int(row[f"column {row['writer']}"])) for row in rows]
        assert sorted(seen) == [(w, i) for w in range(4) for i in range(10)]


def test_a_killed_writers_half_line_is_left_out(tmp_path):
    written = report({"a": 1}, tmp_path)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps({"a": 2})[:4])
    assert read_results(tmp_path) == [written] and read_results(tmp_path / "none") == []


@pytest.mark.parametrize("half", ['{"a": 2, "b', '{"a": 2, "b": 1}'])
def test_the_record_after_a_killed_writers_half_line_is_kept(tmp_path, half):
    first = report({"a": 1}, tmp_path)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(half)
    rest = [report({"a": value}, tmp_path) for value in (3, 4)]
    records = read_results(tmp_path)
    assert [records[0], *records[-2:]] == [first, *rest] and len(records) == 3 + half.endswith("}")
    assert not (tmp_path / "results.jsonl").read_text().count("\n\n")


@pytest.mark.parametrize("half", ["t,2,3", 't,2,"3 and', "t,2,", ""])
def test_the_row_after_one_without_its_newline_is_a_row_of_its_own(tmp_path, half):
    report({"a": 1, "b": "x"}, tmp_path)
    path = tmp_path / "results.csv"
    path.write_text(path.read_text() + half if half else path.read_text().rstrip("\n"))
    for value in (8, 9):
        report({"a": value, "b": "y"}, tmp_path)
    rows = [(row["a"], row["b"]) for row in table(tmp_path)]
    assert rows[0] == ("1", "x") and rows[-2:] == [("8", "y"), ("9", "y")]
    assert len(rows) == 3 + bool(half)


@pytest.mark.parametrize(
    "content",
    [b"time,a,b\nt,1,2,3\n", b"time,a,b\nt,1,\xe9\n", b"\xef\xbb\xbftime,a,b\r\nt,1\r\n"],
)
@pytest.mark.parametrize("column", ["a", "c"])
def test_a_table_that_a_spreadsheet_changed_takes_more_rows(tmp_path, content, column):
    (tmp_path / "results.csv").write_bytes(content)
    report({column: 5}, tmp_path)
    first, second = table(tmp_path)
    assert first["a"] == "1" and second[column] == "5"
    assert [key for key in second if key] == ["time", "a", "b", "c"][: 3 + (column == "c")]


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file"):
        report({"a": 1}, tmp_path / "file")


def test_settings_differ_in_their_key_and_results_do_not():
    record = {"checkpoint": "a", "about": {"step": 1}, "data": {}, "settings": {"k": [1]}}
    assert settings_key(record) == settings_key({**record, "metrics": 1})
    assert settings_key(record) != settings_key({**record, "settings": {"k": [2]}})
    assert settings_key(record) == settings_key({**record, "settings": {"k": [1], "out": "x"}})
    assert flatten({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": "[]"}
