"""The byte layout: sizes and offsets as FFCV 1.0.2 has them, and the integrity marks."""

import numpy as np
import pytest

from ffcv_ssl import BetonError, beton
from ffcv_ssl.fields import FloatField, IntField, RGBImageField

REGIONS = beton.layout(num_fields=2, num_samples=3, metadata_itemsize=24)
TEXT = beton.pack_text({"label": ["cat", "dog"]}, {"by": "test"})
CHECKSUMS = np.arange(3, dtype=np.uint64)
PARTS = {"header": b"h", "descriptors": b"d", "metadata": b"m", "table": b"t"}
SECTION_OFFSET = 5000
TABLE_OFFSET = SECTION_OFFSET + beton.section_bytes(TEXT, 3)
FILE_BYTES = TABLE_OFFSET + 3 * 24


@pytest.fixture
def marks():
    """(locator bytes, section bytes) of a file that is sound."""
    return beton.pack_integrity(REGIONS, SECTION_OFFSET, TABLE_OFFSET, TEXT, CHECKSUMS, PARTS)


def find(locator, section, table_offset=TABLE_OFFSET, file_bytes=FILE_BYTES, regions=REGIONS):
    footer = section[-beton.FOOTER_TYPE.itemsize :]
    return beton.find_footer("x.beton", locator, footer, regions, table_offset, file_bytes)


def test_records_have_the_sizes_of_ffcv_1_0_2():
    assert beton.HEADER_TYPE.itemsize == 24
    assert beton.DESCRIPTOR_TYPE.itemsize == 1 + 16 + 1024
    assert beton.ALLOC_ROW_TYPE.itemsize == 24
    assert beton.IMAGE_METADATA_TYPE.itemsize == 13
    assert beton.NDARRAY_ARGUMENTS_TYPE.itemsize == 33 * 8


def test_metadata_columns_are_aligned_as_ffcv_aligns_them():
    dtype = beton.metadata_type([RGBImageField(), IntField(), FloatField(), RGBImageField()])
    assert dtype.names == ("f0", "f1", "f2", "f3")
    assert [dtype.fields[name][1] for name in dtype.names] == [0, 16, 24, 32]
    assert dtype.itemsize == 48


def test_header_bytes_are_little_endian_in_ffcvs_order():
    raw = beton.pack_header(num_fields=2, page_size=1 << 21, num_samples=3, table_offset=4)
    assert raw.hex() == "020002000000200003000000000000000400000000000000"


def test_regions_follow_each_other_without_gaps():
    assert tuple(REGIONS) == (24, 24 + 2 * 1041, 24 + 2 * 1041 + 72)


def test_hostile_counts_do_not_wrap_around():
    assert beton.layout(2**16 - 1, 2**64 - 1, 2**20).metadata_end > 2**83


@pytest.mark.parametrize("name", ["", "seventeen_letters", "caf\u00e9", "a\0b", "a\nb", None])
def test_names_that_the_format_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match="field name"):
        beton.checked_name(name)


def test_a_name_of_sixteen_bytes_survives():
    raw = beton.pack_descriptor(1, "a" * 16, np.zeros(1024, np.uint8))
    descriptor = np.frombuffer(raw, beton.DESCRIPTOR_TYPE)[0]
    assert beton.unpack_name("x", 0, descriptor["name"]) == "a" * 16


def test_the_section_fills_its_place_exactly(marks):
    assert len(marks[1]) == TABLE_OFFSET - SECTION_OFFSET


def test_a_sound_pair_of_marks_is_found(marks):
    footer = find(*marks)
    assert int(footer["section_offset"][0]) == SECTION_OFFSET
    assert int(footer["num_rows"][0]) == 3


def test_neither_mark_means_a_file_of_ffcvs():
    assert find(bytes(beton.LOCATOR_TYPE.itemsize), bytes(beton.FOOTER_TYPE.itemsize)) is None


@pytest.mark.parametrize("lost", [0, 1])
def test_one_mark_without_the_other_is_damage(marks, lost):
    with pytest.raises(BetonError, match="missing"):
        find(*[bytes(len(m)) if i == lost else m for i, m in enumerate(marks)])


def test_every_flipped_bit_of_either_mark_is_found(marks):
    locator, section = marks
    footer = section[-beton.FOOTER_TYPE.itemsize :]
    for which, mark in enumerate((locator, footer)):
        for bit in range(len(mark) * 8):
            flipped = bytearray(mark)
            flipped[bit // 8] ^= 1 << bit % 8
            pair = (flipped, footer) if which == 0 else (locator, flipped)
            with pytest.raises(BetonError):
                find(*map(bytes, pair))


def test_marks_of_two_sound_files_do_not_pass_together(marks):
    other = beton.pack_integrity(REGIONS, SECTION_OFFSET, TABLE_OFFSET, TEXT, CHECKSUMS + 1, PARTS)
    with pytest.raises(BetonError, match="locator and footer"):
        find(marks[0], other[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"table_offset": TABLE_OFFSET + 24},
        {"file_bytes": FILE_BYTES - 24},
        {"file_bytes": FILE_BYTES + 24},
        {"regions": beton.layout(2, 4, 24)},
    ],
)
def test_marks_that_contradict_the_file_are_refused(marks, changed):
    with pytest.raises(BetonError, match="expected"):
        find(*marks, **changed)


def test_text_round_trips_and_is_the_same_for_any_order_of_keys():
    assert beton.unpack_text("x", TEXT) == ({"label": ["cat", "dog"]}, {"by": "test"})
    assert beton.pack_text({}, {"a": 1, "b": 2}) == beton.pack_text({}, {"b": 2, "a": 1})


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'{"made": {}}', b'{"class_names": {"a": 5}, "made": {}}', b"[" * 10**5],
)
def test_text_of_another_shape_is_refused(raw):
    with pytest.raises(BetonError, match="text"):
        beton.unpack_text("x", raw)
