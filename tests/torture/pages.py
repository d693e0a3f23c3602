"""The monitor's page, of folders that are damaged and of runs that change while it is shown.

What the page says is compared with a reading of the same bytes by other code: `whole_lines` here,
and a browser's part, putting updates together, in `Shown`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from support.metric_runs import (
    evaluation_record,
    training_record,
    write_metric_run,
    write_records,
    write_views,
)

from ffcv_ssl.monitor import __main__ as monitor
from ffcv_ssl.monitor import board as boards
from ffcv_ssl.monitor.board import Board
from ffcv_ssl.training.metrics_log import METRICS_FILE
from torture.frame import Trial, choices_of, fault
from torture.processes import cellar
from torture.text_mutants import WORDS, damaged_bytes
from torture.text_readings import whole_lines

FILES = (METRICS_FILE, "config.yaml", "results.jsonl", "views.png", "views.json")
LARGEST = 1e100
"""Numbers beyond it are gaps: no axis can show them."""
NUM_STEPS = 30
ROUNDS, CHANGES = 20, 25
"""Damaged folders of a trial; changes of its runs."""


# ---- Damaged folders -----------------------------------------------------------------------------


@functools.cache
def sound_run() -> Path:
    """The folder of a run with every file that the page shows."""
    folder = write_metric_run(cellar() / "sound", NUM_STEPS)
    write_views(folder)
    result = {
        "schema": 2, "time": "2026-01-02T03:04:05+00:00", "protocol": "knn", "commit": None,
        "checkpoint": "a", "metrics": {"backbone": {"top1": 0.5}}, "settings": {"seed": 0},
    }  # fmt: skip
    (folder / "results.jsonl").write_text(3 * (json.dumps(result) + "\n"))
    return folder


def damage(folder: Path, choose: random.Random) -> None:
    """Change one to three files of a folder; or put something else in their places."""
    for name in choose.sample(FILES, choose.randint(1, 3)):
        path, kind = folder / name, choose.randrange(8)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.unlink()
            path.mkdir()
        elif kind == 2:
            path.unlink()
            path.symlink_to(choose.choice([name, "/dev/zero", "nowhere", "."]))
        elif kind == 3 and path.suffix != ".png":
            lines = path.read_text().split("\n")
            lines[choose.randrange(len(lines))] = choose.choice(WORDS)
            path.write_text("\n".join(lines))
        else:
            path.write_bytes(damaged_bytes(path.read_bytes(), choose))


@fault("damaged folders under the monitor", quick=1, full=100)
def damaged_folders(trial: Trial) -> Counter:
    """The page of a run with damaged files is written, and shows exactly the numbers that the whole
    lines of its metrics hold; what cannot be used is left out and named. Where nothing is left of
    the run, one line says so. No text of a file becomes part of a script."""
    choose, seen = choices_of(trial), Counter()
    for number in range(ROUNDS):
        folder = Path(shutil.copytree(sound_run(), trial.folder / f"run{number}"))
        damage(folder, choose)
        seen[shown_right(folder)] += 1
    return seen


def shown_right(folder: Path) -> str:
    """Write the page of a damaged run and compare it with the run's bytes."""
    page, errors = folder.with_suffix(".html"), io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = monitor.main([str(folder), f"--out={page}"])
    told = errors.getvalue()
    if code == 2:
        assert told.count("\n") == 1 and "no run: no metrics.jsonl" in told, told
        assert not (folder / METRICS_FILE).exists() and not page.exists()
        return "no run: told in one line"
    assert code == 0, told
    text = page.read_text(encoding="utf-8")
    scripts = text.split("<script")[1:]
    assert len(scripts) == 3 and all(part.count("</script>") == 1 for part in scripts)
    data = scripts[0].partition(">")[2].partition("</script>")[0]
    (run,) = json.loads(data, parse_constant=refuse)["update"]["runs"]
    shown = [row for table in run["tables"].values() for row in rows_of(table)]
    assert by_text(shown) == by_text(expected_rows(folder)), "other numbers than the lines hold"
    notes = run["info"]["notes"]
    assert all("\n" not in note and note in told for note in notes), (notes, told)
    return "shown, with what was left out" if notes else "shown"


def refuse(constant: str) -> None:
    """JSON has no NaN and no Infinity."""
    raise AssertionError(f"{constant} in the page's JSON")


