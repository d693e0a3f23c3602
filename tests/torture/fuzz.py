"""A search for mutants of `.beton` files that take new ways through the code.

    pip install atheris       # not part of the `dev` extra
    PYTHONPATH=tests:. python -m torture.fuzz --seconds 600 --corpus FOLDER

    # which branches the trials of `make torture ONLY=files` take
    PYTHONPATH=tests:. python -m torture.fuzz --coverage

Atheris follows the branches of the readers and the fields, and keeps the bytes of each mutant that
takes a new one in the folder. It ends at the first wrong value, or error that is no BetonError, and
prints the bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

ROWS = (".beton files", "values for the writer", "reads that fail")
"""Words of the rows whose branches are counted together."""
# Measured: 97.1 % (266 of 274). Not taken, when they were last listed (248 of 254 then): a footer
# that is cut short beside a whole locator (opening reads both where that cannot be); a raw image of
# another size than its payload (opening compares all of them); JPEGs in RGB, fill bytes before a
# frame header, and small JPEGs that "smart" stores as pixels (seldom drawn).
TRIALS = 12
"""Of each of these rows."""
MEASURED = ("beton.py", "reader/*.py", "fields/*.py")


def measure() -> dict:
    """Branches of the reader and the fields that trials take: {"share", "taken", "branches", "not
    taken": {file: [line -> line]}}."""
    import coverage

    folder = Path(importlib.util.find_spec("ffcv_ssl").origin).parent
    files = [path for words in MEASURED for path in sorted(folder.glob(words))]
    watch = coverage.Coverage(data_file=None, branch=True, include=[str(path) for path in files])
    watch.start()
    from torture.frame import run_trial, trials_of

    for words in ROWS:
        for fault, _ in trials_of("files", True, words):
            for number in range(TRIALS):
                error = run_trial(fault, number, quick=True)["error"]
                assert error is None, error
    watch.stop()
    counts, missed = [], {}
    for path in files:
        numbers = watch._analyze(str(path)).numbers
        counts.append((numbers.n_executed_branches, numbers.n_branches))
        arcs = watch._analyze(str(path)).missing_branch_arcs()
        missed[path.name] = [f"{a} -> {b}" for a, ends in sorted(arcs.items()) for b in ends]
    taken, branches = map(sum, zip(*counts))
    return {"share": taken / branches, "taken": taken, "branches": branches, "not taken": missed}


def main() -> None:
    """Fuzz until the time is over or a fault is found."""
    parser = argparse.ArgumentParser(prog="python -m torture.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="at most")
    parser.add_argument("--executions", type=int, default=-1, help="at most; -1: any number")
    parser.add_argument("--corpus", type=Path, help="folder of kept mutants")
    parser.add_argument("--coverage", action="store_true", help="count branches; no search")
    options = parser.parse_args()
    if options.coverage:
        print(json.dumps(measure()))
        return
    if options.corpus is None:
        parser.error("--corpus: name a folder for the mutants to keep")
    os.environ.setdefault("NUMBA_BOUNDSCHECK", "1")
    import atheris

    with atheris.instrument_imports(
        include=["ffcv_ssl.beton", "ffcv_ssl.reader", "ffcv_ssl.fields"]
    ):
        import ffcv_ssl.fields
        import ffcv_ssl.reader  # noqa: F401
    from torture.mutant_trials import try_mutant
    from torture.seeds import make_seeds

    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seeds = make_seeds(Path(folder))

        def try_one(data: bytes) -> None:
            """The first byte chooses the seed file, the others the changes."""
            if data:
                try_mutant(seeds[data[0] % len(seeds)], data[1:])

        options.corpus.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", f"-runs={options.executions}"]
        limits += ["-max_len=96", "-timeout=30"]
        atheris.Setup([sys.argv[0], str(options.corpus), *limits], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
