"""Disks that refuse to write or take their time, made of patches in this process: they need neither
a mount nor the rights to make one."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RENAMES = ("fsync", "replace", "link", "rename")
"""Calls of `os`, besides writing, that wait for a disk."""


@contextlib.contextmanager
def files_opened_by(make: Callable[[str, str], io.FileIO | None]) -> Iterator[None]:
    """Within the context, a file is opened for writing as make(path, mode), or as usual where that
    is None."""
    original = io.open

    def open_(file, mode="r", buffering=-1, *args, **options):
        # TensorBoard opens bytes
        is_written = not isinstance(file, int) and set(mode) & set("wax+")
        raw = make(os.fsdecode(file), mode.strip("bt")) if is_written else None
        if raw is None:
            return original(file, mode, buffering, *args, **options)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    with contextlib.ExitStack() as patches:
        for module in (io, builtins):
            patches.enter_context(mock.patch.object(module, "open", open_))
        yield


# ---- Full ----------------------------------------------------------------------------------------


class Full(io.FileIO):
    """A file with room for `room` bytes: what is over is not written, as a full disk does it."""

    room = 0

    def write(self, content: Any) -> int:
        left = self.room - os.fstat(self.fileno()).st_size
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(memoryview(content).cast("B")[:left])


@contextlib.contextmanager
def full_at(name: str, room: int, skip: int) -> Iterator[list[str]]:
    """Files with `name` in their names, but for the first `skip` of them, have room for `room`
    bytes. Yields the list of those that were opened."""
    opened: list[str] = []
    seen: list[str] = []

    def make(path, mode):
        if name not in Path(path).name:
            return None
        seen.append(path)
        if len(seen) <= skip:
            return None
        raw = Full(path, mode)
        raw.room = room
        opened.append(path)
        return raw

    def no_links(*names):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with contextlib.ExitStack() as patches:
        if "epoch" in name:  # a link needs no space
            patches.enter_context(mock.patch.object(os, "link", no_links))
        patches.enter_context(files_opened_by(make))
        yield opened


# ---- Slow ----------------------------------------------------------------------------------------


class Slow(io.FileIO):
    """A file that waits in the middle of each write."""

    wait: Callable[[], None]

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        half = super().write(content[: len(content) // 2])
        self.wait()
        return half + super().write(content[half:])


@contextlib.contextmanager
def slow_disk(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Each write to a file in `folder`, and each flush and rename of this process, calls wait(),
    writes when they are half done."""

    def make(path, mode):
        if folder not in Path(path).absolute().parents:
            return None
        raw = Slow(path, mode)
        raw.wait = wait
        return raw

    def slowly(function):
        def call(*args, **options):
            wait()
            return function(*args, **options)

        return call

    with contextlib.ExitStack() as patches:
        for name in RENAMES:
            patches.enter_context(mock.patch.object(os, name, slowly(getattr(os, name))))
        patches.enter_context(files_opened_by(make))
        yield


class Delays:
    """The waiting of a slow disk. Each wait adds a byte to the file `counted`, so that another
    process knows of it; the wait number `last` (None: none) ends this process half-way."""

    def __init__(self, counted: Path, longest_s: float, random: Any, last: int | None) -> None:
        self.descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.longest_s, self.random, self.last, self.number = longest_s, random, last, 0

    def __call__(self) -> None:
        os.write(self.descriptor, b".")
        seconds = self.random.uniform(0, self.longest_s)
        self.number += 1
        if self.number == self.last:
            time.sleep(seconds / 2)
            os.kill(os.getpid(), 9)
        time.sleep(seconds)
