"""The tables of docs/reliability.md, from benchmarks/results/reliability.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

from torture.frame import FAMILIES, faults_of  # noqa: E402  after its path


def tables(results: Path) -> dict[str, str]:
    """{name of its markers: table}: one for each family of faults."""
    families = json.loads((results / "reliability.json").read_text())["families"]
    return {family: table(families.get(family, {}), names(family)) for family in FAMILIES}


def names(family: str) -> list[str]:
    """The faults of a family, in the order of its module."""
    return [fault.name for fault in faults_of(family)]


def too_few(results: Path) -> list[str]:
    """What faults have no row, or one with fewer trials than a whole run has: a line each."""
    families = json.loads((results / "reliability.json").read_text())["families"]
    lines = []
    for family in FAMILIES:
        for fault in faults_of(family):
            run = families.get(family, {}).get(fault.name, {"run": 0})["run"]
            if run < fault.full:
                lines.append(f"{family}: {fault.name}: {run} of {fault.full} trials")
    return lines


def table(rows: dict[str, dict[str, Any]], faults: list[str]) -> str:
    """The faults of one family; those without a row are named below it."""
    lines = ["| fault | promised | tried | survived | seen |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [name, row["promise"], tried(row), f"{row['survived']:,}", seen(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    missing = [name for name in faults if name not in rows]
    about = [f"Not measured yet: {'; '.join(missing)}."] if missing else []
    return "\n".join([*(lines if rows else []), "", *about, *origins(rows)]).strip("\n")


def tried(row: dict[str, Any]) -> str:
    """How often a fault was tried, and whether that is less than a whole run does."""
    is_cut = row["run"] < row["asked"]
    return f"{row['tried']:,}" + (f" ({row['run']:,} of {row['asked']:,} asked for)" * is_cut)


def origins(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each day, machine and commit that rows come from, with their minutes of work."""
    minutes: dict[str, float] = {}
    for row in rows.values():
        machine = row["machine"]
        versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "numba"))
        where = f"{machine['cpu']}, {machine['cores']} cores, {versions}, commit {row['commit']}"
        line = f"{row['date']}, {where}"
        minutes[line] = minutes.get(line, 0) + row["seconds"] / 60
    return [f"{line}: {spent:,.0f} minutes." for line, spent in minutes.items()]


def seen(row: dict[str, Any]) -> str:
    """What happened in a fault's trials, in words, and its largest figures."""
    counts = sorted(row["outcomes"].items(), key=lambda item: -item[1])
    said = [] if [words for words, _ in counts] == ["survived"] else counts
    return "; ".join(
        [f"{words}: {count:,}" for words, count in said]
        + [f"{name}: {number(value)}" for name, value in row["figures"].items()]
        + [f"FAILED {failure}" for failure in row["failures"][:3]]
    )


def number(value: float) -> str:
    """A figure with three digits at most behind the first."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
