"""More numbers of this library alone: other workloads, start-up, memory, stages, threads, Python's
share.

All functions take the path of the photographs' `.beton` file and return plain numbers.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import simplejpeg

from benchmarks import recipe as r
from benchmarks.peers.ours import our_ops
from benchmarks.photographs import write_small_raw
from ffcv_ssl import Loader, OrderOption, Reader
from ffcv_ssl import transforms as t
from ffcv_ssl.kernels.io import read_samples
from ffcv_ssl.loader.workers import Scratch
from ffcv_ssl.pipeline.plan import ViewPlan

_FULL = "+ jitter"
_RUNS = 5


def _rate(path, views, threads, batch_size=r.BATCH_SIZE, passes=1):
    """Median images/s of `_RUNS` timings of `passes` passes over the file."""
    pipelines = {f"view_{i}": ("image", ops) for i, ops in enumerate(views)}
    settings = {"num_workers": threads, "order": OrderOption.RANDOM, "seed": 0, "drop_last": False}
    rates = []
    with Loader(path, batch_size, pipelines=pipelines, **settings) as loader:
        for _ in range(_RUNS + 1):
            started = time.perf_counter()
            images = sum(len(batch.indices) for _ in range(passes) for batch in loader)
            rates.append(images / (time.perf_counter() - started))
    return round(statistics.median(rates[1:]), 1)


def shapes_of_work(path: str, threads: int, folder: str) -> dict[str, float]:
    """images/s of one view, multi-crop, smaller outputs, and small raw images."""
    local = our_ops(_FULL, 96, (0.05, 0.25))
    multi_crop = [our_ops(_FULL, 224, (0.25, 1.0)) for _ in range(2)] + [local for _ in range(6)]
    small_path = os.path.join(folder, "small_raw.beton")
    write_small_raw(small_path, 16384)
    small = [
        t.RandomResizedCrop(32),
        t.RandomHorizontalFlip(),
        t.RandomGrayscale(0.2),
        t.ToTensor(),
    ]
    return {
        "one view, 224 px": _rate(path, [our_ops(_FULL)], threads),
        "two views, 224 px": _rate(path, [our_ops(_FULL)] * 2, threads),
        "2 x 224 px + 6 x 96 px": _rate(path, multi_crop, threads),
        "two views, 128 px": _rate(path, [our_ops(_FULL, 128)] * 2, threads),
        "two views, 64 px": _rate(path, [our_ops(_FULL, 64)] * 2, threads),
        "two views, crops only, one thread": _rate(path, [our_ops("crops")] * 2, 1),
        "two views, crops only": _rate(path, [our_ops("crops")] * 2, threads),
        "two views, one thread": _rate(path, [our_ops(_FULL)] * 2, 1),
        "32 px raw, two views, crop + flip + grey, batch 512": _rate(
            small_path, [small, list(small)], threads, batch_size=512, passes=4
        ),
    }


def jitter_on_crops(path: str, threads: int) -> dict[str, dict[str, float]]:
    """Cost of crops, flips and colour jitter divided by the cost of crops and flips: median and
    range over neighbouring passes. In wall time, and in CPU time (less disturbed by other work)."""
    crops = our_ops("crops")
    jitter = t.RandomColorJitter(r.JITTER, r.BRIGHTNESS, r.CONTRAST, r.SATURATION, r.HUE)
    settings = {"num_workers": threads, "order": OrderOption.RANDOM, "seed": 0, "drop_last": False}
    loaders = []
    for ops in (crops, [*crops[:2], jitter, *crops[2:]]):
        views = {f"view_{i}": ("image", ops) for i in range(r.NUM_VIEWS)}
        loaders.append(Loader(path, r.BATCH_SIZE, pipelines=views, **settings))
    pairs = [[_cost_of_a_pass(loader) for loader in loaders] for _ in range(2 * _RUNS + 1)]
    for loader in loaders:
        loader.close()
    ratios = [with_jitter / without for without, with_jitter in pairs[1:]]
    rows = zip(("wall", "cpu"), np.median(ratios, 0), np.min(ratios, 0), np.max(ratios, 0))
    return {
        name: dict(zip(("median", "least", "most"), np.round(values, 3).tolist()))
        for name, *values in rows
    }


def _cost_of_a_pass(loader):
    """(wall seconds, CPU seconds of this process) of one epoch."""
    started = np.array([time.perf_counter(), time.process_time()])
    for _ in loader:
        pass
    return np.array([time.perf_counter(), time.process_time()]) - started


_START_UP = """
import sys, time
import torch
from benchmarks.peers.ours import our_ops
from ffcv_ssl import Loader
def memory_mib(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before_mib = memory_mib("VmRSS")
started = time.perf_counter()
views = {f"view_{i}": ("image", our_ops("+ jitter")) for i in range(2)}
settings = {"num_workers": int(sys.argv[2]), "seed": 0, "drop_last": False}
with Loader(sys.argv[1], 64, pipelines=views, **settings) as loader:
    next(iter(loader))
    first_s = time.perf_counter() - started
    for _ in loader:
        pass
print(first_s, memory_mib("VmHWM") - before_mib)
"""


def _fresh_process(path, threads, **environment):
    command = [sys.executable, "-c", _START_UP, path, str(threads)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(float(number) for number in done.stdout.split())


def start_up(path: str, threads: int) -> dict[str, float]:
    """Seconds from `Loader(...)` to the first batch of 64, without and with cached kernels, and the
    peak memory that the loader adds."""
    with tempfile.TemporaryDirectory() as empty:
        cold, _ = _fresh_process(path, threads, FFCV_SSL_CACHE=empty)
    _fresh_process(path, threads)
    warm = [_fresh_process(path, threads) for _ in range(_RUNS)]
    return {
        "cold_s": round(cold, 2),
        "warm_s": round(statistics.median(first for first, _ in warm), 3),
        "peak_memory_mib": round(statistics.median(peak for _, peak in warm), 1),
    }


def _cpu_us(action, count):
    """CPU microseconds per image of this thread; the best run, because other work only adds
    time."""
    best = float("inf")
    for _ in range(_RUNS):
        started = time.thread_time()
        action()
        best = min(best, time.thread_time() - started)
    return best / count * 1e6


def stages(path: str, limit: int = 256) -> dict[str, float]:
    """CPU microseconds per image of one thread, by stage, for two views; each stage counts as often
    as the recipe has it."""
    with Reader(path) as reader:
        count = min(limit, reader.num_samples)
        metadata, extents = reader.field_metadata("image")[:count], reader.extents("image")
        assert extents is not None and extents.checksum is not None, "a file of this library"
        pointers, sizes = extents.pointer[:count], extents.size[:count]
        offsets = np.concatenate([[0], np.cumsum(-(-sizes.astype(np.int64) // 64) * 64)])
        buffer, status = np.empty(offsets[-1], np.uint8), np.empty(count, np.int64)
        place = (reader.fd, pointers, sizes, extents.checksum[:count])

        def read(verify):
            read_samples(*place, verify, offsets[:-1], buffer, status)

        found = {"read": _cpu_us(lambda: read(False), count)}
        found["hash"] = _cpu_us(lambda: read(True), count) - found["read"]
        payloads = [reader.read(i, "image") for i in range(count)]
    heights, widths = metadata["height"].astype(np.int64), metadata["width"].astype(np.int64)
    spare = np.empty(int((heights * widths).max()) * 3, np.uint8)

    def decode():
        for payload in payloads:
            simplejpeg.decode_jpeg(payload, "RGB", buffer=spare)

    found["decode"] = _cpu_us(decode, count)
    pixels = [simplejpeg.decode_jpeg(payload, "RGB").reshape(-1) for payload in payloads]
    found.update(_render_stages(pixels, heights, widths))
    return {name: round(value, 1) for name, value in found.items()}


def _render_stages(pixels, heights, widths):
    """Cost of resize (with packing to bytes), colour and blur: the difference that each op adds."""
    crop = [t.RandomResizedCrop(r.SIZE_PX), t.RandomHorizontalFlip(r.FLIP)]
    strengths = (r.BRIGHTNESS, r.CONTRAST, r.SATURATION, r.HUE)
    colour = [t.RandomColorJitter(r.JITTER, *strengths), t.RandomGrayscale(r.GREY)]
    colour.append(t.RandomSolarization(r.SOLARIZE))
    blur = [t.GaussianBlur(r.BLUR, r.TAPS, r.SIGMA)]
    costs = [_render_us(ops, pixels, heights, widths) for ops in (crop, crop + colour, crop + blur)]
    resize, colour_us, blur_us = costs[0], costs[1] - costs[0], costs[2] - costs[0]
    pack = _render_us([t.SimpleRGBImageDecoder()], *_views_as_images(len(pixels)))
    return {
        "resize (2 views)": 2 * (resize - pack / 2),
        "pack (2 views)": pack,
        "colour (2 views)": 2 * colour_us,
        "blur (2 views)": 2 * blur_us,
    }


def _views_as_images(count):
    """Images of the view's size. Rendering only unpacks and packs them, about half of the time
    each."""
    image = np.random.default_rng(0).integers(0, 256, r.SIZE_PX**2 * 3, dtype=np.uint8)
    side = np.full(count, r.SIZE_PX)
    return [image] * count, side, side


def _render_us(ops, pixels, heights, widths):
    count = len(pixels)
    same = (int(heights[0]), int(widths[0])) if len(set(zip(heights, widths))) == 1 else None
    plan = ViewPlan("view", "image", 0, ops, 0, same)
    (segment,) = plan.segments
    raw, nothing = np.zeros((count, plan.num_columns)), np.zeros(count, np.int64)
    segment.draw(0, np.arange(count), nothing, heights, widths, raw)
    num_floats = segment.scratch_floats((heights.max(), widths.max()))
    scratch = Scratch().take("floats", num_floats, np.float32)
    out, factors = np.empty((count, *segment.shape, 3), np.uint8), np.ones(count, np.int64)

    def render():
        for i, image in enumerate(pixels):
            segment.render(raw, (image, nothing, heights, widths, factors), scratch, out, i, i + 1)

    return _cpu_us(render, count)


def python_share(path: str, found_stages: dict[str, float]) -> dict[str, float]:
    """CPU microseconds per image of the whole loader with one worker, and Python's part, which is
    the rest beside the stages. Python holds the interpreter's lock, so with many threads the rate
    is at most 1e6 / python_us images/s."""
    views = {f"view_{i}": ("image", our_ops(_FULL)) for i in range(r.NUM_VIEWS)}
    settings = {"num_workers": 1, "order": OrderOption.RANDOM, "seed": 0, "drop_last": False}
    best = float("inf")
    with Loader(path, r.BATCH_SIZE, pipelines=views, **settings) as loader:
        for _ in range(_RUNS):
            started = time.process_time()
            images = sum(len(batch.indices) for batch in loader)
            best = min(best, (time.process_time() - started) / images * 1e6)
    explained = sum(found_stages.values())
    return {"total_us": round(best, 1), "python_us": round(max(best - explained, 0.0), 1)}
