"""File names in a `.beton`: kept beside the data, read only when asked for, never trusted."""

import json
import os

import numpy as np
import pytest
from support.beton_files import PAGE_BYTES, List, patch, pattern, values, write
from support.process_limits import with_limited_memory

from ffcv_ssl import BetonError, beton
from ffcv_ssl import fields as f
from ffcv_ssl.inspect import main as inspect
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.reader import Reader
from ffcv_ssl.training.run_data import open_dataset
from ffcv_ssl.writer import DatasetWriter

FIELDS = {"image": f.RGBImageField("raw"), "label": f.IntField()}
ITEMS = [(pattern(i, 8, 9), i % 2) for i in range(7)]
NAMES = [f"n0144{i % 2}/n0144{i % 2}_{i}.JPEG" for i in range(7)]


@pytest.fixture
def named(tmp_path):
    path = tmp_path / "named.beton"
    write(path, FIELDS, ITEMS, names=NAMES)
    return path


def place_of(path):
    """The NamesPlace, the section's text and the text's offset."""
    with Reader(path) as reader:
        text, end = reader._text, reader._data_end
        place = beton.find_names(path, text, reader._data_start, end, reader.num_samples)
    return place, text, end


def rewrite(path, num_samples=7, packed=None, **changes):
    """Write the file anew as a hostile writer would: with sound hashes around a wrong place."""
    writer = DatasetWriter(path, FIELDS, PAGE_BYTES, 1, names=NAMES)
    true_names = beton.pack_names

    def pack(names):
        bytes_, place = true_names(names)
        bytes_ = bytes_ if packed is None else packed
        sizes = {"packed_bytes": len(bytes_), "packed_hash": xxh3_64(bytes_)}
        return bytes_, place._replace(**{**sizes, **changes})

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(beton, "pack_names", pack)
        writer.from_indexed_dataset(List(ITEMS[:num_samples]))


def test_names_come_back_in_the_order_of_the_samples(named):
    with Reader(named) as reader:
        assert reader.names == tuple(NAMES)
        assert reader.verified and reader.decode(3, "label") == 1


@pytest.mark.parametrize(
    ("indices", "settings"), [([5, 0, 2], {}), (None, {"shuffle_indices": True})]
)
def test_names_follow_their_samples_into_any_order(tmp_path, indices, settings):
    writer = DatasetWriter(tmp_path / "a", FIELDS, PAGE_BYTES, 1, names=NAMES)
    writer.from_indexed_dataset(List(ITEMS), indices, **settings)
    with Reader(tmp_path / "a") as reader:
        assert sorted(reader.names) != list(reader.names)
        for i, name in enumerate(reader.names):
            assert np.array_equal(reader.decode(i, "image"), ITEMS[NAMES.index(name)][0])


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        ["caf\u00e9/\u00fc.png", "\u4e2d\u6587.jpg"],
        ["", ""],
        ["x\ny", " "],
        ["a\udcff", "b"],
    ],
)
def test_any_file_name_survives(tmp_path, names):
    write(tmp_path / "a", FIELDS, ITEMS[: len(names)], names=names)
    with Reader(tmp_path / "a") as reader:
        assert reader.names == tuple(names)


def test_a_file_without_names_has_the_bytes_it_always_had(named, tmp_path):
    write(tmp_path / "a", FIELDS, ITEMS)
    with Reader(tmp_path / "a") as reader, Reader(named) as other:
        assert reader.names is None
        assert b"names" not in reader._text.replace(b"class_names", b"")
        assert reader.fingerprint == other.fingerprint  # names are no content


def test_names_are_kept_in_files_without_payloads(tmp_path):
    write(tmp_path / "a", {"label": f.IntField()}, [(i,) for i in range(3)], names=NAMES[:3])
    with Reader(tmp_path / "a") as reader:
        assert reader.names == tuple(NAMES[:3])
    assert values(tmp_path / "a") == {(i, "label"): i for i in range(3)}


def test_names_are_not_read_when_a_file_is_opened(named, monkeypatch):
    place, _, _ = place_of(named)
    reads = []
    monkeypatch.setattr(Reader, "_pread", _recording(reads))
    with Reader(named) as reader:
        assert all(not overlaps(read, place) for read in reads)
        assert reader.names == tuple(NAMES)
        assert (place.packed_bytes, place.offset) in reads
        assert reader.names is reader.names


def _recording(reads):
    pread = Reader._pread

    def record(self, size, offset):
        reads.append((size, offset))
        return pread(self, size, offset)

    return record


