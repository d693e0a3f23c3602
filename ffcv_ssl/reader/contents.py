"""All that a `.beton` file holds apart from its payloads: read and checked once, then shared.

Opening a file checks everything that is used later: counts against the file's size, names and
arguments of fields, the allocation table, every pointer, every image's size, and the checksums of
all of these where the file has them. Damage gives a `BetonError` of one line; never a crash, a huge
allocation or a wrong image. Nothing is memory-mapped, so a file that is truncated while open gives
an error too.

A file of 14 million samples has 0.8 GB of tables. So all readers of a process share the contents of
a file, and the allocation table goes as soon as it is compared with the metadata.
"""

# N samples, R rows of the allocation table

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.errors import BetonError
from ffcv_ssl.fields import BUILT_IN
from ffcv_ssl.fields.base import ANY_SIZE, Field, first_true
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.reader.pread import Read, read_exactly
from ffcv_ssl.reader.rows import BLOCK, Rows

_SETTLED_S = 2.0
"""A file that changed less than this ago may change again without a new time of change, because
file systems keep coarse times: its contents are not shared."""

_open_contents: weakref.WeakValueDictionary[tuple, Contents] = weakref.WeakValueDictionary()


class Extents(NamedTuple):
    """Where the payloads of a field lie: uint64 (N,), one per sample. checksum: None in unverified
    files."""

    pointer: np.ndarray
    size: np.ndarray
    checksum: np.ndarray | None


