"""Many epochs over a small file: does the loader grow or slow down?

    python -m benchmarks.long_run FILE.beton --epochs 200 --results benchmarks/results/long_run.json

Compares the first and the last tenth of the epochs: images/s, resident memory, threads, open files.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import threading
import time

from benchmarks.peers.ours import our_ops
from benchmarks.record import write_record
from ffcv_ssl import Loader, OrderOption


def resident_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(path: str, num_epochs: int, threads: int) -> list[tuple[float, float, int, int]]:
    """One row per epoch: (images/s, MiB, threads, open files)."""
    views = {f"view_{i}": ("image", our_ops("+ jitter")) for i in range(2)}
    settings = {"num_workers": threads, "order": OrderOption.RANDOM, "seed": 0, "drop_last": False}
    rows = []
    with Loader(path, 64, pipelines=views, **settings) as loader:
        for epoch in range(num_epochs):
            started = time.perf_counter()
            images = sum(len(batch.indices) for batch in loader)
            rate = images / (time.perf_counter() - started)
            gc.collect()
            rows.append(
                (rate, resident_mib(), threading.active_count(), len(os.listdir("/proc/self/fd")))
            )
            if (epoch + 1) % 20 == 0:
                print(f"epoch {epoch + 1}: {rate:.0f} images/s, {rows[-1][1]:.0f} MiB", flush=True)
    return rows


def summarize(rows: list[tuple[float, float, int, int]]) -> dict:
    """Medians of the first and of the last tenth of the epochs. Epoch 0 is left out, because it
    loads kernels."""
    tenth = max(1, len(rows) // 10)
    names = ("images_per_s", "resident_mib", "threads", "open_files")
    parts = {"first": rows[1 : tenth + 1], "last": rows[-tenth:]}
    found = {
        part: {n: round(statistics.median(column), 1) for n, column in zip(names, zip(*some))}
        for part, some in parts.items()
    }
    ratio = found["last"]["images_per_s"] / found["first"]["images_per_s"]
    return {**found, "rate_last_over_first": round(ratio, 3)}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("beton")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results")
    options = parser.parse_args()
    record = {"benchmark": "long run", "date": time.strftime("%Y-%m-%d"), "epochs": options.epochs}
    record.update(summarize(run(options.beton, options.epochs, options.threads)))
    write_record(record, options.results)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
