"""Files and folders of others, read with care: nothing that a folder holds can block a reader, fill
its memory, or be counted many times unnoticed.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from ffcv_ssl.errors import SourceError
from ffcv_ssl.files import StrPath, kind_of

# Far above any image that the format holds as a file (2^28 pixels), and far below memory.
MAX_FILE_BYTES = 1 << 30


def read_file(path: StrPath, max_bytes: int | None = None, may_be_pipe: bool = False) -> bytes:
    """The bytes of a regular file, or of what a link points to.

    max_bytes: default MAX_FILE_BYTES. may_be_pipe: also read a pipe, such as a shell's `<(...)`; a
    pipe that nobody writes to is empty. Raises SourceError for devices, folders, sockets, for a
    file that is too large or changes while it is read; OSError where it cannot be read.
    """
    max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
    _check_kind(path, os.stat(path), may_be_pipe)  # opening a socket has an error of its own
    # Not blocking: the file could be replaced by a pipe at this moment, and be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        _check_kind(path, status, may_be_pipe)
        os.set_blocking(descriptor, True)  # a pipe's writer may need time
        if status.st_size > max_bytes:
            raise SourceError(
                f"{path}: got a file of {status.st_size} bytes, expected at most {max_bytes}"
            )
        data = _read(file, max_bytes, status.st_size)
    if len(data) > max_bytes:
        raise SourceError(f"{path}: got more than {max_bytes} bytes, expected at most that many")
    if status.st_size and len(data) != status.st_size:  # 0: a pipe, or a file that the system makes
        change = "shorter" if len(data) < status.st_size else "longer"
        raise SourceError(
            f"{path}: got {len(data)} of {status.st_size} bytes, the file became {change} while it "
            "was read; write again once it no longer changes"
        )
    return data


def _read(file: FileIO, max_bytes: int, expected_bytes: int) -> bytes:
    """All bytes up to the file's end, but no more than max_bytes + 1."""
    data = bytearray(file.read(min(max_bytes, expected_bytes) + 1))
    while len(data) <= max_bytes and (piece := file.read(min(1 << 20, max_bytes + 1 - len(data)))):
        data += piece
    return bytes(data)


def _check_kind(path: StrPath, status: os.stat_result, may_be_pipe: bool = False) -> None:
    kind = kind_of(status.st_mode)
    if kind is not None and not (may_be_pipe and stat.S_ISFIFO(status.st_mode)):
        raise SourceError(f"{path}: is {kind}, expected a regular file; remove or rename it")


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted. Raises SourceError."""
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


class ListedFile(NamedTuple):
    """A file below a folder."""

    name: str  # path relative to the folder, with `/`
    inode: int  # of the file itself, or of the file that a link points to; 0 if there is none
    is_link: bool


def find_files(
    folder: Path, is_wanted: Callable[[str], bool], with_hidden: bool = False
) -> list[ListedFile]:
    """All files under `folder`, also through links to folders, sorted by the parts of their paths.

    is_wanted: says by a name whether a file counts. with_hidden: do not skip hidden files and
    folders. Raises SourceError for a folder that cannot be read, for a folder that is reached twice
    by links, and for a wanted name that is a device, a pipe or a socket. A link to nothing is
    listed.
    """
    root = os.path.realpath(folder)
    seen: dict[tuple[int, int], str] = {}
    files: list[ListedFile] = []
    pending = [""]
    while pending:
        place = pending.pop()
        _check_first_visit(folder, place, root, seen)
        for entry in _entries(folder / place, with_hidden):
            name = f"{place}/{entry.name}" if place else entry.name
            if _is_folder(entry):
                pending.append(name)
            elif is_wanted(entry.name):
                files.append(_listed(name, entry))
    return sorted(files, key=lambda file: file.name.split("/"))


def _check_first_visit(
    folder: Path, place: str, root: str, seen: dict[tuple[int, int], str]
) -> None:
    """Raise SourceError for a folder that links lead to again, or that holds the whole source."""
    path = folder / place
    try:
        status, real = os.stat(path), os.path.realpath(path)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    former = seen.setdefault((status.st_dev, status.st_ino), place)
    if place and os.path.commonpath([real, root]) == real:
        former = ""  # at once, and not when the walk comes by: it would go through all of a disk
    if former != place:
        raise SourceError(
            f"{path}: leads by a link to the folder {folder / former} again, so that its images "
            "would count several times; remove the link"
        )


def _entries(folder: Path, with_hidden: bool = False) -> list[os.DirEntry[str]]:
    """What is in a folder; without `with_hidden` what is not hidden. Raises SourceError."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if with_hidden or not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, or to a place that may not be looked up
        raise SourceError(f"{entry.path}: {error.strerror}; remove or rename it") from None


def _listed(name: str, entry: os.DirEntry[str]) -> ListedFile:
    if entry.is_file(follow_symlinks=False):
        return ListedFile(name, entry.inode(), False)
    try:
        status = os.stat(entry.path)
    except FileNotFoundError:
        return ListedFile(name, 0, True)  # an error when it is read, which it need not be
    except OSError as error:
        raise SourceError(f"{entry.path}: {error.strerror}; remove or rename it") from None
    _check_kind(entry.path, status)
    return ListedFile(name, status.st_ino, entry.is_symlink())


def find_hard_links(folder: Path, files: Iterable[ListedFile]) -> list[tuple[str, str]]:
    """[(name, earlier name)] of files that are an earlier file here too, by hard links.

    They may stay: in a copy of the folder they are files of their own. Raises SourceError for a
    file that is here a second time by a symbolic link.
    """
    files = list(files)
    first: dict[tuple[int, int], ListedFile] = {}
    again = []
    for file in _maybe_again(files):
        try:
            status = os.stat(folder / file.name)
        except OSError:  # gone meanwhile: an error when it is read, which it need not be
            continue
        former = first.setdefault((status.st_dev, status.st_ino), file)
        if former is file:
            continue
        if former.is_link or file.is_link:
            link, other = (file, former) if file.is_link else (former, file)
            raise SourceError(
                f"{folder / link.name}: leads by a link to the file of {folder / other.name}, so "
                "that this image would count twice; remove one of them"
            )
        again.append((file.name, former.name))
    return again


def _maybe_again(files: list[ListedFile]) -> list[ListedFile]:
    """The files to compare: those whose inode numbers are not alone. With links to files it is all
    of them, as some file systems list other numbers than those of the files."""
    if any(file.is_link for file in files):
        return [file for file in files if file.inode]
    count = Counter(file.inode for file in files)
    return [file for file in files if count[file.inode] > 1]