def find_contents(
    path: str, fd: int, read: Read, custom_fields: Mapping[str, type[Field]]
) -> Contents:
    """The contents of an open file: those that another reader has, if the file is the same."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BetonError(f"{path}: not a regular file")
    changed = status.st_mtime_ns, status.st_ctime_ns
    key = (status.st_dev, status.st_ino, status.st_size, *changed, *sorted(custom_fields.items()))
    contents = _open_contents.get(key)
    if contents is None:
        # without a lock: two threads may both read, but a fork cannot inherit a lock held for ever
        contents = Contents(path, read, status.st_size, custom_fields)
        if max(changed) / 1e9 < time.time() - _SETTLED_S:
            _open_contents[key] = contents
    return contents


class Contents:
    """What the readers of a file share.

    Attributes: file_bytes, num_samples, page_size, fields (name -> Field, in file order),
    field_index, metadata (structured array (N,), read-only), extents (name -> Extents or None),
    verified, class_names, made, text (of the integrity section), regions, table_offset, table_hash,
    data_start, data_end, fingerprint; found: what readers have worked out from all this.
    """

    def __init__(
        self, path: str, read: Read, file_bytes: int, custom_fields: Mapping[str, type[Field]]
    ) -> None:
        self._path, self._read, self.file_bytes = path, read, file_bytes
        self.found: dict[str, Any] = {}
        self._read_header()
        self._read_fields(custom_fields)
        self._place_metadata()
        footer = self._find_footer()
        table = self._read_table()
        checksums = self._read_integrity(footer, table)
        self._check_rows(table)
        rows = Rows(table, checksums)
        del table
        self._refuse_overlaps(rows)
        self._read_metadata(footer)
        self.extents = {name: self._find_extents(name, rows) for name in self.fields}
        del rows
        for name in self.fields:
            self._check_field(name)
        self.fingerprint = self._fingerprint(checksums)
        self.metadata.flags.writeable = False
        del self._read  # it belongs to one of the readers

    def _exactly(self, size: int, offset: int, what: str) -> np.ndarray:
        return read_exactly(self._path, self._read, self.file_bytes, size, offset, what)

    def _read_header(self) -> None:
        self._header_raw = self._exactly(beton.HEADER_TYPE.itemsize, 0, "header")
        header = self._header_raw.view(beton.HEADER_TYPE)[0]
        if header["version"] != beton.VERSION:
            raise BetonError(
                f"{self._path}: format version {header['version']}, expected {beton.VERSION}; "
                "not a .beton file, or one whose writing was cut off"
            )
        self._num_fields = int(header["num_fields"])
        self.page_size = int(header["page_size"])
        self.num_samples = int(header["num_samples"])
        self.table_offset = int(header["alloc_table_ptr"])
        is_power = self.page_size & (self.page_size - 1) == 0
        if not is_power or not beton.MIN_PAGE_BYTES <= self.page_size <= beton.MAX_PAGE_BYTES:
            raise BetonError(
                f"{self._path}: page size {self.page_size} is impossible; damaged file"
            )
        if self._num_fields == 0 or self.num_samples == 0:
            raise BetonError(
                f"{self._path}: got {self._num_fields} fields and {self.num_samples} samples, "
                "expected at least 1 of each"
            )
        if self.table_offset > self.file_bytes:
            raise BetonError(
                f"{self._path}: allocation table at {self.table_offset}, the file has "
                f"{self.file_bytes} bytes; truncated, copy or write it again"
            )

    def _read_fields(self, custom_fields: Mapping[str, type[Field]]) -> None:
        regions = beton.layout(self._num_fields, 0, 0)
        size = regions.metadata - regions.descriptors
        self._descriptors_raw = self._exactly(size, regions.descriptors, "field descriptors")
        self.fields: dict[str, Field] = {}
        for index, descriptor in enumerate(self._descriptors_raw.view(beton.DESCRIPTOR_TYPE)):
            name = beton.unpack_name(self._path, index, descriptor["name"])
            if name in self.fields:
                raise BetonError(f"{self._path}: two fields are called '{name}'; damaged file")
            self.fields[name] = self._make_field(name, descriptor, custom_fields)
        self.field_index = {name: index for index, name in enumerate(self.fields)}

    def _make_field(
        self, name: str, descriptor: np.void, custom_fields: Mapping[str, type[Field]]
    ) -> Field:
        type_id = int(descriptor["type_id"])
        field_class = custom_fields.get(name) or BUILT_IN.get(type_id)
        if field_class is None:
            remedy = (
                f"name its class: custom_fields={{'{name}': ...}}"
                if type_id == beton.CUSTOM_TYPE_ID
                else "damaged file"
            )
            raise BetonError(f"{self._path}: field '{name}' has unknown type {type_id}; {remedy}")
        try:
            return field_class.from_binary(descriptor["arguments"])
        except ValueError as error:
            raise BetonError(f"{self._path}: field '{name}': {error}; damaged file") from None

    def _place_metadata(self) -> None:
        self._metadata_type = beton.metadata_type(self.fields.values())
        itemsize = self._metadata_type.itemsize
        self.regions = beton.layout(self._num_fields, self.num_samples, itemsize)
        if self.regions.metadata_end > self.table_offset:
            raise BetonError(
                f"{self._path}: {self.num_samples} samples need {self.regions.metadata_end} "
                f"bytes, the allocation table is at {self.table_offset}; truncated or damaged file"
            )
        size = self.file_bytes - self.table_offset
        if size % beton.ALLOC_ROW_TYPE.itemsize:
            raise BetonError(
                f"{self._path}: allocation table of {size} bytes is cut inside a row; "
                "truncated file"
            )

    def _find_footer(self) -> np.ndarray | None:
        start, end = self.regions.metadata_end, self.table_offset
        # all bytes or an error: a file that shrinks just now must not look like one of FFCV's
        locator_bytes = min(beton.LOCATOR_TYPE.itemsize, end - start)
        locator = self._exactly(locator_bytes, start, "locator").tobytes()
        footer_offset = max(end - beton.FOOTER_TYPE.itemsize, start)
        footer = self._exactly(end - footer_offset, footer_offset, "integrity footer").tobytes()
        return beton.find_footer(self._path, locator, footer, self.regions, end, self.file_bytes)

    def _read_table(self) -> np.ndarray:
        size = self.file_bytes - self.table_offset
        raw = self._exactly(size, self.table_offset, "allocation table")
        self.table_hash = xxh3_64(raw)
        return raw.view(beton.ALLOC_ROW_TYPE)

    def _read_integrity(self, footer: np.ndarray | None, table: np.ndarray) -> np.ndarray | None:
        """The checksums of the table's rows, uint64 (R,), or None in an unverified file."""
        self.verified = footer is not None
        self.class_names: dict[str, list[str]] = {}
        self.made: dict[str, Any] = {}
        self.text = b""
        self.data_start, self.data_end = self.regions.metadata_end, self.table_offset
        if footer is None:
            return None
        self.data_start = self.regions.locator_end
        self.data_end = int(footer["section_offset"][0])
        text_bytes = int(footer["text_bytes"][0])
        checksum_bytes = int(footer["num_rows"][0]) * beton.CHECKSUM_TYPE.itemsize
        text = self._exactly(text_bytes, self.data_end, "integrity section")
        checksums = self._exactly(checksum_bytes, self.data_end + text_bytes, "integrity section")
        self._check_hash(footer, "header", xxh3_64(self._header_raw))
        self._check_hash(footer, "descriptors", xxh3_64(self._descriptors_raw))
        self._check_hash(footer, "table", self.table_hash)
        self._check_hash(footer, "checksums", xxh3_64(checksums))
        self._check_hash(footer, "text", xxh3_64(text))
        self.text = text.tobytes()
        self.class_names, self.made = beton.unpack_text(self._path, self.text)
        return checksums.view(beton.CHECKSUM_TYPE)

    def _check_hash(self, footer: np.ndarray, name: str, got: int) -> None:
        if got != int(footer[f"{name}_hash"][0]):
            raise BetonError(
                f"{self._path}: checksum of the {name} does not match; altered, "
                "copy or write it again"
            )

    def _check_rows(self, table: np.ndarray) -> None:
        start, end = np.uint64(self.data_start), np.uint64(self.data_end)
        for begin in range(0, len(table), BLOCK):
            rows = table[begin : begin + BLOCK]
            pointer, size = rows["ptr"], rows["size"]
            # compare size with what is left behind the pointer: pointer + size can wrap around
            bad = (pointer < start) | (pointer > end)
            bad |= size > end - np.minimum(pointer, end)
            bad |= rows["sample_id"] >= self.num_samples
            row = first_true(bad)
            if row is not None:
                raise BetonError(
                    f"{self._path}: allocation {begin + row} is {int(size[row])} bytes at "
                    f"{int(pointer[row])} for sample {int(rows['sample_id'][row])}, "
                    "outside of the data; damaged file"
                )

    def _refuse_overlaps(self, rows: Rows) -> None:
        """Without overlaps, all payloads together are no larger than the file, and so is what a
        loader allocates for a batch of them."""
        found = rows.find_overlap()
        if found is not None:
            first, second = found
            raise BetonError(
                f"{self._path}: allocations {first} and {second} overlap: {rows.size[first]} bytes "
                f"at {rows.pointer[first]}, {rows.size[second]} at {rows.pointer[second]}; damaged "
                "file"
            )

    def _read_metadata(self, footer: np.ndarray | None) -> None:
        size = self.regions.metadata_end - self.regions.metadata
        raw = self._exactly(size, self.regions.metadata, "metadata")
        self._metadata_hash = xxh3_64(raw)
        if footer is not None:
            self._check_hash(footer, "metadata", self._metadata_hash)
        self.metadata = raw.view(self._metadata_type)

    def _column(self, name: str) -> np.ndarray:
        return self.metadata[f"f{self.field_index[name]}"]

    def _find_extents(self, name: str, rows: Rows) -> Extents | None:
        """Match a field's pointers with the table's rows."""
        column = self._column(name)
        pointer = self.fields[name].pointers(column)
        if pointer is None:
            return None
        is_simple = rows.are_samples(pointer)
        if is_simple and self._match_simple(name, column, rows):
            return Extents(rows.pointer, rows.size, rows.checksum)
        size = np.zeros(self.num_samples, np.uint64)
        # nothing is read for an empty payload, so its pointer is not checked and may be anything
        found = np.full(self.num_samples, self.data_start, np.uint64)
        checksum = None
        if rows.checksum is not None:
            checksum = np.full(self.num_samples, xxh3_64(b""), np.uint64)
        for begin in range(0, self.num_samples, BLOCK):
            expected = self._expected_sizes(name, column[begin : begin + BLOCK])
            # in FFCV's files an empty payload shares its pointer with the next one: skip empty ones
            sample = begin + np.flatnonzero(expected != 0)
            row, is_row = rows.find(pointer[sample])
            self._refuse(name, sample, ~is_row, "its pointer is not in the allocation table")
            size[sample] = rows.size[row]
            owner = rows.owner[row]
            self._refuse(
                name, sample, owner != sample, "its pointer points to another sample's data"
            )
            self._refuse_sizes(name, sample, expected[sample - begin], size[sample])
            if checksum is not None and rows.checksum is not None:
                checksum[sample] = rows.checksum[row]
            filled = sample[size[sample] != 0]
            found[filled] = pointer[filled]
        return Extents(found, size, checksum)

    def _match_simple(self, name: str, column: np.ndarray, rows: Rows) -> bool:
        """Whether row i belongs to sample i everywhere. Raises BetonError for a wrong size."""
        for begin in range(0, self.num_samples, BLOCK):
            expected = self._expected_sizes(name, column[begin : begin + BLOCK])
            if not expected.all():
                return False
            sample = np.arange(begin, begin + len(expected))
            self._refuse_sizes(name, sample, expected, rows.size[begin : begin + BLOCK])
        return True

    def _expected_sizes(self, name: str, column: np.ndarray) -> np.ndarray:
        expected = self.fields[name].expected_sizes(column)
        return np.full(len(column), ANY_SIZE) if expected is None else expected

    def _refuse_sizes(
        self, name: str, sample: np.ndarray, promised: np.ndarray, size: np.ndarray
    ) -> None:
        wrong = (promised != ANY_SIZE) & (promised != size)
        self._refuse(name, sample, wrong, "its size differs from that in the allocation table")

    def _refuse(self, name: str, sample: np.ndarray, bad: np.ndarray, reason: str) -> None:
        index = first_true(bad)
        if index is not None:
            self._bad_sample(sample[index], name, reason)

    def _bad_sample(self, sample: int, name: str, reason: str) -> None:
        where = f"{self._path}: sample {int(sample)}, field '{name}'"
        raise BetonError(f"{where}: {reason}; damaged file")

    def _check_field(self, name: str) -> None:
        extents = self.extents[name]
        sizes = None if extents is None else extents.size
        found = self.fields[name].find_bad_sample(self._column(name), sizes)
        if found is not None:
            self._bad_sample(found[0], name, found[1])

    def _fingerprint(self, checksums: np.ndarray | None) -> str:
        """Hash of the content. Pointers count only where there are no checksums of the data."""
        if checksums is None:
            hashes = [self._metadata_hash, self.table_hash]
        else:
            hashes = [self._hash_without_pointers(), xxh3_64(checksums)]
        parts = np.array([xxh3_64(self._descriptors_raw), *hashes], np.uint64)
        return f"{xxh3_64(parts):016x}"

    def _hash_without_pointers(self) -> int:
        """Hash of the metadata with zeros for pointers; they are put back, which takes less memory
        than a copy of everything."""
        kept = []
        for name in self.fields:
            pointer = self.fields[name].pointers(self._column(name))
            if pointer is not None:
                kept.append((pointer, pointer.copy()))
                pointer[...] = 0
        value = xxh3_64(self.metadata.view(np.uint8))
        for pointer, values in kept:
            pointer[...] = values
        return value
