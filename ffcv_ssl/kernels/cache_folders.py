"""Which folders kernels are loaded from, and which one they are written to.

In this order: `$FFCV_SSL_CACHE`, `$XDG_CACHE_HOME/ffcv_ssl` (else `~/.cache/ffcv_ssl`), and a
folder of this user in the temporary folder. Kernels are written to the first that can be written
to, and loaded from that one and from those before it. So the complete cache of a container image
serves although it is read-only, and what is missing or damaged there is compiled once, into the
next folder.

Cached kernels are pickles and machine code: who writes them runs code here. A folder or file that
others than this user and root can write to is not used. A default folder of this user's own is
closed to others instead: earlier versions made it as a lax umask said. Nothing is written
elsewhere, and no environment variable is set.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import tempfile

_log = logging.getLogger(__name__)


@functools.cache
def cache_folders(name: str) -> tuple[str, ...]:
    """The folders `name` to load from, in order; the last of them is the one to write to."""
    refused: list[str] = []
    folders: list[str] = []
    for root, mode in _wanted_roots():
        folder = os.path.join(root, name)
        is_writable = _is_writable(root, mode)  # first, because it makes what is checked next
        if root != _named_root():  # a folder that was named may be shared on purpose: it is refused
            _close_to_others(root)
            _close_to_others(folder)
        reason = _reason_to_refuse(root) or _reason_to_refuse(folder)
        if reason is not None:
            refused.append(reason)
        elif is_writable and (not os.path.isdir(folder) or _is_writable(folder)):
            folders.append(folder)
            break
        elif os.path.isdir(folder):
            folders.append(folder)
    else:
        folders.append(os.path.join(tempfile.mkdtemp(prefix="ffcv_ssl-"), name))
    for text in refused:
        _log.warning("%s; no kernels are loaded from it, %s is used", text, folders[-1])
    return tuple(folders)


def _wanted_roots() -> list[tuple[str, int]]:
    """[(folder, its mode if it has to be made)]."""
    named = _named_root()
    wanted = [(named, 0o755)] if named else []
    user = os.path.expanduser("~")  # "~" itself for a user without a home
    home = os.environ.get("XDG_CACHE_HOME") or (os.path.isabs(user) and f"{user}/.cache")
    if home:
        wanted.append((os.path.abspath(os.path.join(home, "ffcv_ssl")), 0o755))
    temporary = os.path.join(tempfile.gettempdir(), f"ffcv_ssl-{os.geteuid()}")
    return [*wanted, (temporary, 0o700)]


def _named_root() -> str | None:
    named = os.environ.get("FFCV_SSL_CACHE")
    return os.path.abspath(named) if named else None


def _close_to_others(folder: str) -> None:
    """Take the right to write from others, where the folder is this user's and no link. What they
    may have put there is of another owner or writable for others, and so is not loaded."""
    with contextlib.suppress(OSError):
        status = os.lstat(folder)
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if is_ours and not is_trusted(status):
            os.chmod(folder, stat.S_IMODE(status.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def _reason_to_refuse(folder: str) -> str | None:
    """Why an existing folder is not used, or None."""
    try:
        status = os.stat(folder)
        link_owner = os.lstat(folder).st_uid  # another user's link may lead to a folder of ours
    except OSError:
        return None
    if is_trusted(status) and link_owner in (0, os.geteuid()):
        return None
    return (
        f"{folder}: mode {stat.S_IMODE(status.st_mode):o} of user {status.st_uid} lets others "
        "write kernels, expected a folder that only you (or root) can write to; chmod go-w it, or "
        "name another in FFCV_SSL_CACHE"
    )


def is_trusted(status: os.stat_result) -> bool:
    """Whether only this user and root can write to a file or folder."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_writable(folder: str, mode: int = 0o755) -> bool:
    try:
        make_folder(folder, mode)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def make_folder(folder: str, mode: int = 0o755) -> None:
    """Make a folder that others cannot write to, whatever the umask. Raises OSError."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    try:
        os.mkdir(folder, mode)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
