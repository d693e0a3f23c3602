"""The file of results: a row for every fault, of its newest whole run.

Each row says on what machine, with which versions and from which commit it was measured, how many
trials were asked for ("asked") and how many of them were made ("run").
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.record import cpu_name, write_record
from torture.family import ROOT, Family
from torture.frame import FAMILIES


def about() -> dict[str, Any]:
    """What each row says of its machine, its programs and its day."""
    versions = {name: metadata.version(name) for name in ("torch", "numba")}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"machine": {**machine, **versions}, "date": time.strftime("%Y-%m-%d"), **commit()}


def commit() -> dict[str, str | None]:
    """{"commit": the beginning of its hash, "-dirty" behind it where files have changed since, but
    for results}; None where git does not know."""
    try:
        found = _git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
        changes = _git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results", ":!docs")
    except OSError:  # no git
        return {"commit": None}
    return {"commit": f"{found}{'-dirty' * (changes.returncode != 0)}" if found else None}


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def keep(path: Path, family: Family, measured: dict[str, Any]) -> None:
    """Replace a family's rows in a file of results. Other rows stay, unless their fault is no more;
    families and rows are in the order of the table.

    measured: what `about` gave when the run began; later the file itself is a change to commit.
    """
    families = json.loads(path.read_text())["families"] if path.exists() else {}
    rows = families.get(family.name, {})
    for name, row in family.rows.items():
        rows[name] = {**row, "seconds": round(row["seconds"], 1), **measured}
    faults = family.faults or list(rows)  # without an import nobody knows what faults there are
    families[family.name] = in_order(rows, [*faults, *family.rows])
    whole = path.with_name(f"{path.name}.new")
    write_record({"families": in_order(families, [*FAMILIES, *families])}, str(whole))
    os.replace(whole, path)


def in_order(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What is found under these names, in their order."""
    return {name: found[name] for name in dict.fromkeys(names) if name in found}
