"""Thinned columns keep every extreme and the last row, and readers get each row once."""

import math

import numpy as np
import pytest

from ffcv_ssl.monitor.table import MAX_COLUMNS, Table


def make(values, max_rows, key="loss"):
    """A table of records with steps 1, 2..., and the values of one key."""
    table = Table(("step", "epoch"), max_rows)
    for step, value in enumerate(values, 1):
        table.add({"step": step, "epoch": step / 10, key: value}, 1)
    table.flush(1)
    return table


def column(table, key="loss"):
    rows = table.since(0)
    values = {**rows["axes"], **rows["columns"]}[key]
    return np.array([math.nan if value is None else value for value in values], float)


def test_a_short_table_is_exact():
    values = [3.5, 2, None, float("nan"), 1e-30, -7]
    table = make(values, 100)
    rows = table.since(0)
    assert rows["columns"]["loss"] == [3.5, 2, None, None, 1e-30, -7]
    assert rows["axes"]["step"] == [1, 2, 3, 4, 5, 6] and rows["axes"]["epoch"][0] == 0.1
    assert (rows["stride"], rows["records"], rows["from"]) == (1, 6, 0)


@pytest.mark.parametrize("num_records", [101, 1000, 4096, 20_000])
def test_a_long_table_is_bounded_and_keeps_extremes_and_the_last_row(num_records):
    values = np.random.default_rng(num_records).normal(size=num_records)
    values[num_records // 3] = 50
    values[num_records // 2] = -60
    table = make(values.tolist(), 100)
    shown, steps = column(table), column(table, "step")
    assert len(shown) <= 100
    assert (shown.max(), shown.min()) == (50, -60)
    assert (steps[0], steps[-1], shown[-1]) == (1, num_records, values[-1])
    assert (np.diff(steps) >= 0).all()
    assert np.isin(shown, values).all()  # nothing is invented


def test_each_group_of_records_keeps_its_lowest_and_highest_value_in_their_order():
    values = np.random.default_rng(0).normal(size=777)
    table = make(values.tolist(), 64)
    shown, steps, stride = column(table), column(table, "step"), table.stride
    groups, of_rows = np.arange(777) // stride, (steps - 1) // stride
    for group in range(776 // stride):  # the last one is not finished
        own, rows = values[groups == group], shown[of_rows == group]
        assert {own.min(), own.max()} <= set(rows)
        if len(rows) == 2:
            assert (rows[0] < rows[1]) == (own.argmin() < own.argmax())


def test_columns_are_thinned_each_by_its_own_extremes():
    table = Table(("step",), 40)
    for step in range(1000):
        table.add({"step": step, "a": float(step == 371), "b": -float(step == 372)}, 1)
    table.flush(1)
    assert column(table, "a").max() == 1 and column(table, "b").min() == -1


def test_gaps_stay_gaps_where_a_whole_group_has_no_value():
    values = [1.0] * 400 + [None] * 400 + [2.0] * 400
    table = make(values, 60)
    shown, steps = column(table), column(table, "step")
    middle = (steps > 400 + table.stride) & (steps < 800 - table.stride)
    assert middle.any() and np.isnan(shown[middle]).all()
    assert (shown[steps < 350] == 1).all() and (shown[steps > 850] == 2).all()


def test_a_key_that_comes_later_has_gaps_before():
    table = make([1, 2, 3], 100)
    table.add({"step": 4, "new": 5}, 2)
    table.flush(2)
    rows = table.since(0)["columns"]
    assert rows == {"loss": [1, 2, 3, None], "new": [None, None, None, 5]}
    news = table.since(1)
    assert news["from"] == 3 and news["columns"] == {"loss": [None], "new": [5]}


def test_what_is_no_number_is_a_gap_or_no_column():
    record = {"step": 1, "text": "1", "yes": True, "list": [1], "none": None, "x" * 300: 1}
    table = Table(("step",), 10)
    table.add({**record, "big": 10**400, "far": 1e308, "endless": math.inf}, 1)
    table.flush(1)
    assert table.since(0)["columns"] == {
        "none": [None],
        "big": [None],
        "far": [None],
        "endless": [None],
    }
    assert table.has_left_out


def test_columns_are_bounded():
    table = Table(("step",), 10)
    table.add({"step": 1, **{f"key{number}": number for number in range(2 * MAX_COLUMNS)}}, 1)
    table.flush(1)
    assert len(table.columns) == MAX_COLUMNS and table.has_left_out


def test_a_reader_of_any_version_gets_the_rows_it_lacks():
    table, known = Table(("step",), 64), {}
    rng = np.random.default_rng(1)
    for version in range(1, 200):
        for _ in range(rng.integers(0, 4)):
            table.add({"step": table.num_records, "loss": float(rng.normal())}, version)
            table.flush(version)
        for reader, every in (("often", 1), ("seldom", 7)):
            if version % every == 0:
                steps, since = known.get(reader, ([], 0))
                news = table.since(since)
                if news is not None:
                    assert news["from"] in (0, len(steps))
                    steps = steps[: news["from"]] + news["axes"]["step"]
                assert steps == table.since(0)["axes"]["step"]
                known[reader] = steps, version
    assert table.stride > 1 and table.since(199) is None


def test_a_cleared_table_is_sent_anew():
    table = make([1, 2], 100)
    table.clear(5)
    assert table.since(1)["from"] == 0 and table.since(1)["axes"]["step"] == []
    assert table.since(5) is None
