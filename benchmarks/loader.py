"""Two augmented views of photographs at 224 px: images/s of this library, of the bare decode, and
of peers.

    python -m benchmarks.loader --root FOLDER_OF_PHOTOGRAPHS     # writes them at max side 500,
    quality 90, 4:2:0 python -m benchmarks.loader --beton FILE.beton               # or takes a file
    as it is python -m benchmarks.loader --root FOLDER --results benchmarks/results/loader.json

Runs of all peers are interleaved, the first of each is discarded, and only ratios within one run of
this program mean anything. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.peers import BATCH_SIZE, COLUMNS, PEERS, SIZE_PX
from ffcv_ssl import DatasetWriter, Reader
from ffcv_ssl.fields import RGBImageField

START_UP = """
import sys, time
import torch
from benchmarks.peers import our_ops
from ffcv_ssl import Loader
started = time.perf_counter()
views = {f"view_{i}": ("image", our_ops("+ jitter")) for i in range(2)}
with Loader(sys.argv[1], 64, num_workers=int(sys.argv[2]), seed=0, pipelines=views) as loader:
    next(iter(loader))
    print(time.perf_counter() - started)
"""


class Files:
    """The JPEGs to measure on: their `.beton` file and, for peers that take single files, their
    bytes."""

    def __init__(self, path):
        self.path = path
        with Reader(path) as reader:
            metadata = reader.field_metadata("image")
            if (metadata["mode"] != 0).any():
                raise SystemExit(f"{path}: has raw images; this benchmark is about JPEGs")
            self.payloads = [reader.read(i, "image") for i in range(reader.num_samples)]
        self.max_pixels = int((metadata["height"].astype(np.int64) * metadata["width"]).max())
        self.facts = {
            "images": len(self.payloads),
            "mean_bytes": round(float(np.mean([len(p) for p in self.payloads]))),
            "mean_height_px": round(float(metadata["height"].mean())),
            "mean_width_px": round(float(metadata["width"].mean())),
        }


class Photographs:
    """All image files below a folder, in sorted order."""

    def __init__(self, root, limit):
        endings = (".jpg", ".jpeg", ".png")
        found = [os.path.join(d, f) for d, _, files in os.walk(root) for f in files]
        self.paths = sorted(p for p in found if p.lower().endswith(endings))[:limit]
        if not self.paths:
            raise SystemExit(
                f"{root}: no .jpg, .jpeg or .png below it; give a folder of photographs"
            )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return (Image.open(self.paths[i]).convert("RGB"),)


def write_photographs(root, path, limit):
    field = RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90)
    DatasetWriter(path, {"image": field}).from_indexed_dataset(Photographs(root, limit))


def measure(files, threads, num_runs):
    """{(peer, column): [images/s]}, all runs interleaved."""
    cases = [(peer, column) for column in COLUMNS for peer in PEERS if column in peer.columns]
    running, rates = {}, {}
    for peer, column in cases:
        running[peer, column] = peer()
        running[peer, column].setup(files, column, threads)
        running[peer, column].run()
        rates[peer, column] = []
    for number in range(num_runs):
        for case, instance in running.items():
            started = time.perf_counter()
            images = instance.run()
            rates[case].append(images / (time.perf_counter() - started))
        print(f"run {number + 1} of {num_runs}", flush=True)
    for instance in running.values():
        instance.close()
    return {(peer.name, column): values for (peer, column), values in rates.items()}


def measure_start_up(path, threads, num_runs):
    """Seconds from `Loader(...)` to the first batch, in fresh processes with kernels on the
    disk."""
    seconds = []
    for _ in range(num_runs + 1):
        command = [sys.executable, "-c", START_UP, path, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))
    return seconds[1:]


def summarize(rates):
    """median and spread (half of the range over the median) of every case."""
    out = {}
    for (peer, column), values in rates.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / 2 / median
        row = {"images_per_s": round(median, 1), "spread": round(spread, 3), "runs": len(values)}
        out.setdefault(peer, {})[column] = row
    return out


def ratios(results):
    """The numbers that bind: ours against the others, at each column."""
    bare = results["bare decode"]["crops"]["images_per_s"]
    found = {}
    for column, row in results["ffcv-ssl"].items():
        found[column] = {"share_of_bare_decode": round(row["images_per_s"] / bare, 3)}
        for peer, columns in results.items():
            if peer not in ("ffcv-ssl", "bare decode") and column in columns:
                ratio = row["images_per_s"] / columns[column]["images_per_s"]
                found[column][f"times_{peer}"] = round(ratio, 2)
    return found


def cpu_name():
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def machine(threads):
    import numba
    import torch
    import torchvision

    return {
        "cpu": cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numba": numba.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder of photographs")
    source.add_argument("--beton", help="file with JPEGs in a field 'image'")
    parser.add_argument("--limit", type=int, default=1024, help="photographs at most")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.beton
        if path is None:
            path = os.path.join(folder, "photographs.beton")
            write_photographs(options.root, path, options.limit)
        files = Files(path)
        print(f"{files.facts}; two views at {SIZE_PX} px, batch {BATCH_SIZE}", flush=True)
        results = summarize(measure(files, options.threads, options.runs))
        start_up = measure_start_up(path, options.threads, options.runs)
    record = {
        "benchmark": "two views, 224 px",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "images": files.facts,
        "results": results,
        "ratios": ratios(results),
        "second_process_to_first_batch_s": round(statistics.median(start_up), 3),
    }
    for peer, columns in results.items():
        for column, row in columns.items():
            print(
                f"{peer:26} {column:12} {row['images_per_s']:8.1f} images/s  +-{row['spread']:.1%}"
            )
    if options.results:
        with open(options.results, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
