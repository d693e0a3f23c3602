"""The system's cache of the file: as much as the system decides (os_cache=True), or only what is
being read."""

from __future__ import annotations

import mmap
import os

import numpy as np

from ffcv_ssl.reader import Reader

_GAP = 1 << 16  # bytes; ranges closer than this are joined


class SystemCache:
    """os_cache=True: does nothing. False: `prefetch` asks the system to read the batches ahead;
    `drop` releases their pages after use."""

    def __init__(self, reader: Reader, field_names: list[str], os_cache: bool) -> None:
        self._fd = reader.fd
        extents = [reader.extents(name) for name in field_names]
        self._extents = [] if os_cache else [e for e in extents if e is not None]
        if not os_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead by the system

    def prefetch(self, samples: np.ndarray) -> None:
        self._advise(samples, "POSIX_FADV_WILLNEED")

    def drop(self, samples: np.ndarray) -> None:
        self._advise(samples, "POSIX_FADV_DONTNEED")

    def _advise(self, samples: np.ndarray, advice: str) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        for extents in self._extents:
            for begin, stop in merge_ranges(extents.pointer[samples], extents.size[samples]):
                # whole pages: the system keeps a page of which only a part is not needed
                first = begin // mmap.PAGESIZE * mmap.PAGESIZE
                size = -(-(stop - first) // mmap.PAGESIZE) * mmap.PAGESIZE
                os.posix_fadvise(self._fd, first, size, getattr(os, advice))


def merge_ranges(pointers: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """[(begin, stop)] in bytes, ascending. Ranges closer than 64 KiB are joined."""
    order = np.argsort(pointers)
    begins = pointers[order].astype(np.int64)
    stops = np.maximum.accumulate(begins + sizes[order].astype(np.int64))
    cuts = np.flatnonzero(begins[1:] > stops[:-1] + _GAP) + 1
    parts = zip(np.split(begins, cuts), np.split(stops, cuts))
    return [(int(b[0]), int(s[-1])) for b, s in parts if len(b)]
