"""Files on disk: atomic replacement, locks between processes, folders flushed to disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import filelock

from ffcv_ssl.errors import CheckpointError, UserError


@contextlib.contextmanager
def replacing(path, temporary=None):
    """A binary file that becomes `path` once it is on disk and the block has succeeded.

    Where the block fails, nothing of the file stays and the old `path` is untouched. temporary:
    the name used meanwhile, in the same folder; by default one fixed name, so that the next writer
    overwrites what a killed one left. Give a name of its own where several processes write at once.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp") if temporary is None else Path(temporary)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path, text):
    """Write a small text file atomically. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def save_figure(figure, path, dpi=90):
    """Write a matplotlib figure as a PNG, atomically. Raises OSError."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


@contextlib.contextmanager
def explained(path, more=""):
    """Within the block, a failure to write `path` becomes a CheckpointError with a remedy.

    more: text for the end of that line.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); free some space and start again{more}"
        ) from error


def sync_folder(folder):
    """Flush a folder's entries (a rename) to disk, where the file system allows it."""
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
def locked(path, wait_s=-1):
    """Hold the lock file `path` while the block runs; the lock dies with the process.

    wait_s: seconds to wait for another process, -1 for as long as it takes. Raises TimeoutError
    when that time is over, OSError where the file cannot be made. On a file system without locks
    the block runs unlocked.
    """
    lock = filelock.FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except NotImplementedError:
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def hold_folder(folder, wait_s=0):
    """Make a run's folder and hold it while the block runs: two runs in one folder would destroy
    each other's files.

    Waits `wait_s` seconds for another process to release it. Raises UserError.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", wait_s))
        except TimeoutError:
            raise UserError(f"{folder}: another process trains here; use another --out") from None
        except OSError as error:
            reason = error.strerror
            raise UserError(f"{folder}: cannot be the run's folder ({reason})") from None
        yield folder
