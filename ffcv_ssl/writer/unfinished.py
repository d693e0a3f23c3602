"""The file while it is written: under a hidden name beside its target, locked by its writer.

A writer that is killed cannot remove its unfinished file, which is as large as the data set. The
next writer of the same target does: a file that nobody locks has no writer. Locks end with their
process, so a process id that is used again misleads nobody. Some file systems keep locks within one
machine: a file of another machine must also have been left alone for some minutes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffcv_ssl.errors import BetonError
from ffcv_ssl.files import check_target, remedy_for, sync_folder

_LEFT_ALONE_S = 600  # a writer on another machine writes more often than that

_ours: dict[str, int | None] = {}  # unfinished files of this process: path -> descriptor once open


def remove_unfinished() -> None:
    """Remove the unfinished files of this process, which must end then; for signal handlers."""
    for path in list(_ours):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _release() -> None:
    """Let go of the parent's unfinished files in a forked process: it would keep their locks, and
    their room on the disk, when the parent is killed and its child lives on."""
    for descriptor in _ours.values():
        if descriptor is not None:
            # Not closed: the number would be used again, and the parent's file object is here too.
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor, inheritable=False)
                os.close(null)
    _ours.clear()


os.register_at_fork(after_in_child=_release)  # workers, and what a dataset forks by itself


@contextmanager
def unfinished(path: str) -> Iterator[UnfinishedFile]:
    """A binary file that replaces `path` if the block succeeds, and is removed if it fails.

    First removes what killed writers of the same target left behind. On file systems without locks
    these files stay, as their writers may still live. Raises UserError for a target that is not a
    regular file, BetonError where the file cannot be written; other errors of the block pass.
    """
    target = check_target(path)
    folder, name = os.path.split(target)
    _remove_leftovers(folder, name)
    with _new_file(path, folder, name) as (file, temporary):
        yield file
        file.sync()
        with _explained(path):
            os.replace(temporary, target)
    sync_folder(folder)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn a failure to write `path` within the block into a BetonError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise BetonError(f"{path}: cannot be written ({reason}); {remedy_for(error)}") from error


class _Raw(io.FileIO):
    """A new file at `temporary`, to be renamed to `path`, which its errors name."""

    def __init__(self, temporary: str, path: str) -> None:
        self.path = path
        with _explained(path):
            super().__init__(temporary, "xb")  # x: never a file of another writer

    def write(self, data: Any) -> int:
        with _explained(self.path):
            return super().write(data)

    def close(self) -> None:
        with _explained(self.path):  # NFS may tell here that it could not write
            super().close()


class UnfinishedFile(io.BufferedWriter):
    """What `unfinished` yields: a buffered binary file. Its methods raise BetonError."""

    def __init__(self, temporary: str, path: str) -> None:
        self._path = path
        super().__init__(_Raw(temporary, path))

    def sync(self) -> None:
        """Flush everything to disk."""
        self.flush()
        with _explained(self._path):
            os.fsync(self.fileno())


@contextmanager
def _new_file(path: str, folder: str, name: str) -> Iterator[tuple[UnfinishedFile, str]]:
    """A new locked file and its path, which is removed if the block fails."""
    while True:
        unique = f"{_machine()}-{secrets.token_hex(8)}"
        temporary = os.path.join(folder, f".{_short(name)}.{unique}.tmp")
        _ours[temporary] = None
        try:
            with UnfinishedFile(temporary, path) as file:
                _ours[temporary] = file.fileno()
                with _explained(path):
                    _lock(file.fileno())
                    is_ours = _is_at(file.fileno(), temporary)
                if is_ours:
                    yield file, temporary
                    return
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            _ours.pop(temporary, None)


def _short(name: str) -> str:
    """At most 200 bytes of a name, so that the hidden name is not too long where `name` is not."""
    return os.fsdecode(os.fsencode(name)[:200])


@functools.cache
def _machine() -> str:
    """Eight hex digits of the running system: equal where processes see one another's locks, as in
    all containers of a machine."""
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, ValueError):
        running = os.uname().nodename
    return hashlib.blake2b(running.encode(), digest_size=4).hexdigest()


def _lock(descriptor: int) -> None:
    """Lock a file of our own. Waits for a writer that looks at this moment whether it is locked."""
    with contextlib.suppress(OSError):  # a file system without locks: nobody removes leftovers
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still at its path. A writer that starts between our making the file
    and our locking it takes the file for a leftover."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: str, name: str) -> None:
    """Remove the unfinished files of `folder/name` that no process writes. Raises nothing: a
    leftover is no reason not to write."""
    # without the machine, or digits alone: names that former versions gave
    unique = r"((?P<machine>[0-9a-f]{8})-)?[0-9a-f]{16}|\d{1,10}"
    pattern = re.compile(re.escape(f".{_short(name)}.") + f"({unique})" + r"\.tmp")
    with contextlib.suppress(OSError):  # such as a folder that may be written to and not listed
        for leftover in os.listdir(folder):
            path = os.path.join(folder, leftover)
            found = pattern.fullmatch(leftover)
            if found and path not in _ours:  # NFS gives a process its own lock a second time
                with contextlib.suppress(OSError):
                    _remove_unless_written(path, is_local=found["machine"] == _machine())


def _remove_unless_written(path: str, is_local: bool) -> None:
    """Remove a file that nobody locks. is_local: its writer ran on this machine, so that its lock
    would be seen."""
    # not blocked by a pipe of that name; for writing, as NFS locks no file opened for reading
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return
        if not is_local and time.time() - status.st_mtime < _LEFT_ALONE_S:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # locked, or a file system without locks
        if _is_at(descriptor, path):
            os.unlink(path)
    finally:
        os.close(descriptor)
