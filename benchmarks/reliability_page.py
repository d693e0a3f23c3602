"""The tables of docs/reliability.md, from benchmarks/results/reliability.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tables(results: Path) -> dict[str, str]:
    """{name of its markers: table}: one for each family of faults."""
    path = results / "reliability.json"
    families = json.loads(path.read_text())["families"]
    return {family: table(rows) for family, rows in families.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The faults of one family."""
    lines = ["| fault | promised | tried | survived | seen |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [name, row["promise"], f"{row['tried']:,}", f"{row['survived']:,}", seen(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    dates = sorted({row["date"] for row in rows.values()})
    minutes = sum(row["seconds"] for row in rows.values()) / 60
    return "\n".join([*lines, "", f"{' and '.join(dates)}, {minutes:,.0f} minutes."])


def seen(row: dict[str, Any]) -> str:
    """What happened in a fault's trials, in words, and its largest figures."""
    counts = sorted(row.get("outcomes", {}).items(), key=lambda item: -item[1])
    figures = row.get("figures", {}).items()
    said = [] if [words for words, _ in counts] == ["survived"] else counts
    return "; ".join(
        [f"{words}: {count:,}" for words, count in said]
        + [f"{name}: {number(value)}" for name, value in figures]
        + [f"FAILED {failure}" for failure in row["failures"][:3]]
    )


def number(value: float) -> str:
    """A figure with three digits at most behind the first."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
