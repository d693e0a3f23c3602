"""What the reader of `.beton` files refuses, and the line that says so: damage of each kind."""

import json

import numpy as np
import pytest
from support.beton_files import patch, regions_of

from ffcv_ssl import BetonError, Reader, beton


def records(path):
    """(offset of the locator, the locator, offset of the footer, the footer) of a file of ours."""
    regions, table_offset, _ = regions_of(path)
    at = table_offset - beton.FOOTER_TYPE.itemsize
    raw = path.read_bytes()
    locator = np.frombuffer(raw, beton.LOCATOR_TYPE, 1, regions.metadata_end).copy()
    return regions.metadata_end, locator, at, np.frombuffer(raw, beton.FOOTER_TYPE, 1, at).copy()


def test_a_mark_of_integrity_that_is_missing_is_named(copy):
    _, locator, footer_at, _ = records(copy)
    patch(copy, footer_at, bytes(beton.FOOTER_TYPE.itemsize))
    with pytest.raises(
        BetonError, match="integrity footer is missing; truncated or altered, re-write it"
    ):
        Reader(copy)
    with pytest.raises(
        BetonError, match="integrity section is cut short; truncated file, re-write it"
    ):
        footer = beton.FOOTER_MAGIC
        beton.find_footer("x.beton", locator.tobytes(), footer, None, 0, 0)


def test_a_section_of_another_version_asks_for_an_update(copy):
    _, _, footer_at, footer = records(copy)
    footer["version"] = 99
    patch(copy, footer_at, beton._seal(footer))
    with pytest.raises(
        BetonError, match=r"integrity section has version 99, expected \d+; update ffcv-ssl"
    ):
        Reader(copy)


def test_records_that_contradict_each_other_are_named(copy):
    _, _, footer_at, footer = records(copy)
    footer["text_bytes"] += 1
    patch(copy, footer_at, beton._seal(footer))
    with pytest.raises(
        BetonError,
        match=r"locator and footer: got \d+, expected \d+; truncated or altered, re-write the file",
    ):
        Reader(copy)


@pytest.mark.parametrize("raw", [b"{", b"{}", b'{"class_names": {"a": [1]}, "made": {}}'])
def test_a_text_that_is_no_text_of_ours_is_refused(raw):
    with pytest.raises(BetonError, match=r"x.beton: integrity section's text is unreadable \("):
        beton.unpack_text("x.beton", raw)
    bad_names = json.dumps({"class_names": {"a": [1]}, "made": {}}).encode()
    with pytest.raises(BetonError, match="class names are not texts"):
        beton.unpack_text("x.beton", bad_names)


@pytest.mark.parametrize(
    "name, line",
    [
        ("caf\u00e9", "field name 'caf\u00e9': expected ASCII text"),
        ("x" * 17, "field name 'x{17}': got 17 bytes, expected 1 to 16 printable ones; choose"),
        ("", "field name '': got 0 bytes, expected 1 to 16 printable ones; choose another name"),
    ],
)
def test_a_name_that_no_field_can_have_is_refused(name, line):
    with pytest.raises(ValueError, match=line):
        beton.checked_name(name)


def header(path, **values):
    """Overwrite numbers of the header; the file has no checksums."""
    record = np.frombuffer(path.read_bytes(), beton.HEADER_TYPE, 1).copy()
    for name, value in values.items():
        record[name] = value
    patch(path, 0, record.tobytes())


HEADERS = [
    (
        {"version": 1},
        "format version 1, expected 2; not a .beton file, or one whose writing was cut",
    ),
    ({"page_size": 3}, "page size 3 is impossible; damaged file"),
    ({"num_fields": 0}, "got 0 fields and 6 samples, expected at least 1 of each"),
    (
        {"alloc_table_ptr": 2**40},
        rf"allocation table at {2**40}, the file has \d+ bytes; truncated, copy or write it again",
    ),
    (
        {"num_fields": 2**15},
        r"field descriptors needs \d+ bytes at 24, the file has \d+; truncated or",
    ),
]


