"""Two augmented views of photographs at 224 px: images/s of this library, of the bare decode, and
of peers.

    python -m benchmarks.loader --root FOLDER_OF_PHOTOGRAPHS   # written at max side 500, quality 90
    python -m benchmarks.loader --beton FILE.beton             # a file as it is
    python -m benchmarks.loader --root FOLDER --results benchmarks/results/loader.json

Runs of all peers are interleaved and the first run of each is discarded. Only ratios within one run
of this program are meaningful. Peers that are not installed are named and left out. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata

from benchmarks import rows
from benchmarks.peers import PEERS
from benchmarks.peers.ours import Ours
from benchmarks.photographs import Files, write_photographs
from benchmarks.recipe import BATCH_SIZE, COLUMNS, SIZE_PX
from benchmarks.record import cpu_name, write_record
from benchmarks.server import PeerProcess

# Largest difference between a peer's views and ours in mean and in standard deviation, in levels of
# 255, in addition to three standard errors. Resizing, rounding and hue differ a little (DALI's
# linear hue: 5).
_TOLERANCE_LEVELS = 6.0


def measure(files: Files, threads: int, num_runs: int) -> tuple[dict, dict]:
    """({(peer, column): [images/s]}, {peer: {column: `levels_of` its views}}).

    Measures column by column with the peers' runs interleaved; a peer is stopped while another
    runs. Exits if a peer's views differ from ours.
    """
    rates: dict[tuple[str, str], list[float]] = {}
    levels: dict[str, dict[str, list[float]]] = {}
    for column in COLUMNS:
        names = [peer.name for peer in PEERS if column in peer.columns]
        place = (column, files.path, files.folder, threads)
        running = {name: PeerProcess(name, *place) for name in names}
        try:
            found = warm_up(running)
            check_levels(found)
            for _ in range(num_runs):
                for name, peer in running.items():
                    rates.setdefault((name, column), []).append(peer.run())
        finally:
            for peer in running.values():
                peer.close()
        for name, values in found.items():
            levels.setdefault(name, {})[column] = [round(value, 2) for value in values]
        medians = {name: round(statistics.median(rates[name, column])) for name in names}
        print(f"{column}: {medians}", flush=True)
    return rates, levels


def warm_up(running: dict[str, PeerProcess]) -> dict[str, list[float]]:
    """Run each peer once, uncounted; returns `levels_of` the views of each peer that has views."""
    found = {}
    for name, peer in running.items():
        peer.run()
        found[name] = peer.sample()
    return {name: levels for name, levels in found.items() if levels is not None}


def check_levels(levels: dict[str, list[float]]) -> None:
    """Raise SystemExit unless all peers' views have our mean and deviation, as for equal work.

    levels: {peer: (mean, std, error of the mean)} of one column.
    """
    ours = levels[Ours.name]
    for peer, found in levels.items():
        allowed = _TOLERANCE_LEVELS + 3 * math.hypot(found[2], ours[2])
        if any(abs(a - b) > allowed for a, b in zip(found[:2], ours[:2])):
            raise SystemExit(
                f"benchmarks.loader: {peer}: views have mean and std {found[:2]}, ours {ours[:2]}, "
                f"expected within {allowed:.1f} levels; make its recipe ours, or leave it out"
            )


def summarize(rates: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, dict]]:
    """Median and spread (half of the range over the median) of every case."""
    out: dict[str, dict[str, dict]] = {}
    for (peer, column), values in rates.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / 2 / median
        row = {"images_per_s": round(median, 1), "spread": round(spread, 3), "runs": len(values)}
        out.setdefault(peer, {})[column] = row
    return out


def ratios(results: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """Our rate divided by each peer's rate, per column."""
    found = {}
    for column, row in results[Ours.name].items():
        bare = results["bare decode"][column]["images_per_s"]
        found[column] = {"share_of_bare_decode": round(row["images_per_s"] / bare, 3)}
        for peer, columns in results.items():
            if peer != Ours.name and not peer.startswith("bare decode") and column in columns:
                ratio = row["images_per_s"] / columns[column]["images_per_s"]
                found[column][f"times_{peer}"] = round(ratio, 2)
    return found


def machine(threads: int) -> dict:
    """The machine and the software versions, for the record."""
    versions: dict[str, str | None] = {}
    for package in ("numba", "numpy", "simplejpeg", "torch", "torchvision", "nvidia-dali-cuda130"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
    }


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder of photographs")
    source.add_argument("--beton", help="file with JPEGs in a field 'image'")
    parser.add_argument("--limit", type=int, default=1024, help="photographs at most")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", help="JSON file to write")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: str) -> dict:
    """Measure everything; returns the record."""
    path = options.beton
    if path is None:
        path = os.path.join(folder, "photographs.beton")
        write_photographs(options.root, path, options.limit)
    files = Files(path, folder)
    print(f"{files.facts}; two views at {SIZE_PX} px, batch {BATCH_SIZE}", flush=True)
    missing = [peer.name for peer in PEERS if not peer.columns]
    if missing:
        print(f"not installed here, left out: {', '.join(missing)}", flush=True)
    rates, levels = measure(files, options.threads, options.runs)
    results, stages = summarize(rates), rows.stages(path)
    return {
        "benchmark": "two views, 224 px",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "images": files.facts,
        "results": results,
        "ratios": ratios(results),
        "views_mean_std_error": levels,
        "other_work_images_per_s": rows.shapes_of_work(path, options.threads, folder),
        "jitter_on_crops": rows.jitter_on_crops(path, options.threads),
        "start_up": rows.start_up(path, options.threads),
        "stages_cpu_us": stages,
        "python": rows.python_share(path, stages),
    }


def main() -> None:
    """Run the command."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        record = run(options, folder)
    for peer, columns in record["results"].items():
        for column, row in columns.items():
            rate = f"{row['images_per_s']:8.1f} images/s  +-{row['spread']:.1%}"
            print(f"{peer:38} {column:12} {rate}")
    write_record(record, options.results)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