def rows_of(table: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of a table of the page, without gaps."""
    columns = {**table["axes"], **table["columns"]}
    rows = zip(*columns.values())
    return [{k: v for k, v in zip(columns, row) if v is not None} for row in rows]


def expected_rows(folder: Path) -> list[dict[str, float]]:
    """The numbers of each whole line of a run's metrics, as a page shows them."""
    path = folder / METRICS_FILE
    content = path.read_bytes() if path.is_file() else b""
    records = [record for _, record in whole_lines(content) if record is not None]
    return [{k: float(v) for k, v in record.items() if can_be_drawn(v)} for record in records]


def can_be_drawn(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not math.isnan(value) and abs(value) <= LARGEST


def by_text(rows: list[dict[str, float]]) -> list[str]:
    """Rows in an order of their own: a page has them in two tables. Whole numbers are integers."""
    return sorted(
        json.dumps({k: int(v) if float(v).is_integer() else v for k, v in sorted(row.items())})
        for row in rows
    )


# ---- Runs that change ----------------------------------------------------------------------------


class Shown:
    """What a page has put together of the updates that it was sent, as the page's store.js does."""

    def __init__(self) -> None:
        self.boot, self.version = "", 0
        self.order: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}

    def take(self, board: Board) -> None:
        """Ask for the news, and put them to what is known."""
        update = json.loads(json.dumps(board.since(self.boot, self.version), allow_nan=False))
        assert update["from"] in (0, self.version)
        if update["from"] == 0:
            self.runs.clear()
        for parts in update["runs"]:
            run = self.runs.setdefault(parts["id"], {"tables": {}})
            run |= {key: value for key, value in parts.items() if key != "tables"}
            for kind, rows in parts["tables"].items():
                run["tables"][kind] = joined(run["tables"].get(kind), rows)
        self.boot, self.version = update["boot"], update["version"]
        self.order = update.get("order", self.order)
        self.runs = {ident: self.runs[ident] for ident in self.order}

    def with_rows(self) -> list[dict[str, Any]]:
        """The runs in their order, without tables that have no row: a page draws nothing of them,
        and is not sent one that is empty from the beginning."""
        return [
            {**run, "tables": {k: t for k, t in run["tables"].items() if t["axes"]["step"]}}
            for run in self.runs.values()
        ]


def joined(known: dict[str, Any] | None, rows: dict[str, Any]) -> dict[str, Any]:
    """A table that was known, with the rows that came."""
    if rows["from"] == 0:
        return rows
    assert known is not None and len(known["axes"]["step"]) == rows["from"], "rows are missing"
    grown: dict[str, Any] = {**known, **{key: rows[key] for key in ("records", "stride")}}
    for part in ("axes", "columns"):
        grown[part] = {
            key: known[part].get(key, [None] * rows["from"]) + values
            for key, values in rows[part].items()
        }
    return grown


def change(folder: Path, choose: random.Random) -> str:
    """Let something happen to one of the runs in a folder; returns what."""
    run = folder / f"run{choose.randrange(3)}"
    path = run / METRICS_FILE
    if not path.exists():
        write_metric_run(run, choose.randrange(1, 30), is_finished=choose.random() < 0.5)
        return "a run begins"
    content, kind = path.read_bytes(), choose.randrange(8)
    if kind == 0:
        shutil.rmtree(run)
        return "a run is deleted"
    if kind == 1:
        path.write_bytes(content[: choose.randrange(len(content) + 1)])
        return "metrics are cut off anywhere"
    if kind == 2:
        lines = content.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: choose.randrange(len(lines) + 1)]))
        return "metrics are cut back to a line"
    if kind == 3:
        write_records(run, [training_record(step, choose.random()) for step in range(1, 9)])
        return "metrics are replaced"
    if kind == 4:
        write_views(run, step=choose.randrange(100))
        return "other views"
    lines = content.splitlines(keepends=True)
    step = 1 + max([r["step"] for _, r in whole_lines(content) if r is not None], default=0)
    more = [training_record(step + k) for k in range(choose.choice([1, 3, 400]))]
    more += [evaluation_record(step + len(more))] * (choose.random() < 0.3)
    text = "".join(json.dumps(record) + "\n" for record in more)
    with open(path, "a") as file:
        file.write(text if kind > 5 else text[: choose.randrange(len(text))])
    return "lines are added" if kind > 5 else "half a line is added"


@fault("runs that change under a live page", quick=1, full=100)
def changing_runs(trial: Trial) -> Counter:
    """A page that is sent only what is new always has what one has that is opened now: while runs
    begin, grow, are cut back, replaced and deleted, and while it looks only now and then; and what
    a monitor that is started now reads, as long as nothing had to be thinned."""
    choose, seen, shown = choices_of(trial), Counter(), Shown()
    boards._SEARCH_INTERVAL_S = boards._SEARCH_PATIENCE = 0  # this process tries nothing else
    folder = trial.folder / "runs"
    folder.mkdir()
    board = Board([folder])
    for _ in range(CHANGES):
        seen[change(folder, choose)] += 1
        if choose.random() < 0.3:
            continue
        board.refresh()
        if choose.random() < 0.2:
            continue
        shown.take(board)
        opened = Shown()
        opened.take(board)
        assert shown.with_rows() == opened.with_rows(), "other runs"
        started, anew = Board([folder]), Shown()
        started.refresh()
        anew.take(started)
        assert of_runs(shown) == of_runs(anew), "a new monitor reads something else"
    return seen


def of_runs(shown: Shown) -> dict[str, Any]:
    """{run: what does not depend on when it was read}; rows only where none is thinned."""
    found = {}
    for run in shown.runs.values():
        tables = run["tables"].values()
        is_thinned = any(table["stride"] > 1 for table in tables)
        rows = by_text([row for table in tables for row in rows_of(table)])
        config = run.get("config")
        found[run["info"]["name"]] = run["info"], config, [] if is_thinned else rows
    return found
