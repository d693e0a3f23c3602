"""Reads from an open file at given places. A read that fails is a `BetonError` with its path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ffcv_ssl.errors import BetonError

_MAX_READ_BYTES = 1 << 30  # Linux reads just under 2 GiB in one call at most

Read = Callable[[int, int], np.ndarray]  # (size, offset) -> up to `size` bytes, uint8


def read_upto(path: str, fd: int, size: int, offset: int) -> np.ndarray:
    """Up to `size` bytes, uint8; fewer only at the end of the file."""
    got = 0
    try:
        raw = np.empty(size, np.uint8)
        view: Any = raw
        while got < size:
            count = _read_into(fd, view[got : got + _MAX_READ_BYTES], offset + got)
            if count == 0:
                break
            got += count
    except OSError as error:
        raise BetonError(
            f"{path}: reading {size} bytes at {offset} failed ({error.strerror})"
        ) from None
    except (MemoryError, ValueError, OverflowError):  # a sparse file may have room for any size
        raise BetonError(
            f"{path}: no memory for {size} bytes at {offset}; damaged file, copy or write it again"
        ) from None
    return raw[:got]


def _read_into(fd: int, buffer: Any, offset: int) -> int:
    """Fill a buffer of bytes; returns how many there were."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    raw = os.pread(fd, len(buffer), offset)  # macOS: by way of a copy
    buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
    return len(raw)


def read_exactly(
    path: str, read: Read, file_bytes: int, size: int, offset: int, what: str
) -> np.ndarray:
    """`size` bytes of a file of `file_bytes`, uint8, by `read`. what: names them in an error."""
    # compare with the file's size before anything of this size is allocated
    if size > file_bytes - offset:
        raise BetonError(
            f"{path}: {what} needs {size} bytes at {offset}, the file has "
            f"{file_bytes}; truncated or damaged file"
        )
    raw = read(size, offset)
    if len(raw) != size:
        raise BetonError(f"{path}: {what} ends after {len(raw)} of {size} bytes; truncated")
    return raw
