"""All runs of a page, and what has changed since a version."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from ffcv_ssl.files import StrPath
from ffcv_ssl.monitor.find import MAX_RUNS, find_runs, names_of
from ffcv_ssl.monitor.panels import arrange
from ffcv_ssl.monitor.run import MAX_VIEWS_BYTES, Run

_ROWS_OF_ALL, _MOST_ROWS, _FEWEST_ROWS = 12_000, 3000, 40
_SEARCH_INTERVAL_S = 5.0
_SEARCH_PATIENCE = 20
"""A search takes at most this share of the time: one second in 20."""


class Board:
    """The runs at some paths; a folder that is no run stands for all runs below it. Threads may
    share it."""

    def __init__(self, paths: Sequence[StrPath]) -> None:
        self.paths = list(paths)
        self.boot = secrets.token_hex(8)  # versions of another process mean nothing here
        self.version = 0
        self.runs: list[Run] = []
        self._lock = threading.Lock()
        self._next_search = 0.0
        self._num_made = 0
        self._max_rows = _MOST_ROWS

    def refresh(self) -> None:
        """Read all that is new on disk."""
        with self._lock:
            version = self.version + 1
            has_news = self._search()
            for run in self.runs:
                has_news |= run.refresh(version)
            if has_news:
                self.version = version

    def _search(self) -> bool:
        """Look for runs that came or went; returns whether there are any."""
        begun = time.monotonic()
        if begun < self._next_search:
            return False
        folders = find_runs(self.paths)
        seconds = time.monotonic() - begun  # folders of a million images take long to list
        self._next_search = begun + max(_SEARCH_INTERVAL_S, _SEARCH_PATIENCE * seconds)
        known = {run.folder: run for run in self.runs}
        if folders == list(known):
            return False
        if not known:  # the page must stay small, however many runs it has
            share = _ROWS_OF_ALL // max(1, len(folders))
            self._max_rows = min(_MOST_ROWS, max(_FEWEST_ROWS, share))
        self.runs = []
        for folder, name in zip(folders, names_of(folders)):
            if folder not in known:
                known[folder] = Run(f"r{self._num_made}", name, folder, self._max_rows)
                self._num_made += 1
            known[folder].name = name
            self.runs.append(known[folder])
        return True

    def since(self, boot: str, version: int) -> dict[str, Any]:
        """What a page that has a version needs to be up to date: {boot, version, from, order,
        limit, panels, runs}. A page of another process (`boot`) needs everything."""
        with self._lock:
            start = version if boot == self.boot and version <= self.version else 0
            answer: dict[str, Any] = {
                "boot": self.boot,
                "from": start,
                "version": self.version,
                "runs": [],
            }
            if start == self.version and start:
                return answer
            keys = {key for run in self.runs for key in run.columns()}
            answer["order"] = [run.ident for run in self.runs]
            answer["is_cut"] = len(self.runs) >= MAX_RUNS
            answer["panels"] = arrange(sorted(keys))
            picture_bytes = MAX_VIEWS_BYTES
            for run in self.runs:
                parts = run.since(start, picture_bytes)
                if parts:
                    answer["runs"].append({"id": run.ident, **parts})
                picture_bytes -= len((parts.get("views") or {}).get("picture") or "")
            return answer

    def summary(self) -> list[dict[str, Any]]:
        """The runs in short, for the last line of the command."""
        with self._lock:
            return [run.in_short() for run in self.runs]
