"""Load: loaders and processes by the dozen, 10,000 epochs, files larger than the memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
import time

import numpy as np
from support.beton_files import write
from support.loading import make_loader, samples_of
from support.many_samples import write_many
from support.small_files import REPOSITORY, write_small

from ffcv_ssl import OrderOption, Reader
from ffcv_ssl import fields as f
from ffcv_ssl.loader.decoding import image_shapes
from ffcv_ssl.reader import contents
from ffcv_ssl.transforms import CenterCrop, ToTensor
from torture.frame import fault

MB = 1e6


def memory_bytes():
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def peak_bytes():
    """The most resident memory since `reset_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def reset_peak():
    """Begin to measure anew; returns the memory of now."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_bytes()


def cached_bytes(path):
    """How much of a file lies in the system's cache."""
    size = os.path.getsize(path)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    arguments = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.argtypes = arguments
    fd = os.open(path, os.O_RDONLY)
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    found, part = 0, 1 << 32
    vector = np.zeros(part // mmap.PAGESIZE, np.uint8)
    for begin in range(0, size, part):
        count = min(part, size - begin)
        where = ctypes.c_void_p(address + begin), ctypes.c_size_t(count)
        assert library.mincore(*where, ctypes.c_void_p(vector.ctypes.data)) == 0
        found += int((vector[: -(-count // mmap.PAGESIZE)] & 1).sum()) * mmap.PAGESIZE
    library.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return found


@fault("eight loaders in one process", quick=1, full=5, limit_s=120)
def eight_loaders(trial):
    """All see the same pixels, and the tables of the file are in memory once."""
    path = write_small(trial.folder / "a.beton", 60, mode="proportion")
    os.utime(path, ns=(0, 0))
    time.sleep(contents._SETTLED_S + 0.1)  # a file that just changed is not shared
    found: list[list] = [[] for _ in range(8)]
    loaders = [make_loader(path, 8) for _ in found]
    assert len({id(loader.reader.metadata) for loader in loaders}) == 1

    def consume(number):
        found[number] = samples_of(loaders[number])
        loaders[number].close()

    threads = [threading.Thread(target=consume, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] and all(samples == found[0] for samples in found)


_CHILD = """
import hashlib, sys
from support.loading import make_loader, samples_of
with make_loader(sys.argv[1], 8) as loader:
    print(hashlib.sha256(repr(samples_of(loader)).encode()).hexdigest())
"""


@fault("eight processes on one file", quick=1, full=5, limit_s=300)
def eight_processes(trial):
    """All see the same pixels (quick: two processes)."""
    path = write_small(trial.folder / "a.beton", 60, mode="proportion")
    command = [sys.executable, "-c", _CHILD, path]
    settings = {"stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY / "tests"}
    count = 2 if trial.quick else 8
    children = [subprocess.Popen(command, **settings) for _ in range(count)]
    digests = {child.communicate()[0] for child in children}
    assert len(digests) == 1 and "" not in digests
    assert all(child.returncode == 0 for child in children)


@fault("10,000 epochs of a small file", quick=1, full=1, limit_s=1800)
def many_epochs(trial):
    """Memory, threads and descriptors stay as they are (quick: 300 epochs)."""
    path = write_small(trial.folder / "a.beton", 32, (16, 16), mode="raw")

    def census():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with make_loader(path, 16) as loader:
        for _ in range(50):
            for _ in loader:
                pass
        threads_and_files, before = census(), memory_bytes()
        for _ in range(300 if trial.quick else 10_000):
            for _ in loader:
                pass
        assert census() == threads_and_files
        grown = memory_bytes() - before
    assert grown < 8 * MB
    return {"MB more memory": round(grown / MB, 1)}


@fault("a file larger than the memory", quick=1, full=1, limit_s=3600)
def larger_than_memory(trial):
    """With os_cache=False, a random order through 150 GB (quick: 2 GB) of raw images grows neither
    this process nor the system's cache."""
    num_samples, num_read = (13_000, 3_000) if trial.quick else (1_000_000, 300_000)
    path = write_many(trial.folder / "a.beton", num_samples, side_px=224)
    with open(path, "rb") as file:  # what was just written is no part of this
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    views = {"image": [CenterCrop(32), ToTensor()]}
    settings = {"os_cache": False, "order": OrderOption.RANDOM, "pipelines": views}
    with make_loader(path, 64, **settings) as loader:
        iterator, before = iter(loader), 0
        most_cached = 0
        for number in range(num_read // 64):
            batch = next(iterator)
            assert not batch.image.any()
            if number == 10:
                before, tables = memory_bytes(), cached_bytes(path)
            if number >= 10 and number % 40 == 0:
                most_cached = max(most_cached, cached_bytes(path) - tables)
        grown = memory_bytes() - before
    assert grown < 64 * MB and most_cached < 256 * MB, (grown, most_cached)
    return {"MB more memory": grown / MB, "MB more in the cache": most_cached / MB}


@fault("the smallest and the largest image", quick=1, full=1, limit_s=900)
def extreme_images(trial):
    """Images of 1 px and of the largest size load: at most twice the image's bytes per thread
    (quick: a sixteenth of the largest)."""
    side = 4096 if trial.quick else 16_384
    large = np.zeros((side, side, 3), np.uint8)
    large[::7] = 200
    one = np.full((1, 1, 3), 9, np.uint8)
    path = str(trial.folder / "a.beton")
    page = 1 << (large.nbytes - 1).bit_length()  # a page holds its largest sample
    write(path, {"image": f.RGBImageField("raw")}, [(one,), (large,)], page_size=page)
    large_bytes, mean = large.nbytes, large[:32].mean()
    del large
    before = reset_peak()
    views = {"image": [CenterCrop(16, ratio=1.0), ToTensor()]}
    with make_loader(
        path, 1, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=views
    ) as loader:
        assert image_shapes(loader.reader, "image").largest == (side, side)
        small, found = (batch.image for batch in loader)
    assert (small == 9).all() and found.any() and abs(found.float().mean() - mean) < 60
    grown = peak_bytes() - before
    assert grown < 2 * large_bytes + 200 * MB
    return {"MB of the image": large_bytes / MB, "MB of memory": grown / MB}


@fault("14 million samples", quick=1, full=1, limit_s=900)
def fourteen_million(trial):
    """Opening takes at most 5 s of CPU and 1 GB, an epoch's order at most 2 s of CPU, be it in file
    order, random or quasi-random (quick:
    200,000 samples)."""
    num_samples = 200_000 if trial.quick else 14_000_000
    path = write_many(trial.folder / "a.beton", num_samples, num_classes=21_841)
    write_many(trial.folder / "warm.beton", 1000)
    views = {"image": [CenterCrop(1), ToTensor()]}
    for order in OrderOption:  # loads the kernels
        with make_loader(trial.folder / "warm.beton", 256, order=order, pipelines=views) as loader:
            next(iter(loader))
    figures, before = {}, reset_peak()
    # seconds of the CPU: other work on the machine shall not fail the trial
    began, cpu = time.perf_counter(), time.process_time()
    with Reader(path):
        figures["CPU seconds to open"] = time.process_time() - cpu
        figures["seconds to open"] = time.perf_counter() - began
        figures["MB to open"] = (peak_bytes() - before) / MB
    for order in OrderOption:
        with make_loader(path, 256, order=order, pipelines=views) as loader:
            began, cpu = time.perf_counter(), time.thread_time()
            next(iter(loader))
            figures[f"CPU seconds to the first batch, {order.name}"] = time.thread_time() - cpu
            figures[f"seconds to the first batch, {order.name}"] = time.perf_counter() - began
    assert figures["CPU seconds to open"] <= 5 and figures["MB to open"] <= 1000, figures
    orders = [seconds for name, seconds in figures.items() if name.startswith("CPU seconds to the")]
    assert max(orders) <= 2, figures
    return {name: round(value, 2) for name, value in figures.items()}