def overlaps(read, place):
    size, offset = read
    return offset < place.offset + place.packed_bytes and place.offset < offset + size


def test_every_flipped_bit_of_the_names_is_found_and_harms_nothing_else(named):
    place, _, _ = place_of(named)
    right = values(named)
    for offset in range(place.offset, place.offset + place.packed_bytes):
        old = patch(named, offset, b"\0")
        patch(named, offset, bytes([old[0] ^ 1 << offset % 8]))
        with Reader(named) as reader:
            with pytest.raises(BetonError, match=r"checksum of the names does not match"):
                reader.names  # noqa: B018
            assert reader.decode(0, "label") == 0
        patch(named, offset, old)
    assert values(named).keys() == right.keys()


def test_names_cut_off_while_the_file_is_open_are_an_error(named):
    place, _, _ = place_of(named)
    with Reader(named) as reader:
        os.truncate(named, place.offset + 3)
        with pytest.raises(BetonError, match="names ends after 3 of"):
            reader.names  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed_bytes": 2**62}, "place of the names is impossible"),
        ({"packed_bytes": -1}, "place of the names is impossible"),
        ({"packed_bytes": 1.5}, "place of the names is impossible"),
        ({"text_bytes": 2**62}, "place of the names is impossible"),
        ({"text_bytes": 7 * 4096 + 1}, "place of the names is impossible"),
        ({"text_bytes": True}, "place of the names is impossible"),
        ({"packed_bytes": 5}, "checksum of the names"),
        ({"text_bytes": 0}, "the names are not 7 texts"),
        ({"text_bytes": 100}, "the names are not 7 texts"),
        ({"packed": b""}, "the names are not 7 texts"),
        ({"packed": b"no zlib stream"}, "the names are not 7 texts"),
    ],
)
def test_hostile_names_are_refused_in_one_line(tmp_path, changes, message):
    path = tmp_path / "a.beton"
    rewrite(path, **changes)
    with Reader(path) as reader, pytest.raises(BetonError, match=message) as error:
        reader.names  # noqa: B018
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("record", ["[]", "5", "{}", '{"offset": 0}', '{"offset": 0, "x": 1}'])
def test_a_place_of_another_shape_is_refused(record):
    text = f'{{"class_names":{{}},"made":{{}},"names":{record}}}'.encode()
    with pytest.raises(BetonError, match="place of the names is impossible"):
        beton.find_names("x", text, 0, 100, 7)


@pytest.mark.parametrize(
    ("start", "end", "is_good"), [(0, 20, True), (11, 20, False), (0, 19, False)]
)
def test_names_outside_of_the_data_are_refused(start, end, is_good):
    place = beton.NamesPlace(10, 10, 5, 0)
    text = beton.pack_text({}, {}, place)
    if is_good:
        assert beton.find_names("x", text, start, end, 7) == place
    else:
        with pytest.raises(BetonError, match="impossible"):
            beton.find_names("x", text, start, end, 7)


def test_names_that_unpack_to_more_than_promised_take_no_memory(tmp_path):
    import zlib

    path = tmp_path / "bomb.beton"
    rewrite(path, packed=zlib.compress(bytes(1 << 30), 9), text_bytes=200)
    with Reader(path) as reader, pytest.raises(BetonError, match="the names are not 7 texts"):
        with_limited_memory(64 << 20, lambda: reader.names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b\0c", "d"], "names: got 'b.x00c', expected texts"),
        (["a", b"b", "d"], "names: got b'b', expected texts"),
        (["a", "b" * 12287, "d"], "names: got 12291 bytes for 3 samples, expected at most 12288"),
    ],
)
def test_names_that_the_format_cannot_hold_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", FIELDS, ITEMS[:3], names=names)
    assert os.listdir(tmp_path) == []


def test_too_few_names_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"got 2 names, .*; item 2 has none"):
        write(tmp_path / "a", FIELDS, ITEMS[:3], names=["a", "b"])
    assert os.listdir(tmp_path) == []


def test_inspect_mentions_the_names(named, tmp_path, capsys):
    assert inspect([str(named)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["names"] == [NAMES[0], NAMES[-1]]
    assert "n01440/n01440_0.JPEG" in "".join(out.splitlines()[:-1])
    write(tmp_path / "without", FIELDS, ITEMS)
    assert inspect([str(tmp_path / "without")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["names"] is None


def test_a_runs_data_give_the_names_when_asked(named):
    assert open_dataset(str(named)).names() == tuple(NAMES)
