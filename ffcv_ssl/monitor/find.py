"""Which folders are runs, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ffcv_ssl.errors import UserError
from ffcv_ssl.files import StrPath
from ffcv_ssl.monitor.activity import CHECKPOINT, LOCK_FILE
from ffcv_ssl.monitor.extras import CONFIG_FILE
from ffcv_ssl.training.metrics_log import METRICS_FILE

MAX_RUNS, MAX_DEPTH, MAX_FOLDERS = 1000, 5, 20_000


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names belongs to a run."""
    names = set(names)
    return bool(names & {METRICS_FILE, CHECKPOINT}) or {CONFIG_FILE, LOCK_FILE} <= names


def runs_at(path: StrPath) -> list[Path]:
    """The run at a path, or else all runs below it, in the order of their paths; [] for none.

    At most MAX_RUNS runs, MAX_DEPTH levels down; links to folders and hidden folders are left out.
    """
    root, found = Path(path), []
    for number, (folder, folders, files) in enumerate(os.walk(root)):
        depth = len(Path(folder).relative_to(root).parts)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_run([*files, *folders]):
            found.append(Path(folder))
            if depth == 0:
                break
        if len(found) >= MAX_RUNS or number >= MAX_FOLDERS:
            break
        if depth >= MAX_DEPTH:
            folders.clear()
    return found


def find_runs(paths: Sequence[StrPath]) -> list[Path]:
    """The folders of all runs at some paths, each once."""
    found: dict[str, Path] = {}
    for path in paths:
        for folder in runs_at(path):
            found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())[:MAX_RUNS]


def check_paths(paths: Sequence[str], may_come_later: bool) -> None:
    """Raise UserError for a path without a run. may_come_later: a path that is not there yet, or an
    empty folder, is none."""
    for path in paths:
        if not path:
            raise UserError("runs: got an empty path, expected a run's folder, or a folder of runs")
        try:
            entries = os.listdir(path)
        except FileNotFoundError:
            if may_come_later:
                continue
            raise UserError(
                f"{path}: no such folder; give a run's folder, such as runs/first"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: cannot be read ({reason}); give a run's folder, such as runs/first"
            ) from None
        if not runs_at(path) and (entries or not may_come_later):
            raise UserError(
                f"{path}: no run: no {METRICS_FILE} or {CHECKPOINT} there or below; "
                "give a run's folder, such as runs/first"
            )


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: as many of its last parts as tell it from the others."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    lengths = [1] * len(parts)
    while True:
        names = [os.path.join(*part[-length:]) for part, length in zip(parts, lengths)]
        counts: dict[str, int] = {}
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        longer = [
            length + (counts[name] > 1 and length < len(part))
            for name, length, part in zip(names, lengths, parts)
        ]
        if longer == lengths:
            return names
        lengths = longer
