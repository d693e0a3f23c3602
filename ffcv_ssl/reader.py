"""`.beton` file -> validated samples.

Opening a file checks everything that is used later: counts against the file's size, names and
arguments of fields, the allocation table, every pointer, every image's size, and the checksums of
all of these where the file has them. A sample's bytes are checked when they are read. Damage gives
a `BetonError` of one line; never a crash, a huge allocation or a wrong image. Nothing is
memory-mapped, so a file that is truncated while open gives an error too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.errors import BetonError
from ffcv_ssl.fields import BUILT_IN
from ffcv_ssl.fields.base import ANY_SIZE, Field, first_true
from ffcv_ssl.files import StrPath
from ffcv_ssl.kernels.hash import xxh3_64

_MAX_READ_BYTES = 1 << 30  # Linux reads just under 2 GiB in one pread at most


class Extents(NamedTuple):
    """Where the payloads of a field lie: uint64 (N,), one per sample. checksum: None in unverified
    files."""

    pointer: np.ndarray
    size: np.ndarray
    checksum: np.ndarray | None


class Reader:
    """An open `.beton` file; usable from many threads at once, closed by `close()` or `with`.

    path: the file. custom_fields: name -> Field class, for fields that are not built in.
    Raises BetonError for a file that is not sound, OSError if it cannot be opened at all.

    Attributes: path, fd (read with os.pread), num_samples, page_size, fields (name -> Field, in
    file order; `handlers` is the same), field_names, metadata (structured array (N,), read-only),
    alloc_table, verified (the file has an integrity section, and it matches), class_names (field ->
    names), made (how the file was written), fingerprint (hexadecimal hash of the content, the same
    for any path; in verified files for any page size too).
    """

    def __init__(self, path: StrPath, custom_fields: Mapping[str, type[Field]] = {}) -> None:
        self.path = os.fspath(path)
        # O_NONBLOCK: opening a named pipe must not wait for a writer; regular files ignore it
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._open(custom_fields)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    @property
    def handlers(self) -> dict[str, Field]:
        """FFCV's name of `fields`."""
        return self.fields

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """The samples' file names, one per sample, or None; read and checked at first use."""
        place = beton.find_names(
            self.path, self._text, self._data_start, self._data_end, self.num_samples
        )
        if place is None:
            return None
        packed = self._exactly(place.packed_bytes, place.offset, "names")
        return beton.unpack_names(self.path, packed, place, self.num_samples)

    def field_metadata(self, name: str) -> np.ndarray:
        """The metadata column of a field: structured or plain array (N,), read-only."""
        return self.metadata[f"f{self._index(name)}"]

    def extents(self, name: str) -> Extents | None:
        """Where a field's payloads lie, or None if its values are in the metadata alone."""
        self._index(name)
        return self._extents[name]

    def read(self, sample: int, name: str) -> bytes:
        """A sample's payload (b"" for fields without payloads), checked against its size and
        checksum. Raises BetonError."""
        extents = self.extents(name)
        self._check_sample(sample)
        if extents is None:
            return b""
        payload = self._pread(int(extents.size[sample]), int(extents.pointer[sample]))
        if len(payload) != int(extents.size[sample]):
            raise BetonError(
                f"{self._place(sample, name)}: got {len(payload)} bytes, expected "
                f"{int(extents.size[sample])}; the file was truncated while open"
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
            return self._field_index[name]
        except KeyError:
            raise BetonError(
                f"{self.path}: no field '{name}'; it has {', '.join(self.field_names)}"
            ) from None

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < self.num_samples:
            raise IndexError(
                f"{self.path}: got sample {sample}, expected 0 to {self.num_samples - 1}"
            )

    # -- opening ----------------------------------------------------------------------------------

    def _open(self, custom_fields: Mapping[str, type[Field]]) -> None:
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise BetonError(f"{self.path}: not a regular file")
        self._file_bytes = status.st_size
        self._read_header()
        self._read_fields(custom_fields)
        self._read_metadata()
        self._read_table()
        self._read_integrity()
        self._check_rows()
        self._extents = {name: self._find_extents(name) for name in self.fields}
        for name in self.fields:
            self._check_field(name)
        self.fingerprint = self._fingerprint()

    def _read_header(self) -> None:
        self._header_raw = self._exactly(beton.HEADER_TYPE.itemsize, 0, "header")
        header = np.frombuffer(self._header_raw, beton.HEADER_TYPE)[0]
        if header["version"] != beton.VERSION:
            raise BetonError(
                f"{self.path}: format version {header['version']}, expected {beton.VERSION}; "
                "not a .beton file, or one whose writing was cut off"
            )
        self._num_fields = int(header["num_fields"])
        self.page_size = int(header["page_size"])
        self.num_samples = int(header["num_samples"])
        self._table_offset = int(header["alloc_table_ptr"])
        is_power = self.page_size & (self.page_size - 1) == 0
        if not is_power or not beton.MIN_PAGE_BYTES <= self.page_size <= beton.MAX_PAGE_BYTES:
            raise BetonError(f"{self.path}: page size {self.page_size} is impossible; damaged file")
        if self._num_fields == 0 or self.num_samples == 0:
            raise BetonError(
                f"{self.path}: got {self._num_fields} fields and {self.num_samples} samples, "
                "expected at least 1 of each"
            )
        if self._table_offset > self._file_bytes:
            raise BetonError(
                f"{self.path}: allocation table at {self._table_offset}, the file has "
                f"{self._file_bytes} bytes; truncated, copy or write it again"
            )

    def _read_fields(self, custom_fields: Mapping[str, type[Field]]) -> None:
        regions = beton.layout(self._num_fields, 0, 0)
        size = regions.metadata - regions.descriptors
        self._descriptors_raw = self._exactly(size, regions.descriptors, "field descriptors")
        descriptors = np.frombuffer(self._descriptors_raw, beton.DESCRIPTOR_TYPE)
        self.fields: dict[str, Field] = {}
        for index, descriptor in enumerate(descriptors):
            name = beton.unpack_name(self.path, index, descriptor["name"])
            if name in self.fields:
                raise BetonError(f"{self.path}: two fields are called '{name}'; damaged file")
            self.fields[name] = self._make_field(name, descriptor, custom_fields)
        self.field_names = list(self.fields)
        self._field_index = {name: index for index, name in enumerate(self.fields)}

    def _make_field(self, name, descriptor, custom_fields):
        type_id = int(descriptor["type_id"])
        field_class = custom_fields.get(name) or BUILT_IN.get(type_id)
        if field_class is None:
            remedy = (
                f"name its class: custom_fields={{'{name}': ...}}"
                if type_id == beton.CUSTOM_TYPE_ID
                else "damaged file"
            )
            raise BetonError(f"{self.path}: field '{name}' has unknown type {type_id}; {remedy}")
        try:
            return field_class.from_binary(descriptor["arguments"])
        except ValueError as error:
            raise BetonError(f"{self.path}: field '{name}': {error}; damaged file") from None

    def _read_metadata(self) -> None:
        dtype = beton.metadata_type(self.fields.values())
        self._regions = beton.layout(self._num_fields, self.num_samples, dtype.itemsize)
        if self._regions.metadata_end > self._table_offset:
            raise BetonError(
                f"{self.path}: {self.num_samples} samples need {self._regions.metadata_end} "
                f"bytes, the allocation table is at {self._table_offset}; truncated or damaged file"
            )
        size = self._regions.metadata_end - self._regions.metadata
        self._metadata_raw = self._exactly(size, self._regions.metadata, "metadata")
        self.metadata = np.frombuffer(self._metadata_raw, dtype)

    def _read_table(self) -> None:
        size = self._file_bytes - self._table_offset
        if size % beton.ALLOC_ROW_TYPE.itemsize:
            raise BetonError(
                f"{self.path}: allocation table of {size} bytes is cut inside a row; truncated file"
            )
        self._table_raw = self._exactly(size, self._table_offset, "allocation table")
        self.alloc_table = np.frombuffer(self._table_raw, beton.ALLOC_ROW_TYPE)

    def _read_integrity(self) -> None:
        footer = self._find_footer()
        self.verified = footer is not None
        self.class_names: dict[str, list[str]] = {}
        self.made: dict[str, Any] = {}
        self._checksums: np.ndarray | None = None
        self._text = b""
        self._data_start, self._data_end = self._regions.metadata_end, self._table_offset
        if footer is None:
            return
        self._data_start = self._regions.locator_end
        self._data_end = int(footer["section_offset"][0])
        text_bytes = int(footer["text_bytes"][0])
        checksum_bytes = int(footer["num_rows"][0]) * beton.CHECKSUM_TYPE.itemsize
        text = self._exactly(text_bytes, self._data_end, "integrity section")
        checksums = self._exactly(checksum_bytes, self._data_end + text_bytes, "integrity section")
        for name, raw in (
            ("header", self._header_raw),
            ("descriptors", self._descriptors_raw),
            ("metadata", self._metadata_raw),
            ("table", self._table_raw),
            ("checksums", checksums),
            ("text", text),
        ):
            if xxh3_64(raw) != int(footer[f"{name}_hash"][0]):
                raise BetonError(
                    f"{self.path}: checksum of the {name} does not match; altered, "
                    "copy or write it again"
                )
        self._checksums = np.frombuffer(checksums, beton.CHECKSUM_TYPE)
        self.class_names, self.made = beton.unpack_text(self.path, text)
        self._text = text

    def _find_footer(self) -> np.ndarray | None:
        start, end = self._regions.metadata_end, self._table_offset
        locator = self._pread(min(beton.LOCATOR_TYPE.itemsize, end - start), start)
        footer_offset = max(end - beton.FOOTER_TYPE.itemsize, start)
        footer = self._pread(end - footer_offset, footer_offset)
        return beton.find_footer(self.path, locator, footer, self._regions, end, self._file_bytes)

    def _check_rows(self) -> None:
        pointer, size = self.alloc_table["ptr"], self.alloc_table["size"]
        start, end = np.uint64(self._data_start), np.uint64(self._data_end)
        # compare size with what is left behind the pointer, because pointer + size can wrap around
        bad = (pointer < start) | (pointer > end)
        bad |= size > end - np.minimum(pointer, end)
        bad |= self.alloc_table["sample_id"] >= self.num_samples
        row = first_true(bad)
        if row is not None:
            raise BetonError(
                f"{self.path}: allocation {row} is {int(size[row])} bytes at "
                f"{int(pointer[row])} for sample {int(self.alloc_table['sample_id'][row])}, "
                "outside of the data; damaged file"
            )
        self._by_pointer: np.ndarray | None = None
        if len(pointer) > 1 and not np.all(pointer[1:] > pointer[:-1]):
            # FFCV gives an empty payload the pointer of the next one: sort the longest row last
            self._by_pointer = np.lexsort((size, pointer))

    def _find_extents(self, name: str) -> Extents | None:
        """Match a field's pointers with the table's rows, all samples at once."""
        field, column = self.fields[name], self.field_metadata(name)
        pointer = field.pointers(column)
        if pointer is None:
            return None
        expected = field.expected_sizes(column)
        if expected is None:
            expected = np.full(self.num_samples, ANY_SIZE)
        # in FFCV's files an empty payload shares its pointer with the next one: skip empty ones
        sample = np.flatnonzero(expected != 0)
        row = self._rows_at(name, sample, pointer[sample])
        owner, promised = self.alloc_table["sample_id"][row], expected[sample]
        size = np.zeros(self.num_samples, np.uint64)
        size[sample] = self.alloc_table["size"][row]
        self._refuse(name, sample, owner != sample, "its pointer points to another sample's data")
        wrong_size = (promised != ANY_SIZE) & (promised != size[sample])
        self._refuse(name, sample, wrong_size, "its size differs from that in the allocation table")
        checksum = None
        if self._checksums is not None:
            checksum = np.full(self.num_samples, xxh3_64(b""), np.uint64)
            checksum[sample] = self._checksums[row]
        # nothing is read for an empty payload, so its pointer was not checked and may be anything
        pointer = np.where(size == 0, np.uint64(self._data_start), pointer)
        return Extents(pointer, size, checksum)

    def _rows_at(self, name, sample, pointer):
        """Indices of the table's rows that begin at these pointers. Where several rows begin at one
        pointer, the longest of them."""
        starts = self.alloc_table["ptr"]
        if self._by_pointer is not None:
            starts = starts[self._by_pointer]
        position = np.searchsorted(starts, pointer, side="right") - 1
        found = position >= 0
        if len(starts):
            found &= starts[np.maximum(position, 0)] == pointer
        self._refuse(name, sample, ~found, "its pointer is not in the allocation table")
        return position if self._by_pointer is None else self._by_pointer[position]

    def _refuse(self, name, sample, bad, reason):
        index = first_true(bad)
        if index is not None:
            raise BetonError(f"{self._place(sample[index], name)}: {reason}; damaged file")

    def _check_field(self, name: str) -> None:
        extents = self._extents[name]
        sizes = None if extents is None else extents.size
        found = self.fields[name].find_bad_sample(self.field_metadata(name), sizes)
        if found is not None:
            index, reason = found
            raise BetonError(f"{self._place(index, name)}: {reason}; damaged file")

    def _fingerprint(self) -> str:
        """Hash of the content. Pointers count only where there are no checksums of the data."""
        parts: list[bytes | np.ndarray] = [self._descriptors_raw]
        if self._checksums is None:
            parts += [self._metadata_raw, self._table_raw]
        else:
            content = np.frombuffer(bytearray(self._metadata_raw), self.metadata.dtype)
            for name, index in self._field_index.items():
                pointer = self.fields[name].pointers(content[f"f{index}"])
                if pointer is not None:
                    pointer[...] = 0
            parts += [content.view(np.uint8), self._checksums.tobytes()]
        hashes = np.array([xxh3_64(part) for part in parts], np.uint64)
        return f"{xxh3_64(hashes.tobytes()):016x}"

    # -- reading ----------------------------------------------------------------------------------

    def _pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        parts: list[bytes] = []
        got = 0
        try:
            while got < size and (not parts or parts[-1]):
                parts.append(os.pread(self.fd, min(size - got, _MAX_READ_BYTES), offset + got))
                got += len(parts[-1])
        except OSError as error:
            raise BetonError(
                f"{self.path}: reading {size} bytes at {offset} failed ({error.strerror})"
            ) from None
        return b"".join(parts)

    def _exactly(self, size: int, offset: int, what: str) -> bytes:
        # compare with the file's size before anything of this size is allocated
        if size > self._file_bytes - offset:
            raise BetonError(
                f"{self.path}: {what} needs {size} bytes at {offset}, the file has "
                f"{self._file_bytes}; truncated or damaged file"
            )
        raw = self._pread(size, offset)
        if len(raw) != size:
            raise BetonError(
                f"{self.path}: {what} ends after {len(raw)} of {size} bytes; truncated"
            )
        return raw
