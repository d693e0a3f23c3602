"""`Reader`: an open `.beton` file.

Opening checks all tables (see contents.py). A sample's bytes are checked when they are read: damage
gives a `BetonError` of one line, never a wrong image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.errors import BetonError
from ffcv_ssl.fields.base import Field
from ffcv_ssl.files import StrPath
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.reader.contents import Extents, find_contents
from ffcv_ssl.reader.pread import read_exactly, read_upto


class Reader:
    """An open `.beton` file; usable from many threads at once, closed by `close()` or `with`.

    path: the file. custom_fields: name -> Field class, for fields that are not built in.
    Raises BetonError for a file that is not sound, OSError if it cannot be opened at all.

    Each reader has a descriptor of its own; the tables are shared with the other readers of the
    same file. A copy, or what is unpickled, opens the path again (BetonError if the file changed).

    Attributes: path, fd (read with os.pread), num_samples, page_size, fields (name -> Field, in
    file order; `handlers` is the same), field_names, metadata (structured array (N,), read-only),
    verified (the file has an integrity section, and it matches), class_names (field -> names), made
    (how the file was written), fingerprint (hexadecimal hash of the content, the same for any path;
    in verified files for any page size too).
    """

    fd = -1

    def __init__(self, path: StrPath, custom_fields: Mapping[str, type[Field]] = {}) -> None:
        self.path = os.fspath(path)
        self._absolute_path = os.path.abspath(self.path)
        self._custom_fields = dict(custom_fields)
        # O_NONBLOCK: opening a named pipe must not wait for a writer; regular files ignore it
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            contents = find_contents(self.path, self.fd, self._pread, self._custom_fields)
        except BaseException:
            self.close()
            raise
        self._contents = contents
        self.num_samples, self.page_size = contents.num_samples, contents.page_size
        self.fields, self.field_names = contents.fields, list(contents.fields)
        self.metadata, self.fingerprint = contents.metadata, contents.fingerprint
        self.verified = contents.verified
        self.class_names, self.made = contents.class_names, contents.made
        self._regions, self._table_offset = contents.regions, contents.table_offset
        self._text = contents.text
        self._data_start, self._data_end = contents.data_start, contents.data_end

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        """For copy and pickle. A descriptor's number would belong to another file there, and so
        may a path that is relative to a folder."""
        path = self._absolute_path
        return _open_again, (type(self), path, self._custom_fields, self.fingerprint)

    @property
    def handlers(self) -> dict[str, Field]:
        """FFCV's name of `fields`."""
        return self.fields

    @property
    def alloc_table(self) -> np.ndarray:
        """The allocation table, beton.ALLOC_ROW_TYPE (R,), read anew: it is not kept."""
        size = self._contents.file_bytes - self._table_offset
        raw = self._exactly(size, self._table_offset, "allocation table")
        if xxh3_64(raw) != self._contents.table_hash:
            raise BetonError(f"{self.path}: the allocation table was altered while open")
        return raw.view(beton.ALLOC_ROW_TYPE)

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """The samples' file names, one per sample, or None; read and checked at first use."""
        place = beton.find_names(
            self.path, self._text, self._data_start, self._data_end, self.num_samples
        )
        if place is None:
            return None
        packed = self._exactly(place.packed_bytes, place.offset, "names").tobytes()
        return beton.unpack_names(self.path, packed, place, self.num_samples)

    def field_metadata(self, name: str) -> np.ndarray:
        """The metadata column of a field: structured or plain array (N,), read-only."""
        return self.metadata[f"f{self._index(name)}"]

    def extents(self, name: str) -> Extents | None:
        """Where a field's payloads lie, or None if its values are in the metadata alone."""
        self._index(name)
        return self._contents.extents[name]

    def once(self, what: str, find: Callable[[], Any]) -> Any:
        """`find()`, worked out once for all readers of the file. what: its name; the value must
        depend on the file alone, and nobody may change it."""
        found = self._contents.found
        if what not in found:
            found[what] = find()
        return found[what]

    def read(self, sample: int, name: str) -> bytes:
        """A sample's payload (b"" for fields without payloads), checked against its size and
        checksum. Raises BetonError."""
        extents = self.extents(name)
        self._check_sample(sample)
        if extents is None:
            return b""
        size, offset = int(extents.size[sample]), int(extents.pointer[sample])
        payload = self._pread(size, offset).tobytes()
        if len(payload) != size:
            raise BetonError(
                f"{self._place(sample, name)}: got {len(payload)} bytes, expected "
                f"{size}; the file was truncated while open"
            )
        if extents.checksum is not None and xxh3_64(payload) != int(extents.checksum[sample]):
            raise BetonError(
                f"{self._place(sample, name)}: checksum does not match; re-write it, or load with "
                "on_error='replace'"
            )
        return payload

    def decode(self, sample: int, name: str) -> Any:
        """A sample's value: image uint8 (H, W, 3), int, float, bytes, array, tensor or JSON. Raises
        BetonError."""
        payload = self.read(sample, name)
        try:
            return self.fields[name].decode(self.field_metadata(name)[sample], payload)
        except ValueError as error:
            raise BetonError(
                f"{self._place(sample, name)}: {error}; re-write it, or load with "
                "on_error='replace'"
            ) from None

    def _place(self, sample: int, name: str) -> str:
        return f"{self.path}: sample {int(sample)}, field '{name}'"

    def _index(self, name: str) -> int:
        try:
            return self._contents.field_index[name]
        except KeyError:
            raise BetonError(
                f"{self.path}: no field '{name}'; it has {', '.join(self.field_names)}"
            ) from None

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < self.num_samples:
            raise IndexError(
                f"{self.path}: got sample {sample}, expected 0 to {self.num_samples - 1}"
            )

    def _pread(self, size: int, offset: int) -> np.ndarray:
        """Up to `size` bytes, uint8; fewer only at the end of the file."""
        return read_upto(self.path, self.fd, size, offset)

    def _exactly(self, size: int, offset: int, what: str) -> np.ndarray:
        return read_exactly(self.path, self._pread, self._contents.file_bytes, size, offset, what)


def _open_again(
    reader_class: type[Reader], path: str, custom_fields: dict, fingerprint: str
) -> Reader:
    reader = reader_class(path, custom_fields)
    if reader.fingerprint != fingerprint:
        reader.close()
        raise BetonError(
            f"{path}: got content {reader.fingerprint[:8]}.., expected {fingerprint[:8]}.., that "
            "of the reader that was copied; the file was replaced, open it anew"
        )
    return reader
