"""One run as the page shows it, kept up to date with its folder.

A run has parts that change one by one: `info` (state and headline numbers), `finals`, `config`,
`evaluations`, `views`, and the tables of its records. Each remembers the version of the board at
which it changed, so that a browser gets only what it does not have.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.monitor import activity, extras
from ffcv_ssl.monitor.summary import Summary
from ffcv_ssl.monitor.table import Table, as_number
from ffcv_ssl.monitor.tail import Tail
from ffcv_ssl.training.metrics_log import METRICS_FILE, X_AXES

TRAINING, EVALUATION = "training", "evaluation"
_OF_EVALUATION = ("val/", "health/")
MAX_VIEWS_BYTES = 3 << 20
"""Of all pictures together in one update."""


class Run:
    """The run in `folder`. name: for the page; max_rows: of each of its tables."""

    def __init__(self, ident: str, name: str, folder: Path, max_rows: int) -> None:
        self.ident, self.name, self.folder = ident, name, folder
        self.tail = Tail(folder / METRICS_FILE)
        self.tables = {kind: Table(X_AXES, max_rows) for kind in (TRAINING, EVALUATION)}
        self.summary = Summary()
        self.extras = {
            "config": extras.Watched(folder, (extras.CONFIG_FILE,), extras.read_config),
            "evaluations": extras.Watched(
                folder, (extras.RESULTS_FILE,), extras.read_evaluations
            ),
            "views": extras.Watched(
                folder, (extras.VIEWS_PICTURE, extras.VIEWS_FILE), extras.read_views
            ),
        }  # fmt: skip
        self.problem: str | None = None
        self._parts: dict[str, tuple[int, Any]] = {}  # name: (version of its last change, value)
        self._last_two: list[dict[str, Any]] = [{}, {}]

    def refresh(self, version: int) -> bool:
        """Read what is new in the folder, as news of that version; returns whether there is any."""
        has_news = self._read_records(version)
        for name, part in self.extras.items():
            if part.refresh():
                self._parts[name] = version, part.value
                has_news = True
        for name, value in (("info", self._info()), ("finals", self.summary.finals())):
            if self._parts.get(name, (0, None))[1] != value:
                self._parts[name] = version, value
                has_news = True
        return has_news

    def _read_records(self, version: int) -> bool:
        before = self.summary.num_records
        is_anew = not self.tail.holds()
        if is_anew:
            self._forget(version)
        self.problem = None
        try:
            for record in self.tail.records():
                kind = _kind_of(record)
                self.tables[kind].add(record, version)
                self.summary.add(record, kind == EVALUATION)
                self._last_two = [self._last_two[1], record]
        except (UserError, OSError) as error:
            self.problem = one_line(error)
        for table in self.tables.values():
            table.flush(version)
        return is_anew or self.summary.num_records != before

    def _forget(self, version: int) -> None:
        """Begin again: the metrics were cut back, replaced or deleted."""
        self.tail.forget()
        self.summary, self._last_two = Summary(), [{}, {}]
        for table in self.tables.values():
            table.clear(version)

    def _info(self) -> dict[str, Any]:
        config = self.extras["config"].value or {}
        epochs = _as_epochs(config.get("epochs"))
        earlier, later = (as_number(record.get("seconds")) for record in self._last_two)
        epoch = self.summary.number("epoch")
        state = activity.state_of(self.folder, epoch, epochs, later - earlier)
        return {
            "name": self.name, "path": os.fspath(self.folder), "state": state,
            "method": config.get("method", ""), "records": self.summary.num_records,
            "changed": self._changed(), "notes": self.notes(),
            **self.summary.headline(epochs, state == activity.RUNNING),
        }  # fmt: skip

    def _changed(self) -> int | None:
        """When the metrics changed last, in seconds since 1970."""
        try:
            return int(self.tail.path.stat().st_mtime)
        except OSError:
            return None

    def notes(self) -> list[str]:
        """What people should know about what is shown, a line each."""
        problems = [self.problem, *(part.problem for part in self.extras.values())]
        notes = [problem for problem in problems if problem]
        if self.tail.num_damaged:
            notes.append(f"lines of {METRICS_FILE} that are no records: {self.tail.num_damaged}")
        if any(table.has_left_out for table in self.tables.values()):
            notes.append("it has more columns than can be shown, or very long names of columns")
        return notes

    def since(self, version: int, max_views_bytes: int) -> dict[str, Any]:
        """The parts that changed after a version, by name; `tables` those with new rows."""
        parts = {name: value for name, (at, value) in self._parts.items() if at > version}
        views = parts.get("views")
        if views and len(views["picture"]) > max_views_bytes:
            parts["views"] = {**views, "picture": None}
        found = {kind: table.since(version) for kind, table in self.tables.items()}
        tables = {kind: rows for kind, rows in found.items() if rows is not None}
        return {**parts, "tables": tables} if parts or tables else {}

    def in_short(self) -> dict[str, Any]:
        """The run for the last line of the command."""
        info = self._parts["info"][1]
        names = ("name", "path", "state", "records", "epoch", "step")
        accuracy = {f"{which}_top1": info["accuracy"].get(which) for which in ("best", "last")}
        return {**{name: info[name] for name in names}, **accuracy, "knn": info["knn"]["last"]}

    def columns(self) -> set[str]:
        """The columns of its tables that are no axes."""
        return {key for table in self.tables.values() for key in table.columns} - set(X_AXES)


def _kind_of(record: dict[str, Any]) -> str:
    """Which table a record belongs to. Most records have a loss, so that is looked at first."""
    is_training = "train/loss" in record
    if not is_training and any(key.startswith(_OF_EVALUATION) for key in record):
        return EVALUATION
    return TRAINING


def _as_epochs(value: Any) -> float | None:
    try:
        epochs = float(value)
    except (TypeError, ValueError):
        return None
    return epochs if 0 < epochs < 1e9 else None
