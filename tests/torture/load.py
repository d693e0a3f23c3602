"""Load: loaders and processes by the dozen, 10,000 epochs, files larger than the memory."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import reference
from support.beton_files import write
from support.loading import make_loader, samples_of
from support.many_samples import write_many
from support.small_files import REPOSITORY, write_small

from ffcv_ssl import BetonError, OrderOption, Reader
from ffcv_ssl import fields as f
from ffcv_ssl.beton import MAX_IMAGE_PX
from ffcv_ssl.fields import EncodedImage
from ffcv_ssl.loader.decoding import image_shapes
from ffcv_ssl.reader import contents
from ffcv_ssl.transforms import CenterCrop, ToTensor
from torture.frame import fault
from torture.usage import MB, census, memory_bytes, peak_bytes, reset_peak, timed


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


@fault("eight loaders in one process", quick=1, full=10, limit_s=120)
def eight_loaders(trial):
    """Eight loaders on one file, each in a thread of its own, all give the pixels that one gives,
    and the tables of the file are in memory once."""
    path = write_small(trial.folder / "a.beton", 60, mode="proportion")
    with make_loader(path, 8) as loader:
        expected = samples_of(loader)
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
    assert len(expected) == 56 and all(samples == expected for samples in found)


_CHILD = """
import sys
from torture.load import digest_of
print(digest_of(sys.argv[1]))
"""


def digest_of(path):
    """One digest of all that an epoch of a small file gives."""
    with make_loader(path, 8) as loader:
        return hashlib.sha256(repr(samples_of(loader)).encode()).hexdigest()


@fault("eight processes on one file", quick=1, full=10, limit_s=300)
def eight_processes(trial):
    """Eight processes (quick: two) on one file, at the same time, see the pixels that this one
    sees."""
    path = write_small(trial.folder / "a.beton", 60, mode="proportion")
    command = [sys.executable, "-c", _CHILD, path]
    settings = {"stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY / "tests"}
    count = 2 if trial.quick else 8
    children = [subprocess.Popen(command, **settings) for _ in range(count)]
    digests = [child.communicate()[0] for child in children]
    assert digests == [f"{digest_of(path)}\n"] * count
    assert all(child.returncode == 0 for child in children)


@fault("10,000 epochs of a small file", quick=1, full=1, limit_s=1800)
def many_epochs(trial):
    """A loader keeps its memory, threads and descriptors for 10,000 epochs (quick: 300)."""
    path = write_small(trial.folder / "a.beton", 32, (16, 16), mode="raw")
    with make_loader(path, 16) as loader:
        for _ in range(50):
            for _ in loader:
                pass
        before, at_first = reset_peak(), census()
        for _ in range(300 if trial.quick else 10_000):
            for _ in loader:
                pass
        grown = reset_peak() - before
        assert census() == at_first
    assert grown < 8 * MB
    return {"MB more memory": round(grown / MB, 1)}


@fault("a file larger than the memory", quick=1, full=1, limit_s=3600)
def larger_than_memory(trial):
    """With os_cache=False, 45 GB in random order out of a file of 150 GB (quick: all of 0.4)
    grow neither this process nor the system's cache; every image is in its sample's row."""
    num_samples, num_read = (3_000, 3_000) if trial.quick else (1_000_000, 300_000)
    images = {sample: noise(sample) for sample in range(0, num_samples, 1000)}
    path = write_many(trial.folder / "a.beton", num_samples, side_px=224, images=images)
    with open(path, "rb") as file:  # what was just written is no part of this
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    views = {"image": [CenterCrop(224, ratio=1.0), ToTensor()]}
    settings = {"os_cache": False, "order": OrderOption.RANDOM, "pipelines": views}
    most_cached, seen = 0, np.zeros(num_samples, int)
    with make_loader(path, 64, **settings) as loader:
        iterator = iter(loader)
        for number in range(num_read // 64):
            check_rows(next(iterator), seen)
            if number == 10:
                before, tables = memory_bytes(), cached_bytes(path)
            if number > 10 and number % (10 if trial.quick else 200) == 0:
                most_cached = max(most_cached, cached_bytes(path) - tables)
        grown = memory_bytes() - before
    assert seen.max() == 1 and seen[::1000].sum() > len(images) // 5
    assert grown < 64 * MB and most_cached < 256 * MB, (grown, most_cached)
    figures = {"MB more memory": grown / MB, "MB more in the cache": most_cached / MB}
    return {**figures, "images that are not black": int(seen[::1000].sum())}


def noise(sample):
    """The pixels of a sample that is not black, every thousandth."""
    return np.random.default_rng(sample).integers(0, 256, (224, 224, 3), np.uint8)


def check_rows(batch, seen):
    """Each row of a batch has the pixels of its sample; counts samples in `seen` (N,)."""
    samples, pixels = batch.indices.numpy(), batch.image.numpy()
    seen[samples] += 1
    is_noise = samples % 1000 == 0
    for row in np.flatnonzero(is_noise):
        np.testing.assert_array_equal(pixels[row], noise(samples[row]))
    assert not any(pixels[row].any() for row in np.flatnonzero(~is_noise))


@fault("the smallest and the largest image", quick=1, full=1, limit_s=900)
def extreme_images(trial):
    """Images of 1 px and of the largest size (quick: a sixteenth of it), raw and JPEG, come out as
    float64 resizes them, give or take a level; loading takes at most twice the image's bytes. An
    image of one row or column more is refused in one line."""
    side = 4096 if trial.quick else 16_384
    large, one = slopes(side), np.full((1, 1, 3), 9, np.uint8)
    expected, large_bytes = shrunk(large, 16), large.nbytes
    page = 1 << (large.nbytes - 1).bit_length()  # a page holds its largest sample
    figures = {"MB of the image": large_bytes / MB}
    for mode in ("raw", "jpg"):
        path = str(trial.folder / mode)
        write(path, {"image": f.RGBImageField(mode)}, [(one,), (large,)], page_size=page)
    del large
    for mode in ("raw", "jpg"):
        before = reset_peak()
        small, found = load_both(trial.folder / mode, side)
        assert (small == 9).all() and np.abs(found - expected).max() <= 1, mode
        grown = peak_bytes() - before
        assert grown < 2 * large_bytes + 200 * MB, (mode, grown)
        figures[f"MB of memory, {mode}"] = grown / MB
    for shape in ((16_384, 16_385), (16_385, 16_384), (1, 65_536)):
        assert shape[0] * shape[1] > MAX_IMAGE_PX or max(shape) > 65_535
        check_is_refused(trial.folder / "refused", *shape)
    return figures


def slopes(side):
    """A square image, uint8 (side, side, 3): from top to bottom, from left to right, and both."""
    slope = (np.arange(side) * 256 // side).astype(np.uint8)
    image = np.empty((side, side, 3), np.uint8)
    image[..., 0], image[..., 1] = slope[:, None], slope
    image[..., 2] = image[..., 0] // 2 + image[..., 1] // 2
    return image


def shrunk(image, size):
    """A square image (H, H, 3) at (size, size, 3), in float64, without a copy of it."""
    side, part = len(image), 256
    weights = reference.axis_matrix(0, side, side, size, False)
    rows = np.zeros((size, side * 3))
    for begin in range(0, side, part):
        rows += weights[:, begin : begin + part] @ image[begin : begin + part].reshape(-1, side * 3)
    return np.einsum("xw,ywc->yxc", weights, rows.reshape(size, side, 3))


def load_both(path, side):
    """The two images of a file at 16 px, as float64 arrays."""
    settings = {"num_workers": 1, "order": OrderOption.SEQUENTIAL}
    views = {"image": [CenterCrop(16, ratio=1.0), ToTensor()]}
    with make_loader(path, 1, pipelines=views, **settings) as loader:
        assert image_shapes(loader.reader, "image").largest == (side, side)
        return [batch.image[0].double().numpy() for batch in loader]


def check_is_refused(path, height, width):
    """Neither an array nor a file of an image of that size is written."""
    array = np.broadcast_to(np.uint8(0), (height, width, 3))
    for image in (array, EncodedImage(b"P6 %d %d 255\n" % (width, height))):
        with pytest.raises(BetonError, match=f"image of {width}x{height} px, expected") as caught:
            write(path, {"image": f.RGBImageField("raw")}, [(image,)])
        assert "\n" not in str(caught.value) and not path.exists()


@fault("14 million samples", quick=1, full=1, limit_s=900)
def fourteen_million(trial):
    """Opening takes at most 5 s of CPU and 1 GB; an epoch gives its first batch after at most 2 s
    of CPU, in file order, random or quasi-random order (quick: 200,000 samples)."""
    num_samples = 200_000 if trial.quick else 14_000_000
    path = write_many(trial.folder / "a.beton", num_samples, num_classes=21_841)
    write_many(trial.folder / "warm.beton", 1000)
    views = {"image": [CenterCrop(1), ToTensor()]}
    for order in OrderOption:  # loads the kernels
        with make_loader(trial.folder / "warm.beton", 256, order=order, pipelines=views) as loader:
            next(iter(loader))
    figures: dict[str, float] = {}
    before = reset_peak()
    with timed(figures, "to open"):
        reader = Reader(path)
    figures["MB to open"] = round((peak_bytes() - before) / MB)
    reader.close()
    for order in OrderOption:
        what = f"to the first batch, {order.name}"
        with make_loader(path, 256, order=order, pipelines=views) as loader:
            with timed(figures, what):
                next(iter(loader))
        assert figures[f"CPU seconds {what}"] <= 2, figures
    assert figures["CPU seconds to open"] <= 5 and figures["MB to open"] <= 1000, figures
    return figures
