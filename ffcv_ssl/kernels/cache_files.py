"""The files of cached kernels, each with a digest that is checked before anything is loaded.

numba keeps a function in two files, an index (.nbi) and the machine code (.nbc), both pickles, and
believes what it finds there: one flipped bit in the code ends the process at every start. Here each
file begins with a digest of its name and its content. A damaged file counts as missing, so its
kernel is compiled again, and the files are replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any, BinaryIO

from numba.core.caching import IndexDataCacheFile

from ffcv_ssl.kernels.cache_folders import is_trusted

_DIGEST_BYTES = 16


class CheckedCacheFile(IndexDataCacheFile):
    """numba's files of one function in one folder. What is damaged, or can be written by others
    than this user and root, is as if it were not there."""

    def __init__(self, cache_path: str, filename_base: str, source_stamp: str) -> None:
        super().__init__(cache_path, filename_base, source_stamp)
        self._checked: dict[str, bytes] = {}

    def is_sound(self) -> bool:
        """Whether both files are there and whole; they are kept in memory for the load that
        follows."""
        paths = self._index_path, self._data_path(self._data_name(1))
        found = {path: content for path in paths if (content := _read(path)) is not None}
        self._checked = found if len(found) == len(paths) else {}
        return bool(self._checked)

    def _content(self, path: str) -> bytes | None:
        checked = self._checked.pop(path, None)
        return _read(path) if checked is None else checked

    def _load_index(self) -> dict[Any, str]:
        content = self._content(self._index_path)
        if content is None:
            return {}
        stamp, overloads = pickle.loads(content)
        return overloads if stamp == self._source_stamp else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(self._dump((self._source_stamp, overloads)))

    def _load_data(self, name: str) -> Any:
        content = self._content(self._data_path(name))
        return None if content is None else pickle.loads(content)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[BinaryIO]:
        """Collect what is written; then write it with its digest, under another name first."""
        collected = io.BytesIO()
        yield collected
        content = collected.getvalue()
        with super()._open_for_write(filepath) as file:
            os.fchmod(file.fileno(), 0o644)  # not writable by others, whatever the umask
            file.write(_digest(filepath, content) + content)


def _read(path: str) -> bytes | None:
    """The content of a file of the cache; None where it is missing, damaged or not to be
    trusted."""
    try:
        with open(path, "rb") as file:
            if not is_trusted(os.fstat(file.fileno())):
                return None
            raw = file.read()
    except OSError:
        return None
    digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    return content if digest == _digest(path, content) else None


def _digest(path: str, content: bytes) -> bytes:
    """With the name in it, so that a file under another's name is not loaded either."""
    digest = hashlib.blake2b(os.path.basename(path).encode() + b"\0", digest_size=_DIGEST_BYTES)
    digest.update(content)
    return digest.digest()
