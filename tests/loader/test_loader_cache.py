"""os_cache=False: the system keeps only the part of the file that is being read."""

import os
import shutil
import subprocess

import pytest
from support.small_files import write_small

from ffcv_ssl import Loader
from ffcv_ssl.transforms import RandomResizedCrop, ToTensor

pytestmark = pytest.mark.whole


def cached_bytes(path):
    """How much of a file the page cache holds."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def forget(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
