"""Runs the faults and keeps their table: see torture/__init__.py for the commands."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from torture import results
from torture.family import STOP, Family
from torture.frame import FAMILIES

JOBS = 2
"""Families at a time. Nearly all trials take one thread, and limits of time are limits of the
CPU's, so a neighbour does not fail them."""
LONG_FIRST = ("files", "kills", "load", "jpegs", "scale", "threads", "sources", "disks", "pages")


def main() -> int:
    """Run the command: 0 if every fault was survived, else 1."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--only", default="", help="a family, or words of a fault's name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most, of each fault")
    parser.add_argument("--results", type=Path, help="JSON file whose rows are replaced")
    options = parser.parse_args()
    if options.quick and options.results:
        print("torture: got --quick with --results, expected a whole run there", file=sys.stderr)
        return 2
    began, measured = time.perf_counter(), results.about() if options.results else {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: dict[str, Family] = {}
    try:
        for family in run_families(options):
            print("\n" if family.rows and sys.stdout.isatty() else "", end="")
            if family.rows:
                found[family.name] = family
                if options.results:
                    results.keep(options.results, family, measured)
    except KeyboardInterrupt:
        print(f"torture: interrupted; whole families: {', '.join(found)}", file=sys.stderr)
        return 130
    if not found:
        print(f"torture: no fault has the words {options.only!r} in its name", file=sys.stderr)
        return 2
    return tell([found[name] for name in FAMILIES if name in found], began)


def run_families(options: argparse.Namespace) -> Iterator[Family]:
    """The wanted families, each when its trials are over. An interrupt ends all of them."""
    whole = options.only in FAMILIES
    names = [options.only] if whole else sorted(FAMILIES, key=place)
    words = "" if whole else options.only
    families = [Family(name, options.quick, words, options.minutes) for name in names]
    with ThreadPoolExecutor(JOBS) as pool:
        running = {pool.submit(family.run): family for family in families}
        try:
            for future in as_completed(running):
                future.result()
                yield running[future]
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes end at once
            STOP.set()
            raise


def place(family: str) -> int:
    """When a family begins: the long ones first, so that none is alone at the end."""
    return LONG_FIRST.index(family) if family in LONG_FIRST else len(LONG_FIRST)


def tell(families: list[Family], began: float) -> int:
    """Print failures and sums: 1 if there are failures, else 0."""
    rows = [(family.name, *item) for family in families for item in family.rows.items()]
    failures = [f"{where}: {name}: {line}" for where, name, row in rows for line in row["failures"]]
    print("".join(f"FAIL {line}\n" for line in failures), end="")
    sums = {key: sum(row[key] for *_, row in rows) for key in ("tried", "survived")}
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"faults": len(rows), **sums, "seconds": seconds}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
