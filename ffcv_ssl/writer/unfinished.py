"""The file while it is written: under a hidden name beside its target, locked by its writer.

A writer that is killed cannot remove its unfinished file, which is as large as the data set. The
next writer of the same target does: a file that nobody locks has no writer. Locks end with their
process, so a process id that is used again misleads nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ffcv_ssl.errors import BetonError
from ffcv_ssl.files import check_target, sync_folder

_ours: set[str] = set()  # paths of the unfinished files of this process


def remove_unfinished() -> None:
    """Remove the unfinished files of this process, which must end then; for signal handlers."""
    for path in list(_ours):
        with contextlib.suppress(OSError):
            os.unlink(path)


@contextmanager
def unfinished(path: str) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` if the block succeeds, and is removed if it fails.

    First removes what killed writers of the same target left behind. On file systems without locks
    these files stay, as their writers may still live. Raises UserError for a target that is not a
    regular file, BetonError where the file cannot be written.
    """
    target = check_target(path)
    folder, name = os.path.split(target)
    try:
        _remove_leftovers(folder, name)
        with _new_file(folder, name) as (file, temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        sync_folder(folder)
    except OSError as error:
        raise BetonError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _new_file(folder: str, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """A new locked file and its path, which is removed if the block fails."""
    while True:
        temporary = os.path.join(folder, f".{_short(name)}.{secrets.token_hex(8)}.tmp")
        _ours.add(temporary)
        try:
            with open(temporary, "xb") as file:  # x: never a file of another writer
                _lock(file.fileno())
                if _is_at(file.fileno(), temporary):
                    yield file, temporary
                    return
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            _ours.discard(temporary)


def _short(name: str) -> str:
    """At most 200 bytes of a name, so that the hidden name is not too long where `name` is not."""
    return os.fsdecode(os.fsencode(name)[:200])


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
    """Remove the unfinished files of `folder/name` that no process locks."""
    # the digits are of versions that named the file by its process
    pattern = re.compile(re.escape(f".{_short(name)}.") + r"([0-9a-f]{16}|\d{1,10})\.tmp")
    for found in os.listdir(folder):
        if pattern.fullmatch(found):
            with contextlib.suppress(OSError):  # a leftover is no reason not to write
                _remove_unless_locked(os.path.join(folder, found))


def _remove_unless_locked(path: str) -> None:
    # not blocked by a pipe of that name; for writing, as NFS locks no file opened for reading
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # locked, or a file system without locks
        if _is_at(descriptor, path):
            os.unlink(path)
    finally:
        os.close(descriptor)
