"""os_cache=False: the system keeps only the part of the file that is being read."""

import mmap
import os
import shutil
import subprocess

import numpy as np
import pytest
from support.small_files import write_small

from ffcv_ssl import Loader, Reader
from ffcv_ssl.loader.cache import SystemCache
from ffcv_ssl.transforms import RandomResizedCrop, ToTensor


def cached_bytes(path):
    """How much of a file the page cache holds."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def forget(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.whole
def test_pages_are_dropped_after_use_without_the_systems_cache(tmp_path):
    if shutil.which("fincore") is None:
        pytest.skip("no fincore (util-linux) to look into the page cache with")
    path = write_small(tmp_path / "large.beton", 60, (300, 300), mode="raw")
    forget(path)
    if cached_bytes(path) > 0:
        pytest.skip("this file system keeps its pages whatever it is told")
    pipelines = {"view_0": ("image", [RandomResizedCrop(8), ToTensor()])}
    peaks = {}
    for os_cache in (True, False):
        forget(path)
        settings = {"num_workers": 1, "batches_ahead": 2, "pipelines": pipelines}
        with Loader(path, 4, os_cache=os_cache, seed=0, **settings) as loader:
            peaks[os_cache] = max(cached_bytes(path) for _ in loader)
    size = os.path.getsize(path)
    assert peaks[True] > 0.5 * size
    assert peaks[False] < 0.3 * size


def test_pages_of_which_a_sample_has_only_a_part_are_dropped_too(tmp_path, monkeypatch):
    path, advised = write_small(tmp_path / "a.beton", 20, (100, 100), mode="raw"), []
    with Reader(path) as reader:
        cache = SystemCache(reader, ["image"], os_cache=False)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, *range_: advised.append(range_))
        cache.drop(np.array([7]))
        extents = reader.extents("image")
        begin, stop = (int(n) for n in (extents.pointer[7], extents.pointer[7] + extents.size[7]))
    ((first, size, _),) = advised
    assert first <= begin and first + size >= stop
    assert first % mmap.PAGESIZE == size % mmap.PAGESIZE == 0 and size < stop - begin + 8192
