"""Damaged and hostile files: one line of error, or exactly the right values; never a crash."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.beton_files import (
    PAGE_BYTES,
    List,
    patch,
    regions_of,
    same,
    values,
    without_integrity,
)
from support.process_limits import with_limited_memory

from ffcv_ssl import BetonError, beton
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.reader.pread import read_upto
from ffcv_ssl.reader.rows import Rows
from ffcv_ssl.writer import DatasetWriter


def interesting_offsets(path, count, rng):
    """Byte offsets spread over every region with content, not over the padding of pages."""
    raw = np.fromfile(path, np.uint8)
    full = np.flatnonzero(raw)
    regions, _, table = regions_of(path)
    chosen = [rng.choice(full, count)]
    chosen.append(rng.integers(0, beton.HEADER_TYPE.itemsize, count // 4))
    chosen.append(rng.integers(regions.metadata, regions.locator_end, count // 4))
    chosen.append(rng.integers(int(table["ptr"][-1]), len(raw), count // 2))
    return np.concatenate(chosen)


def test_a_flipped_bit_never_gives_a_wrong_value(sound, copy):
    rng = np.random.default_rng(0)
    right = values(sound)
    num_errors = 0
    for offset in interesting_offsets(sound, 1000, rng).tolist():
        old = patch(copy, offset, b"\0")
        patch(copy, offset, bytes([old[0] ^ 1 << int(rng.integers(8))]))
        try:
            got = values(copy)
            for key, value in got.items():
                assert isinstance(value, BetonError) or same(value, right[key]), (offset, key)
            num_errors += any(isinstance(value, BetonError) for value in got.values())
        except BetonError as error:
            assert "\n" not in str(error)
            num_errors += 1
        patch(copy, offset, old)
    assert values(copy).keys() == right.keys()
    assert num_errors > 1800  # all but flips in padding are noticed


def test_a_truncated_file_does_not_open(sound, copy):
    size = sound.stat().st_size
    _, table_offset, _ = regions_of(sound)
    rng = np.random.default_rng(1)
    ends = {0, 1, 23, 24, 25, size - 1, size - 24, table_offset, table_offset - 1, PAGE_BYTES}
    ends |= set(rng.integers(0, size, 40).tolist())
    ends |= set(range(table_offset, size, 24))
    for end in sorted(ends, reverse=True):
        os.truncate(copy, end)
        with pytest.raises(BetonError) as error:
            Reader(copy)
        assert "\n" not in str(error.value)
        assert str(copy) in str(error.value)


def test_a_file_with_something_appended_does_not_open(copy):
    for extra in (b"x", bytes(24), bytes(48)):
        with open(copy, "ab") as file:
            file.write(extra)
        with pytest.raises(BetonError):
            Reader(copy)


def test_zeroed_and_swapped_blocks_never_give_a_wrong_value(sound, copy):
    rng = np.random.default_rng(2)
    right = values(sound)
    for offset in interesting_offsets(sound, 60, rng).tolist():
        length = int(rng.integers(1, 600))
        old = patch(copy, offset, bytes(min(length, copy.stat().st_size - offset)))
        try:
            for key, value in values(copy).items():
                assert isinstance(value, BetonError) or same(value, right[key])
        except BetonError:
            pass
        patch(copy, offset, old)


def test_a_file_truncated_while_open_is_an_error_of_that_sample(copy):
    with Reader(copy) as reader:
        extents = reader.extents("raw")
        os.truncate(copy, int(extents.pointer[3]) + 10)
        assert reader.decode(2, "raw").shape == (26, 19, 3)
        with pytest.raises(BetonError, match=r"sample 3, field 'raw': got 10 bytes, expected 1482"):
            reader.decode(3, "raw")
        with pytest.raises(BetonError, match="sample 5"):
            reader.decode(5, "note")


def test_a_file_that_shrinks_while_it_is_opened_is_not_taken_for_an_unverified_one(
    sound, monkeypatch
):
    read, calls = os.preadv, []

    def shrinks(fd, buffers, offset):
        calls.append(offset)
        # header and descriptors; nothing of the locator and the footer; the rest
        return 0 if len(calls) in (3, 4) else read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinks)
    with pytest.raises(BetonError, match="locator ends after 0 of"):
        Reader(sound)


def test_a_bad_payload_is_an_error_of_that_sample_alone(copy):
    with Reader(copy) as reader:
        pointer = int(reader.extents("jpg").pointer[1])
    patch(copy, pointer + 300, b"\x5a\x5a")
    with Reader(copy) as reader:
        with pytest.raises(
            BetonError, match=r"sample 1, field 'jpg': checksum.*on_error='replace'"
        ):
            reader.decode(1, "jpg")
        assert reader.decode(0, "jpg").shape == (26, 19, 3)


# -- hostile files -----------------------------------------------------------------------


def test_random_damage_to_a_file_without_checksums_never_crashes_or_takes_memory(foreign):
    rng = np.random.default_rng(3)
    regions, table_offset, _ = regions_of(foreign)
    size = foreign.stat().st_size
    hostile = [0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 24, size, size - 1]

    def action():
        for _ in range(2000):
            start, end = [
                (0, 24),
                (24, regions.metadata),
                (regions.metadata, regions.metadata_end),
                (table_offset, size),
            ][rng.integers(4)]
            offset = int(rng.integers(start, end))
            value = (
                hostile[rng.integers(len(hostile))] if rng.random() < 0.7 else rng.integers(2**62)
            )
            width = int(rng.choice([1, 2, 4, 8]))
            raw = int(value).to_bytes(8, "little")[: min(width, size - offset)]
            old = patch(foreign, offset, raw)
            try:
                values(foreign)
            except BetonError as error:
                assert "\n" not in str(error)
            patch(foreign, offset, old)

    with_limited_memory(1 << 30, action)


HOSTILE_HEADERS = [
    ("version", 1, "version 1, expected 2"),
    ("page_size", 0, "page size"),
    ("page_size", 3 << 20, "page size"),
    ("num_samples", 0, "expected at least 1 of each"),
    ("num_samples", 2**63, "truncated or damaged"),
    ("num_fields", 0, "expected at least 1 of each"),
    ("num_fields", 2**16 - 1, "field descriptors"),
    ("alloc_table_ptr", 2**64 - 1, "truncated"),
    ("alloc_table_ptr", 24, "damaged"),
]


@pytest.mark.parametrize("name, value, message", HOSTILE_HEADERS)
def test_impossible_headers_are_refused(foreign, name, value, message):
    header = np.fromfile(foreign, beton.HEADER_TYPE, 1)
    header[name] = value
    patch(foreign, 0, header.tobytes())
    with pytest.raises(BetonError, match=message):
        Reader(foreign)


@pytest.mark.parametrize(
    "column, value",
    [("ptr", 0), ("ptr", 2**64 - 1), ("size", 2**64 - 1), ("size", 2**40), ("sample_id", 2**40)],
)
def test_allocations_outside_of_the_data_are_refused(foreign, column, value):
    _, table_offset, table = regions_of(foreign)
    table[column][4] = value
    patch(foreign, table_offset, table.tobytes())
    with pytest.raises(BetonError, match=r"allocation 4 .* outside of the data"):
        Reader(foreign)


def test_allocations_that_overlap_are_refused(foreign):
    """JPEGs may be of any length: if all of them reached to the end of the data, a batch would
    need many times the memory of the file."""
    _, table_offset, table = regions_of(foreign)
    sound = table.copy()
    with Reader(foreign) as reader:
        end = reader.extents("jpg").pointer.max() + np.uint64(1)
        row = int(np.flatnonzero(table["ptr"] == reader.extents("jpg").pointer[2])[0])
    table["size"][row] = end - table["ptr"][row]
    patch(foreign, table_offset, table.tobytes())
    said = rf": allocations {row} and \d+ overlap: \d+ bytes at \d+, \d+ at \d+; damaged"
    with pytest.raises(BetonError, match=said):
        Reader(foreign)
    order = np.random.default_rng(0).permutation(len(table))
    patch(foreign, table_offset, table[order].tobytes())
    moved = int(np.flatnonzero(order == row)[0])
    said = rf": allocations {moved} and \d+ overlap: \d+ bytes at \d+, \d+ at \d+; damaged"
    with pytest.raises(BetonError, match=said):
        Reader(foreign)
    patch(foreign, table_offset, sound[order].tobytes())
    Reader(foreign).close()


def test_empty_allocations_overlap_nothing_wherever_they_are():
    table = np.zeros(5, beton.ALLOC_ROW_TYPE)
    table["ptr"], table["size"] = [100, 100, 120, 150, 160], [0, 50, 0, 10, 0]
    for order in (slice(None), slice(None, None, -1)):
        assert Rows(table[order], None).find_overlap() is None
    table["size"][1] = 51
    assert Rows(table, None).find_overlap() == (1, 3)


def test_a_sparse_file_with_room_for_a_huge_table_is_refused(foreign):
    """A file may be as long as its header says without taking room on the disk."""
    _, table_offset, _ = regions_of(foreign)
    os.truncate(foreign, table_offset + 24 * (1 << 38))
    with pytest.raises(BetonError, match=r"no memory for \d+ bytes at \d+; damaged file"):
        with_limited_memory(1 << 30, lambda: Reader(foreign))


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 65])
def test_a_size_that_no_array_can_have_is_refused(tmp_path, size):
    with pytest.raises(BetonError, match=f"^a.beton: no memory for {size} bytes at 5; damaged"):
        read_upto("a.beton", -1, size, 5)


def change_metadata(path, field, sample, **changes):
    with Reader(path) as reader:
        metadata = reader.metadata.copy()
        offset = reader._regions.metadata
        column = metadata[f"f{reader.field_names.index(field)}"]
    for name, value in changes.items():
        column[name][sample] = value
    patch(path, offset, metadata.tobytes())


@pytest.mark.parametrize(
    "field, changes, message",
    [
        ("raw", {"data_ptr": 2**64 - 1}, "not in the allocation table"),
        ("raw", {"data_ptr": 0}, "not in the allocation table"),
        ("raw", {"width": 20}, "size differs from that in the allocation table"),
        ("raw", {"mode": 7}, "mode"),
        ("jpg", {"width": 0}, "no pixels"),
        ("jpg", {"width": 65535, "height": 65535}, "larger than"),
        ("blob", {"size": 2**63}, "size differs from that in the allocation table"),
        ("blob", {"size": 2**64 - 1}, "its size is impossible"),  # the mark of no promise
    ],
)
def test_metadata_that_leads_astray_is_refused(foreign, field, changes, message):
    change_metadata(foreign, field, 2, **changes)
    with pytest.raises(BetonError, match=f"sample 2, field '{field}': .*{message}"):
        Reader(foreign)


def test_the_pointer_of_an_empty_payload_is_never_followed(tmp_path):
    path = tmp_path / "a.beton"
    DatasetWriter(path, {"x": f.BytesField()}, PAGE_BYTES, 1).from_indexed_dataset(List([(b"",)]))
    without_integrity(path)
    change_metadata(path, "x", 0, ptr=2**64 - 1)
    assert values(path) == {(0, "x"): b""}


def test_a_pointer_to_another_samples_image_is_refused(foreign):
    with Reader(foreign) as reader:
        other = reader.extents("raw").pointer[3]
    change_metadata(foreign, "raw", 2, data_ptr=other)
    with pytest.raises(BetonError, match="another sample's data"):
        Reader(foreign)


def test_a_jpeg_of_another_size_than_its_metadata_is_refused(foreign):
    change_metadata(foreign, "jpg", 2, width=18)
    with Reader(foreign) as reader, pytest.raises(BetonError, match="JPEG is 19x26 px"):
        reader.decode(2, "jpg")


@pytest.mark.parametrize("name", [b"\0", b"\xff", b"a\x01", b"raw"])
def test_impossible_field_names_are_refused(foreign, name):
    place = 24 + beton.DESCRIPTOR_TYPE.itemsize + 1  # the second field's
    patch(foreign, place, name.ljust(16, b"\0"))
    with pytest.raises(BetonError, match=r"not ASCII text|two fields are called"):
        Reader(foreign)


def test_an_unknown_field_type_is_refused(foreign):
    patch(foreign, 24, b"\x63")
    with pytest.raises(BetonError, match="field 'raw' has unknown type 99"):
        Reader(foreign)


@pytest.mark.parametrize("content", [b"", b"x", bytes(5000), b"\xff" * 5000, b"PK\3\4" * 999])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BetonError):
        Reader(tmp_path / "a")


def test_folders_pipes_and_missing_files_do_not_hang_or_crash(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BetonError, match="not a regular file"):
            Reader(path)
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none")
