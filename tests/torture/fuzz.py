"""A search for mutants of `.beton` files that take new ways through the code.

    pip install atheris       # not part of the `dev` extra
    PYTHONPATH=tests:. python -m torture.fuzz --seconds 600 --corpus FOLDER

Atheris follows the branches of the readers and the fields, and keeps the bytes of each mutant that
takes a new one in the folder. It ends at the first wrong value, or error that is no BetonError, and
prints the bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz until the time is over or a fault is found."""
    parser = argparse.ArgumentParser(prog="python -m torture.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of kept mutants")
    options = parser.parse_args()
    os.environ.setdefault("NUMBA_BOUNDSCHECK", "1")
    import atheris

    with atheris.instrument_imports(
        include=["ffcv_ssl.beton", "ffcv_ssl.reader", "ffcv_ssl.fields"]
    ):
        import ffcv_ssl.fields
        import ffcv_ssl.reader  # noqa: F401
    from torture.mutants import try_mutant
    from torture.seeds import make_seeds

    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seeds = make_seeds(Path(folder))

        def try_one(data: bytes) -> None:
            """The first byte chooses the seed file, the others the changes."""
            if data:
                try_mutant(seeds[data[0] % len(seeds)], data[1:])

        options.corpus.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", "-max_len=96", "-timeout=30"]
        atheris.Setup([sys.argv[0], str(options.corpus), *limits], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
