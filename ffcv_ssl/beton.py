"""The bytes of a `.beton` file, version 2: every dtype, offset and magic number there is.

    header, descriptors, metadata, locator | pages of data | names, integrity section, table

The header, descriptors, metadata, data and allocation table are those of FFCV 1.0.2, which reads
our files as its own. This library adds the locator (right after the metadata), the samples' file
names (if there are any) and the integrity section. The section ends in a fixed footer exactly where
the allocation table begins. FFCV follows pointers only, and reads the table to the end of the file,
so it never sees these additions. Locator and section are either both present and good, or both
absent (a file that FFCV wrote); anything else is damage.

All integers are little-endian. Sizes and offsets are in bytes. docs/format.md has the same in
prose.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffcv_ssl.errors import BetonError
from ffcv_ssl.kernels.hash import xxh3_64

VERSION = 2
INTEGRITY_VERSION = 1
MIN_PAGE_BYTES = 1 << 21
MAX_PAGE_BYTES = 1 << 31  # the largest power of two that the header's uint32 holds
MAX_NAME_BYTES = 16
CUSTOM_TYPE_ID = 255
MAX_IMAGE_PX = 1 << 28  # 16,384 px squared; a hostile header cannot ask for more than 805 MB
# Limits of the text of all names, so that a hostile file cannot ask for more memory. A Linux path
# holds 4,096 bytes.
MAX_NAMES_BYTES, MAX_NAMES_BYTES_PER_SAMPLE = 1 << 30, 4096

HEADER_TYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
ARG_TYPE = np.dtype([("", "<u1", 1024)])  # FFCV's name: what Field.to_binary returns
DESCRIPTOR_TYPE = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", (MAX_NAME_BYTES,)), ("arguments", "<u1", (1024,))]
)
ALLOC_ROW_TYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

# What the fields keep beside each sample, and in their descriptor's arguments.
IMAGE_METADATA_TYPE = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
)
IMAGE_MODE_JPG, IMAGE_MODE_RAW = 0, 1
BYTES_METADATA_TYPE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
NDARRAY_ARGUMENTS_TYPE = np.dtype([("shape", "<u8", (32,)), ("type_length", "<u8")])

LOCATOR_MAGIC = b"FFCV-SSL:locator"
FOOTER_MAGIC = b"FFCV-SSL:footer."
LOCATOR_TYPE = np.dtype(
    [
        ("magic", "S16"),
        ("version", "<u8"),
        ("section_offset", "<u8"),
        ("table_offset", "<u8"),
        ("file_bytes", "<u8"),
        ("footer_hash", "<u8"),  # binds this locator to one footer
        ("own_hash", "<u8"),
    ]
)
FOOTER_TYPE = np.dtype(
    [
        ("magic", "S16"),
        ("version", "<u8"),
        ("locator_offset", "<u8"),
        ("section_offset", "<u8"),
        ("table_offset", "<u8"),
        ("num_rows", "<u8"),
        ("text_bytes", "<u8"),
        ("header_hash", "<u8"),
        ("descriptors_hash", "<u8"),
        ("metadata_hash", "<u8"),
        ("table_hash", "<u8"),
        ("checksums_hash", "<u8"),
        ("text_hash", "<u8"),
        ("own_hash", "<u8"),
    ]
)
CHECKSUM_TYPE = np.dtype("<u8")


class Layout(NamedTuple):
    """Where the regions before the data lie, in bytes from the start of the file."""

    descriptors: int
    metadata: int
    metadata_end: int  # the locator is here, if there is one

    @property
    def locator_end(self) -> int:
        return self.metadata_end + LOCATOR_TYPE.itemsize


def layout(num_fields: int, num_samples: int, metadata_itemsize: int) -> Layout:
    """The regions of a file with these counts, in Python integers, which hostile counts cannot
    overflow.
    """
    descriptors = HEADER_TYPE.itemsize
    metadata = descriptors + int(num_fields) * DESCRIPTOR_TYPE.itemsize
    return Layout(descriptors, metadata, metadata + int(num_samples) * int(metadata_itemsize))


def metadata_type(fields: Iterable[Any]) -> np.dtype:
    """The structured dtype of one sample's metadata: columns f0, f1, ..., aligned like FFCV's."""
    return np.dtype([("", field.metadata_type) for field in fields], align=True)


def pack_header(num_fields: int, page_size: int, num_samples: int, table_offset: int) -> bytes:
    """The file's first bytes."""
    header = np.zeros(1, HEADER_TYPE)
    header[0] = (VERSION, num_fields, page_size, num_samples, table_offset)
    return header.tobytes()


def pack_descriptor(type_id: int, name: str, arguments: np.ndarray | np.void) -> bytes:
    """A field's descriptor. arguments: what the field's `to_binary` returns, an ARG_TYPE item."""
    raw_name = np.frombuffer(checked_name(name), np.uint8)
    descriptor = np.zeros(1, DESCRIPTOR_TYPE)
    descriptor["type_id"] = type_id
    descriptor["name"][0, : len(raw_name)] = raw_name
    descriptor["arguments"][0] = np.frombuffer(np.asarray(arguments).tobytes(), np.uint8)
    return descriptor.tobytes()


