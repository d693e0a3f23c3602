"""Reads a growing `metrics.jsonl` on from where the last reading ended.

Only complete lines are read. Each reading begins with a check that what was read before is still
there: a run that starts again cuts its metrics back to its checkpoint, and a folder may be deleted
or moved between two readings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ffcv_ssl.errors import UserError
from ffcv_ssl.files import StrPath, check_kind
from ffcv_ssl.training.metrics_log import parse_line

_CHUNK_BYTES = 1 << 20
_MARK_BYTES = 4096  # a few lines: with the seconds in them, two runs never have equal ones
_MAX_LINE_BYTES = 1 << 24


class Tail:
    """The records of the file at `path`, each once.

    offset: bytes that were read. num_damaged: complete lines that are no record.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self.forget()

    def forget(self) -> None:
        """Begin again at the first byte."""
        self.offset = self.num_damaged = 0
        self._inode: int | None = None
        self._mark = b""  # the last bytes before the offset
        self._skips_line = False

    def holds(self) -> bool:
        """Whether the file still begins with all that was read."""
        if self._inode is None:
            return True
        try:
            with self._open() as file:
                state = os.fstat(file.fileno())
                file.seek(self.offset - len(self._mark))
                is_same = file.read(len(self._mark)) == self._mark
        except OSError:
            return False
        return is_same and state.st_ino == self._inode and state.st_size >= self.offset

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the lines that were completed since the last reading; nothing without a
        file. Raises UserError for a file that cannot be read, a pipe, a device or a folder."""
        try:
            check_kind(self.path)  # a reader of a pipe would wait
            file = self._open()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        with file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self.offset)
            yield from self._read_on(file)

    def _open(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def _read_on(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        rest = b""
        while chunk := file.read(_CHUNK_BYTES):
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            self._move_on(lines + newline)
            for line in lines.split(b"\n") if newline else ():
                if (record := self._record(line)) is not None:
                    yield record
            if len(rest) > _MAX_LINE_BYTES:  # it would fill the memory
                self._move_on(rest)
                self._skips_line, rest = True, b""

    def _move_on(self, done: bytes) -> None:
        self.offset += len(done)
        self._mark = (self._mark + done[-_MARK_BYTES:])[-_MARK_BYTES:]

    def _record(self, line: bytes) -> dict[str, Any] | None:
        record = None if self._skips_line else parse_line(line)
        self._skips_line = False
        self.num_damaged += record is None
        return record
