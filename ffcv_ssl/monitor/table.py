"""The numbers of one kind of record, in columns, thinned to a bounded number of rows.

Thinning is honest: consecutive records form groups of equal number, and of each group every column
keeps its lowest and its highest value, in the order in which they came, at the places of the
group's first and last record. So no peak is lost, and no value is invented.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np

LARGEST = 1e100
"""Axes overflow before float64 does."""
MAX_COLUMNS, MAX_KEY_CHARACTERS = 500, 200
_MAX_WAITING = 1024


def as_numbers(values: list[Any]) -> np.ndarray:
    """`as_number` of each, as float64."""
    if {type(value) for value in values} <= {int, float, NoneType}:
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:  # an integer of 400 digits
            pass
        else:
            return np.where(np.abs(numbers) <= LARGEST, numbers, np.nan)
    return np.array([as_number(value) for value in values])


def as_number(value: Any) -> float:
    """A value of a record as float64; NaN for what is no number that can be drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan


class Table:
    """Rows of numbers; NaN is a gap.

    axes: names of the columns that place a row (epoch, step...): they increase and are not thinned
    by their values. max_rows: rows before the table is thinned; at most half of them are left. A
    reader who knows the rows up to a version gets the rows since (`since`).
    """

    def __init__(self, axes: Sequence[str], max_rows: int) -> None:
        self.axes, self.max_rows = tuple(axes), max(max_rows, 8)
        self.has_left_out = False
        self.clear(0)

    def clear(self, version: int) -> None:
        """Remove all rows; whoever read before this version must read all anew."""
        self.columns: dict[str, np.ndarray] = {axis: np.empty(0) for axis in self.axes}
        self._numbers = np.empty(0, np.int64)  # of the record that a row comes from
        self.num_records, self.stride = 0, 1
        self._waiting: list[Mapping[str, Any]] = []
        self._begun = version
        self._grown: list[tuple[int, int]] = []  # (version, rows before it)

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, record: Mapping[str, Any], version: int) -> None:
        """Append a record's numbers, as news of that version. They count after `flush`."""
        self._waiting.append(record)  # many together cost a fifth of one by one
        if len(self._waiting) >= _MAX_WAITING:
            self.flush(version)

    def flush(self, version: int) -> None:
        """Take the added records in."""
        records, self._waiting = self._waiting, []
        if not records:
            return
        if not self._grown or self._grown[-1][0] < version:
            self._grown.append((version, len(self)))
        for record in records:
            for key in record.keys() - self.columns.keys():
                self._add_column(key, record[key])
        for key, column in self.columns.items():
            more = as_numbers([record.get(key) for record in records])
            self.columns[key] = np.append(column, more)
        more = np.arange(self.num_records, self.num_records + len(records))
        self._numbers = np.append(self._numbers, more)
        self.num_records += len(records)
        if len(self) > self.max_rows:
            self._thin(version)

    def _add_column(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            return
        if len(self.columns) >= MAX_COLUMNS or len(key) > MAX_KEY_CHARACTERS:
            self.has_left_out = True
            return
        self.columns[key] = np.full(len(self), np.nan)

    def _thin(self, version: int) -> None:
        """Merge groups of `stride` records, a larger stride if need be. The last row stays as it
        is."""
        while 2 * (self.num_records // self.stride + 1) > self.max_rows // 2:
            self.stride *= 2
        numbers = self._numbers
        starts = np.flatnonzero(np.diff(numbers[:-1] // self.stride, prepend=-1))
        ends = np.append(starts[1:], len(numbers) - 1) - 1
        is_row = np.stack([starts >= 0, ends > starts], axis=1).ravel()  # some groups have one row
        places = np.append(np.stack([starts, ends], axis=1).ravel()[is_row], len(numbers) - 1)
        for key, values in self.columns.items():
            kept = values[places]
            if key not in self.axes:
                kept[:-1] = _extremes(values[:-1], starts)[is_row]
            self.columns[key] = kept
        self._numbers = numbers[places]
        self._begun, self._grown = version, []

    def since(self, version: int) -> dict[str, Any] | None:
        """{from, records, stride, axes: {name: values}, columns: {key: values}} of the rows since a
        version, NaN as None; None where nothing is new. `from` is the number of rows before these;
        0: all rows, instead of those known before."""
        if version < self._begun or version == 0:
            start = 0
        else:
            later = bisect_right(self._grown, version, key=lambda entry: entry[0])
            if later == len(self._grown):
                return None
            start = self._grown[later][1]
        rows = {key: _plain(column[start:]) for key, column in self.columns.items()}
        return {
            "from": start, "records": self.num_records, "stride": self.stride,
            "axes": {key: rows[key] for key in self.axes},
            "columns": {key: values for key, values in rows.items() if key not in self.axes},
        }  # fmt: skip


def _extremes(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The lowest and highest value of each group, in the order in which they came; NaN where a
    group has no value. starts: where groups begin. Returns two values a group."""
    sizes = np.diff(np.append(starts, len(values)))
    lows, highs = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    places = np.arange(len(values))
    is_low, is_high = values == np.repeat(lows, sizes), values == np.repeat(highs, sizes)
    first_low = np.minimum.reduceat(np.where(is_low, places, len(values)), starts)
    first_high = np.minimum.reduceat(np.where(is_high, places, len(values)), starts)
    falls = first_high < first_low
    pairs = np.stack([np.where(falls, highs, lows), np.where(falls, lows, highs)], axis=1)
    return pairs.ravel()


def _plain(column: np.ndarray) -> list[float | int | None]:
    """Numbers as JSON has them: whole ones without a point, NaN as None."""
    return [
        None if value != value else int(value) if value.is_integer() else value
        for value in column.tolist()
    ]