def checked_name(name: str) -> bytes:
    """A field's name as it is stored. Raises ValueError for a name that is empty, longer than 16
    bytes (FFCV would cut it) or not printable ASCII.
    """
    try:
        raw = name.encode("ascii")
    except (UnicodeEncodeError, AttributeError):
        raise ValueError(f"field name {name!r}: expected ASCII text") from None
    if not 0 < len(raw) <= MAX_NAME_BYTES or not name.isprintable():
        raise ValueError(
            f"field name {name!r}: got {len(raw)} bytes, expected 1 to {MAX_NAME_BYTES} printable "
            "ones; choose another name"
        )
    return raw


def unpack_name(path: str, index: int, raw: np.ndarray) -> str:
    """The name of field `index`. raw: uint8 (16,), null-terminated."""
    text = raw.tobytes().split(b"\0")[0]
    if not text or not all(32 <= byte < 127 for byte in text):
        raise BetonError(f"{path}: field {index}: name {text!r} is not ASCII text; damaged file")
    return text.decode("ascii")


def _seal(record: np.ndarray) -> bytes:
    """The bytes of a record after its last field, `own_hash`, is set to the hash of the others."""
    record["own_hash"] = xxh3_64(record.tobytes()[: -CHECKSUM_TYPE.itemsize])
    return record.tobytes()


def _is_sealed(record: np.ndarray) -> bool:
    return int(record["own_hash"][0]) == xxh3_64(record.tobytes()[: -CHECKSUM_TYPE.itemsize])


def pack_integrity(
    regions: Layout,
    section_offset: int,
    table_offset: int,
    text: bytes,
    checksums: np.ndarray,
    parts: Mapping[str, bytes],
) -> tuple[bytes, bytes]:
    """Build the integrity section of a finished file: (locator bytes, section bytes).

    The section fills section_offset .. table_offset exactly. text: JSON. checksums: uint64 (rows,),
    xxh3-64 of each allocation in the order of the table. parts: the bytes of "header",
    "descriptors", "metadata" and "table".
    """
    checksums = np.ascontiguousarray(checksums, CHECKSUM_TYPE)
    footer = np.zeros(1, FOOTER_TYPE)
    footer["magic"], footer["version"] = FOOTER_MAGIC, INTEGRITY_VERSION
    footer["locator_offset"] = regions.metadata_end
    footer["section_offset"], footer["table_offset"] = section_offset, table_offset
    footer["num_rows"], footer["text_bytes"] = len(checksums), len(text)
    for name in ("header", "descriptors", "metadata", "table"):
        footer[f"{name}_hash"] = xxh3_64(parts[name])
    footer["checksums_hash"] = xxh3_64(checksums.view(np.uint8))
    footer["text_hash"] = xxh3_64(text)
    sealed_footer = _seal(footer)

    locator = np.zeros(1, LOCATOR_TYPE)
    locator["magic"], locator["version"] = LOCATOR_MAGIC, INTEGRITY_VERSION
    locator["section_offset"], locator["table_offset"] = section_offset, table_offset
    locator["file_bytes"] = table_offset + len(checksums) * ALLOC_ROW_TYPE.itemsize
    locator["footer_hash"] = footer["own_hash"]
    return _seal(locator), text + checksums.tobytes() + sealed_footer


def section_bytes(text: bytes, num_rows: int) -> int:
    """Size of the integrity section."""
    return len(text) + num_rows * CHECKSUM_TYPE.itemsize + FOOTER_TYPE.itemsize


def find_footer(
    path: str,
    locator_raw: bytes,
    footer_raw: bytes,
    regions: Layout,
    table_offset: int,
    file_bytes: int,
) -> np.ndarray | None:
    """The footer record (1,) of a file of this library, or None for a file that has neither locator
    nor footer.

    locator_raw, footer_raw: the bytes at the two fixed places, fewer where the file has no room for
    them. Raises BetonError if only one of the two is there, or if they contradict each other or the
    file.
    """
    has_locator = locator_raw[: len(LOCATOR_MAGIC)] == LOCATOR_MAGIC
    has_footer = footer_raw[: len(FOOTER_MAGIC)] == FOOTER_MAGIC
    if not has_locator and not has_footer:
        return None
    if not (has_locator and has_footer):
        missing = "footer" if has_locator else "locator"
        raise BetonError(
            f"{path}: integrity {missing} is missing; truncated or altered, re-write it"
        )
    if len(locator_raw) != LOCATOR_TYPE.itemsize or len(footer_raw) != FOOTER_TYPE.itemsize:
        raise BetonError(f"{path}: integrity section is cut short; truncated file, re-write it")
    locator = np.frombuffer(locator_raw, LOCATOR_TYPE)
    footer = np.frombuffer(footer_raw, FOOTER_TYPE)
    if not _is_sealed(locator) or not _is_sealed(footer):
        raise BetonError(
            f"{path}: integrity section does not match its checksum; re-write the file"
        )
    if int(footer["version"][0]) != INTEGRITY_VERSION:
        raise BetonError(
            f"{path}: integrity section has version {int(footer['version'][0])}, expected "
            f"{INTEGRITY_VERSION}; update ffcv-ssl"
        )
    _check_agreement(path, locator, footer, regions, table_offset, file_bytes)
    return footer


