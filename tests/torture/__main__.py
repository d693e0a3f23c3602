"""Runs the faults and keeps their table: see torture/__init__.py for the commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torture.frame import FAMILIES, LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]
IMPORT_S = 120.0
"""What a family's imports may take."""
QUICK_JOBS = 2
"""Families at a time in a quick run."""
END_S = 60.0
"""What a process may take to end after its last trial."""


def run_family(
    family: str, quick: bool, words: str, minutes: float = math.inf
) -> dict[str, dict[str, Any]]:
    """{fault: row} of a family; a process that dies or hangs costs its trial only."""
    rows: dict[str, dict[str, Any]] = {}
    done = 0
    while True:
        ended, is_complete = run_process(family, quick, words, minutes, done, rows)
        done += ended
        if is_complete:
            return rows


def run_process(family, quick, words, minutes, skip, rows):
    """Run trials until their process ends: (how many were tried, whether all are)."""
    reading, writing = os.pipe()
    wanted = [family, str(int(quick)), words, str(minutes), str(skip), str(writing)]
    found_in = os.pathsep.join([f"{ROOT}/tests", str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "torture.frame", *wanted],
        pass_fds=[writing],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": found_in},
    )
    os.close(writing)
    ended, current, row, hangs = 0, None, None, False
    for line in lines_of(process, reading):
        if "hangs" in line:
            hangs = True
        elif "left_out" in line:
            ended += 1
        elif "fault" in line:
            current = line
            row = rows.setdefault(line["fault"], empty_row(line["promise"]))
        else:
            add(row, line, f"trial {current['number']}: {line['error']}")
            current, ended = None, ended + 1
            show(family, rows)
    exit_code = end(process)
    if current is None:
        assert exit_code == 0, f"{family}: the process ended with {exit_code} between two trials"
        return ended, True
    why = "hung" if hangs else f"ended its process with {exit_code}"
    failure = {"error": why, "outcomes": {}, "figures": {}, "seconds": 0}
    add(row, failure, f"trial {current['number']} {why}")
    show(family, rows)
    return ended + 1, False


def lines_of(process, pipe: int) -> Iterator[dict[str, Any]]:
    """The lines that a process writes to the pipe. Where none comes for too long, the process is
    killed and the last line is {"hangs": True}."""
    text, limit_s = b"", IMPORT_S
    with open(pipe, "rb", buffering=0) as file:
        while select.select([file], [], [], limit_s)[0]:
            piece = file.read(1 << 16)
            *lines, text = (text + piece).split(b"\n")
            for line in map(json.loads, lines):
                limit_s = line.get("limit_s", IMPORT_S)
                yield line
            if not piece:
                return
    process.send_signal(signal.SIGUSR1)  # prints where its threads are
    time.sleep(1)
    process.kill()
    yield {"hangs": True}


def empty_row(promise: str) -> dict[str, Any]:
    """A row without a trial."""
    return {"promise": promise, "tried": 0, "survived": 0, "seconds": 0.0, "failures": []}


def add(row, line, failure):
    """Count a trial in its row, unless it was left out."""
    is_left_out = any(words.startswith(LEFT_OUT) for words in line["outcomes"])
    number = 0 if is_left_out else max(1, sum(line["outcomes"].values()))
    row["tried"] += number
    row["seconds"] = round(row["seconds"] + line["seconds"], 1)
    if line["error"]:
        row["failures"].append(failure[:300])
        return
    row["survived"] += number
    if line["outcomes"]:
        row["outcomes"] = dict(Counter(row.get("outcomes", {})) + Counter(line["outcomes"]))
    figures = row.setdefault("figures", {}) if line["figures"] else {}
    for name, value in line["figures"].items():
        figures[name] = max(value, figures.get(name, value))


def end(process):
    """The exit code of a family's process; None if it had to be killed. Its children go too."""
    try:
        code = process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def show(family: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the newest row over the line before; without a terminal, at 1, 10, 100... trials."""
    name, row = list(rows.items())[-1]
    text = f"{family}: {name}: {row['survived']:,} of {row['tried']:,} survived"
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif str(row["tried"]).strip("0") == "1" or row["tried"] != row["survived"]:
        print(text, flush=True)


def main() -> int:
    """Run the command: 0 if every fault was survived, else 1."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--only", default="", help="a family, or words of a fault's name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most, of each fault")
    parser.add_argument("--results", type=Path, help="JSON file whose rows are replaced")
    options = parser.parse_args()
    began = time.perf_counter()
    families = [options.only] if options.only in FAMILIES else list(FAMILIES)
    words = "" if options.only in FAMILIES else options.only
    found = {}
    # figures of the whole are taken one after the other; the quick run only has to be quick
    with ThreadPoolExecutor(QUICK_JOBS if options.quick else 1) as pool:
        running = {
            family: pool.submit(run_family, family, options.quick, words, options.minutes)
            for family in families
        }
        for family, future in running.items():
            rows = future.result()
            print("\n" if rows and sys.stdout.isatty() else "", end="")
            if rows:
                found[family] = rows
                if options.results:
                    keep(options.results, family, rows)
    failures = [
        f"{family}: {name}: {failure}"
        for family, rows in found.items()
        for name, row in rows.items()
        for failure in row["failures"]
    ]
    if not found:
        print(f"torture: no fault has the words {options.only!r} in its name", file=sys.stderr)
        return 2
    print("".join(f"FAIL {line}\n" for line in failures), end="")
    counted = [row for rows in found.values() for row in rows.values()]
    summary = {
        "faults": len(counted),
        "tried": sum(row["tried"] for row in counted),
        "survived": sum(row["survived"] for row in counted),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(summary))
    return 1 if failures else 0


def keep(path: Path, family: str, rows: dict[str, dict[str, Any]]) -> None:
    """Replace rows of a results file; other rows stay."""
    record = json.loads(path.read_text()) if path.exists() else {"families": {}}
    about = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    kept = record["families"].setdefault(family, {})
    for name, row in rows.items():
        kept[name] = {**row, **about}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
