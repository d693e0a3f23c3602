"""`table`: the results of some folders as one `results.csv`, a row per result.

    python evaluate.py table --checkpoint runs/a runs/b --out tables

The rows are the lines of the folders' `results.jsonl`, in their order; a column is one key of a
record, its parts joined by dots. Lists are JSON text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import refuse_ranks
from ffcv_ssl.evaluation.results import checkpoint_folder, read_results, writable_folder
from ffcv_ssl.files import write_text
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World

TABLE = "results.csv"
MAX_CELL_CHARACTERS = 500
"""Longer values (accuracies of a thousand classes) are left to results.jsonl."""


@dataclass(frozen=True)
class TableConfig:
    """Whose results."""

    checkpoint: list[str] = field(default_factory=list)
    """Folders with results.jsonl, or checkpoints in them."""
    out: str | None = None
    """Folder of results.csv; null: the first checkpoint's."""


def run(config: TableConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Write the table anew; returns its path and size. Raises UserError."""
    refuse_ranks("table", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN RUN ...")
    folders = dict.fromkeys(checkpoint_folder(path) for path in config.checkpoint)
    records = []
    for folder in folders:
        found = read_results(folder)
        if not found:
            raise UserError(f"{folder}: no results.jsonl with results; evaluate something there")
        records += found
    path = writable_folder(config.out or next(iter(folders))) / TABLE
    rows = [flatten_as_text(record) for record in records]
    try:
        write_text(path, as_csv(rows))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); use --out") from None
    world.say(f"{path}: {len(rows)} results")
    return {"protocol": "table", "table": str(path), "num_results": len(rows)}


def as_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Flat dicts as CSV; the columns are all their keys, in the order of their first appearance."""
    kept = [
        {key: value for key, value in row.items() if len(str(value)) <= MAX_CELL_CHARACTERS}
        for row in rows
    ]
    columns = dict.fromkeys(key for row in kept for key in row)
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(kept)
    return text.getvalue()


COMMAND = Command(TableConfig, run, "results as one CSV file, a row per result")