def _check_agreement(
    path: str,
    locator: np.ndarray,
    footer: np.ndarray,
    regions: Layout,
    table_offset: int,
    file_bytes: int,
) -> None:
    def number(record: np.ndarray, name: str) -> int:
        return int(record[name][0])

    num_rows, section = number(footer, "num_rows"), number(footer, "section_offset")
    checksum_bytes = num_rows * CHECKSUM_TYPE.itemsize
    section_end = section + number(footer, "text_bytes") + checksum_bytes + FOOTER_TYPE.itemsize
    rows_end = table_offset + num_rows * ALLOC_ROW_TYPE.itemsize
    for what, got, expected in (
        ("locator and footer", number(locator, "footer_hash"), number(footer, "own_hash")),
        ("offset of the integrity section", number(locator, "section_offset"), section),
        ("offset of the locator", number(footer, "locator_offset"), regions.metadata_end),
        ("offset of the allocation table", table_offset, number(footer, "table_offset")),
        ("end of the integrity section", section_end, table_offset),
        ("size of the file", file_bytes, number(locator, "file_bytes")),
        ("end of the allocation table", file_bytes, rows_end),
    ):
        if got != expected:
            raise BetonError(
                f"{path}: {what}: got {got}, expected {expected}; truncated or altered, "
                "re-write the file"
            )


def pack_text(
    class_names: Mapping[str, list[str]],
    made: Mapping[str, Any],
    names_place: NamesPlace | None = None,
) -> bytes:
    """The section's text as JSON; the same input gives the same bytes.

    class_names: field -> names. made: how the file came about, serialisable as JSON.
    """
    document: dict[str, Any] = {"class_names": class_names, "made": made}
    if names_place is not None:
        document["names"] = names_place._asdict()
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def unpack_text(path: str, raw: bytes) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(class_names, made) from the section's text, whose checksum the caller has compared."""
    try:
        document = json.loads(raw)
        class_names, made = dict(document["class_names"]), dict(document["made"])
        for names in class_names.values():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("class names are not texts")
        return class_names, made
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BetonError(f"{path}: integrity section's text is unreadable ({error})") from None


class NamesPlace(NamedTuple):
    """Where the samples' names lie, between the last payload and the integrity section.

    It stands in the section's text under "names"; the names themselves are read on demand.
    """

    offset: int
    packed_bytes: int  # size in the file: the text compressed by zlib
    text_bytes: int  # size of the text: the names in UTF-8, a zero byte between two of them
    packed_hash: int


def pack_names(names: Sequence[str]) -> tuple[bytes, NamesPlace]:
    """The packed names, one per sample, and their place at offset 0.

    File names that are not UTF-8 keep their bytes (Python's surrogate escapes). Raises ValueError
    for a name with a zero byte and for names that are too long.
    """
    for name in names:
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"names: got {name!r}, expected texts without zero bytes")
    text = "\0".join(names).encode("utf-8", "surrogateescape")
    if len(text) > _max_names_bytes(len(names)):
        raise ValueError(
            f"names: got {len(text)} bytes for {len(names)} samples, expected at most "
            f"{_max_names_bytes(len(names))}; shorten them"
        )
    packed = zlib.compress(text)
    return packed, NamesPlace(0, len(packed), len(text), xxh3_64(packed))


def _max_names_bytes(num_samples: int) -> int:
    return min(MAX_NAMES_BYTES, MAX_NAMES_BYTES_PER_SAMPLE * num_samples)


def find_names(path: str, text: bytes, start: int, end: int, num_samples: int) -> NamesPlace | None:
    """Where a file's names lie, or None where it has no names.

    text: that of the section, which `unpack_text` has accepted. start, end: offsets of the data.
    """
    record = json.loads(text).get("names") if text else None
    if record is None:
        return None
    try:
        place = NamesPlace(**record)
        is_possible = all(type(number) is int and number >= 0 for number in place)
    except TypeError:
        is_possible = False
    if (
        not is_possible
        or not start <= place.offset <= end - place.packed_bytes
        or place.text_bytes > _max_names_bytes(num_samples)
    ):
        raise BetonError(f"{path}: the place of the names is impossible; damaged file")
    return place


def unpack_names(path: str, packed: bytes, place: NamesPlace, num_samples: int) -> tuple[str, ...]:
    """The samples' names, one per sample, from the bytes at `place`."""
    if xxh3_64(packed) != place.packed_hash:
        raise BetonError(
            f"{path}: checksum of the names does not match; altered, copy or write it again"
        )
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, place.text_bytes + 1)  # a hostile text cannot grow
    except zlib.error:
        text = b""
    if not unpacker.eof or len(text) != place.text_bytes or text.count(0) != num_samples - 1:
        raise BetonError(f"{path}: the names are not {num_samples} texts; damaged file")
    return tuple(text.decode("utf-8", "surrogateescape").split("\0"))
