"""The table of results: all records of some folders as CSV, written when it is asked for."""

import csv
import json

import pytest

import evaluate
from ffcv_ssl.evaluation.results import RESULTS_FILE, report


@pytest.fixture
def table(capsys):
    """table(words...): the rows that the command writes."""

    def run(*words):
        assert evaluate.main(["table", *map(str, words)]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        with open(summary["table"], encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == summary["num_results"]
        return rows

    return run


def test_a_record_is_a_row_and_columns_are_those_of_all_records(tmp_path, table):
    report({"a": 'quote " and, comma', "b": "two\nlines", "x": None}, tmp_path)
    report({"metrics": {"backbone": {"top1": 0.5}}, "ks": [1, 20]}, tmp_path)
    rows = table("--checkpoint", tmp_path)
    assert (tmp_path / "results.csv").is_file()
    assert list(rows[0]) == ["time", "a", "b", "x", "metrics.backbone.top1", "ks"]
    assert [row["a"] for row in rows] == ['quote " and, comma', ""]
    assert rows[0]["b"] == "two\nlines" and rows[0]["x"] == ""
    assert rows[1]["metrics.backbone.top1"] == "0.5" and rows[1]["ks"] == "[1, 20]"
    report({"c": 3}, tmp_path)
    assert [row["c"] for row in table("--checkpoint", tmp_path)] == ["", "", "3"]


def test_results_of_several_folders_are_one_table_and_long_lists_are_left_out(tmp_path, table):
    for name in ("a", "b"):
        report({"name": name, "long": [0.123456] * 100}, tmp_path / name)
    rows = table("--checkpoint", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert [(list(row), row["name"]) for row in rows] == [
        (["time", "name"], "a"), (["time", "name"], "b")
    ]  # fmt: skip
    assert (tmp_path / "out/results.csv").is_file() and not (tmp_path / "a/results.csv").exists()


def test_old_and_new_names_of_a_setting_share_a_column(tmp_path, table):
    lines = [{"settings": {"layer": 1}}, {"settings": {"depth": "projector_1"}}]
    (tmp_path / RESULTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["settings.depth"] for row in table("--checkpoint", tmp_path)] == ["projector_1"] * 2


@pytest.mark.parametrize("words", [[], ["--checkpoint", "nowhere"]])
def test_a_mistake_is_one_line(words, capsys):
    assert evaluate.main(["table", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint: got none" in line or "no results.jsonl with results" in line
