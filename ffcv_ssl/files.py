"""Files on disk: atomic replacement, locks between processes, folders flushed to disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ffcv_ssl.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]

# What flock answers on file systems without locks: Lustre, FUSE, NFS without its lock service.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def kind_of(mode: int) -> str | None:
    """What a file with this `st_mode` is, such as "a pipe"; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def check_target(path: StrPath) -> str:
    """The absolute path to write for `path`: a regular file, or a name that is free yet.

    A link is followed, so that the file it points to is replaced, on that file's disk, and the link
    stays. Raises UserError for a device, a pipe, a socket, a folder and a path that cannot be
    looked up: a rename would put a file in place of the first three. Raises it for an empty path
    too, which would lead to the current folder.
    """
    if not os.fspath(path):
        raise UserError("got an empty path, expected the name of a file to write")
    try:
        kind = _kind_at(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{os.fspath(path)}: cannot be written ({reason})") from None
    _refuse(path, kind)
    return os.path.realpath(path)


def check_kind(path: StrPath) -> None:
    """Raise UserError for a device, a pipe, a socket and a folder, as check_target does; OSError
    for a path that cannot be looked up, for callers that say themselves where they cannot write."""
    _refuse(path, _kind_at(path))


def _kind_at(path: StrPath) -> str | None:
    try:
        return kind_of(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def _refuse(path: StrPath, kind: str | None) -> None:
    if kind is not None:
        raise UserError(
            f"{os.fspath(path)}: is {kind}, expected a regular file or a new name to write to"
        )


_REMEDIES = {
    errno.ENOSPC: "free some space", errno.EDQUOT: "free some space in your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make the disk writable", errno.EIO: "check the disk",
    errno.EACCES: "make it writable for you", errno.EPERM: "make it writable for you",
    errno.ENOENT: "make its folder first", errno.ENOTDIR: "name a file in a folder",
    errno.ENAMETOOLONG: "give it a shorter name",
}  # fmt: skip


def remedy_for(error: OSError) -> str:
    """What to do about an error of writing, besides trying again."""
    return _REMEDIES.get(error.errno or 0, "make room for it or mend the disk")


@contextlib.contextmanager
def replacing(
    path: StrPath,
    temporary: StrPath | None = None,
    check_new: Callable[[Path], object] | None = None,
) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends, after it is flushed to disk.

    If the block fails, the new file is deleted and the old `path` stays as it was. temporary: the
    new file's name until then, in the same folder; the default is `path` with `.tmp` added, so that
    the next writer overwrites what a killed one left. Where several processes may write at once,
    give each its own temporary name. check_new: called with the new file once it is on disk; what
    it raises keeps the old one. Raises UserError where either name is a device, a pipe, a socket or
    a folder; a link at `path` is replaced, not what it leads to, and one at `temporary` is refused.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp") if temporary is None else Path(temporary)
    check_kind(path)
    check_kind(temporary)  # to open a pipe would wait for its reader
    _refuse(temporary, "a link" if temporary.is_symlink() else None)
    try:
        with open(temporary, "wb", opener=_open_no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check_new is not None:
            check_new(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def own_temporary(path: StrPath) -> Path:
    """A hidden name beside `path` for `replacing`: where the user names the file, `path` with
    `.tmp` added may be the user's as well."""
    path = Path(path)
    short = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    return path.with_name(f".{short}.{os.getpid()}.tmp")


def write_text(path: StrPath, text: str, temporary: StrPath | None = None) -> None:
    """Write a small text file atomically. temporary: as of `replacing`. Raises OSError and
    UserError."""
    with replacing(path, temporary) as file:
        file.write(text.encode("utf-8"))


def save_figure(
    figure: Figure, path: StrPath, dpi: int = 90, temporary: StrPath | None = None
) -> None:
    """Write a matplotlib figure atomically, in the format of the name's ending, else as a PNG.

    temporary: see `replacing`. Raises OSError, UserError, and ValueError for a format that
    matplotlib does not write."""
    with replacing(path, temporary) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=dpi)


@contextlib.contextmanager
def explained(path: StrPath, more: str = "") -> Iterator[None]:
    """Turn a failure to write `path` within the block into a CheckpointError that says what to do.

    more: text for the end of that line.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); {remedy_for(error)} and start again{more}"
        ) from error


def drop_from_memory(path: StrPath) -> None:
    """Let the next read of a file come from the disk, where the system can do that. Only for a file
    that is flushed to disk."""
    with open(path, "rb") as file, contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: StrPath) -> None:
    """Flush a folder's entries to disk, such as a rename, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: StrPath, wait_s: float = -1) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. The lock ends with the process at the latest.

    wait_s: seconds to wait for another process, -1 for as long as it takes. On a file system
    without locks the block runs unlocked. Raises TimeoutError after `wait_s` seconds, OSError where
    the file cannot be made.
    """
    mode = _make_lock_file(path)
    with contextlib.ExitStack() as held:
        if mode is not None:
            # imported here: it takes longer than the rest of the loader, and few processes lock
            import filelock

            try:
                held.enter_context(filelock.FileLock(path, timeout=wait_s, mode=mode))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield


def _make_lock_file(path: StrPath) -> int | None:
    """Make the lock file with the permissions of the umask, as other files get them, and return its
    mode; None on a file system without locks.

    filelock alone would make it unwritable for others (some versions), and would take a file's
    existence for the lock where there are no locks, so that a killed process would block all later
    ones.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # never waits, and disturbs no holder
    except OSError:
        return None
    else:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_folder(folder: StrPath, wait_s: float = 0) -> Iterator[Path]:
    """Make a run's folder and keep other processes out of it while the block runs: two runs in one
    folder would destroy each other's files.

    wait_s: seconds to wait for another process that holds it. Yields the folder. Raises UserError.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", wait_s))
        except TimeoutError:
            raise UserError(f"{folder}: another process trains here; use another --out") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be the run's folder ({error.strerror})") from None
        yield folder