@pytest.mark.parametrize("values, line", HEADERS)
def test_a_header_that_contradicts_the_file_is_refused(foreign, values, line):
    header(foreign, **values)
    with pytest.raises(BetonError, match=line):
        Reader(foreign)


def test_a_table_that_is_cut_inside_a_row_is_refused(foreign):
    with open(foreign, "ab") as file:
        file.write(b"x")
    with pytest.raises(
        BetonError, match=r"allocation table of \d+ bytes is cut inside a row; truncated file"
    ):
        Reader(foreign)


def test_a_field_of_an_unknown_or_damaged_type_is_refused(foreign):
    old = patch(foreign, 24, bytes([99]))
    with pytest.raises(BetonError, match="field 'raw' has unknown type 99; damaged file"):
        Reader(foreign)
    patch(foreign, 24, bytes([255]))
    with pytest.raises(
        BetonError,
        match=r"field 'raw' has unknown type 255; name its class: custom_fields={'raw': ...}",
    ):
        Reader(foreign)
    patch(foreign, 24, old)
    box = 24 + 5 * beton.DESCRIPTOR_TYPE.itemsize  # an array: its type and shape are arguments
    arguments = box + beton.DESCRIPTOR_TYPE.fields["arguments"][1]
    patch(foreign, arguments, bytes(512))
    with pytest.raises(
        BetonError,
        match=r": field 'box': got an array type of 0 bytes, expected 1 to .*; damaged file",
    ):
        Reader(foreign)


def test_an_altered_header_does_not_match_its_checksum(copy):
    regions, _, _ = regions_of(copy)
    old = patch(copy, regions.metadata_end - 1, b"\0")
    patch(copy, regions.metadata_end - 1, bytes([old[0] ^ 1]))
    with pytest.raises(
        BetonError, match="checksum of the metadata does not match; altered, copy or write it again"
    ):
        Reader(copy)


def test_a_sample_that_cannot_be_read_is_named(copy, monkeypatch):
    with Reader(copy) as reader:
        with pytest.raises(IndexError, match=r"copy.beton: got sample 6, expected 0 to 5"):
            reader.decode(6, "label")

        def fail(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr("ffcv_ssl.reader.pread.os.preadv", fail)
            with pytest.raises(
                BetonError, match=r"reading \d+ bytes at \d+ failed \(Input/output error\)"
            ):
                reader.read(0, "raw")
        pointer = int(reader.extents("note").pointer[0])
        patch(copy, pointer, b"\x5a\x5a")
        with pytest.raises(
            BetonError,
            match=r"copy.beton: sample 0, field 'note': checksum does not match; re-write it, or "
            r"load with on_error='replace'",
        ):
            reader.read(0, "note")


def test_a_value_that_its_payload_contradicts_is_an_error_of_that_sample(foreign):
    with Reader(foreign) as reader:
        patch(foreign, int(reader.extents("note").pointer[0]), b"\x5a" * 8)
        with pytest.raises(
            BetonError,
            match=r": sample 0, field 'note': .*; re-write it, or load with on_error='replace'",
        ):
            reader.decode(0, "note")


def test_more_samples_than_fit_before_the_table_are_refused(foreign):
    header(foreign, num_samples=2**20)
    with pytest.raises(
        BetonError,
        match=rf"{2**20} samples need \d+ bytes, the allocation table is at \d+; "
        "truncated or damaged",
    ):
        Reader(foreign)


def test_a_table_that_is_altered_while_the_file_is_open_is_named(copy):
    _, table_offset, _ = regions_of(copy)
    with Reader(copy) as reader:
        patch(copy, table_offset, b"\x5a\x5a")
        with pytest.raises(
            BetonError, match=r"copy.beton: the allocation table was altered while open"
        ):
            _ = reader.alloc_table
