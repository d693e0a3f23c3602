"""Reader: exact values from sound files, one line of error from all others."""

import copy as copy_module
import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.beton_files import (
    PAGE_BYTES,
    List,
    Samples,
    all_fields,
    make_columns,
    patch,
    regions_of,
    same,
    values,
    without_integrity,
    write_all_fields,
)
from support.small_files import SOUND_SAMPLES

from ffcv_ssl import BetonError
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader, contents
from ffcv_ssl.writer import DatasetWriter

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("writer", ["ours", "ffcv"])
def test_golden_files_give_exact_values(tmp_path, writer):
    path = tmp_path / "golden.beton"
    path.write_bytes(gzip.decompress((DATA / f"golden_{writer}.beton.gz").read_bytes()))
    golden = dict(np.load(DATA / "golden_values.npz"))
    samples = Samples(golden)
    with Reader(path) as reader:
        assert reader.verified == (writer == "ours")
        assert reader.field_names == list(all_fields())
        assert reader.num_samples == len(samples) == 5
        for i in range(5):
            expected = dict(zip(all_fields(), samples[i]))
            expected["blob"] = expected["blob"].tobytes()
            expected["jpg"] = golden[f"jpg_{writer}"][i]
            for name, value in expected.items():
                assert same(reader.decode(i, name), value), (i, name)


def test_the_readers_attributes_are_those_of_the_file(sound):
    with Reader(sound) as reader:
        assert reader.path == str(sound)
        assert reader.num_samples == SOUND_SAMPLES
        assert reader.page_size == PAGE_BYTES
        assert reader.handlers is reader.fields
        assert list(reader.fields) == reader.field_names == list(all_fields())
        assert reader.made["by"] == "test"
        assert not os.get_inheritable(reader.fd)
        assert reader.metadata.dtype.names[0] == "f0"
        assert reader.field_metadata("label").tolist() == make_columns(6, 26, 19)["label"].tolist()
        assert not reader.metadata.flags.writeable
        fd = reader.fd
    with pytest.raises(OSError):
        os.fstat(fd)
    reader.close()


def test_extents_lead_to_the_payloads_and_their_checksums(sound):
    import xxhash

    with Reader(sound) as reader:
        assert reader.extents("label") is None
        assert reader.extents("score") is None
        for name in ("raw", "jpg", "blob", "box", "note"):
            extents = reader.extents(name)
            for i in range(SOUND_SAMPLES):
                raw = os.pread(reader.fd, int(extents.size[i]), int(extents.pointer[i]))
                assert raw == reader.read(i, name)
                assert xxhash.xxh3_64_intdigest(raw) == int(extents.checksum[i])


def test_a_foreign_file_reads_the_same_without_checksums(sound, foreign):
    with Reader(foreign) as reader:
        assert not reader.verified
        assert reader.extents("raw").checksum is None
        assert reader.class_names == reader.made == {}
    a, b = values(sound), values(foreign)
    assert all(same(a[key], b[key]) for key in a)


def test_wrong_names_and_numbers_are_one_line(sound):
    with Reader(sound) as reader:
        for call in (reader.extents, reader.field_metadata, lambda name: reader.decode(0, name)):
            with pytest.raises(BetonError, match="no field 'picture'; it has raw, jpg"):
                call("picture")
        for sample in (-1, SOUND_SAMPLES):
            with pytest.raises(IndexError, match=f"got sample {sample}, expected 0 to 5"):
                reader.read(sample, "raw")


def test_empty_payloads_that_share_a_pointer_as_ffcv_writes_them_read_back(tmp_path):
    path = tmp_path / "a.beton"
    writer = DatasetWriter(path, {"x": f.BytesField()}, PAGE_BYTES, 1)
    writer.from_indexed_dataset(List([(b"",), (b"abc",), (b"",)]))
    without_integrity(path)
    regions, table_offset, table = regions_of(path)
    table["ptr"][0] = table["ptr"][1]  # FFCV reserves no byte for nothing
    patch(path, table_offset, table.tobytes())
    patch(path, regions.metadata, np.array([table["ptr"][1]], "<u8").tobytes())
    assert list(values(path).values()) == [b"", b"abc", b""]


# -- the fingerprint ---------------------------------------------------------------------


def fingerprint(path):
    with Reader(path) as reader:
        return reader.fingerprint


def test_the_fingerprint_ignores_path_page_size_and_history(sound, tmp_path):
    writer = DatasetWriter(tmp_path / "b", all_fields(), 4 * PAGE_BYTES, 2, made={"by": "other"})
    writer.from_indexed_dataset(Samples(make_columns(SOUND_SAMPLES, 26, 19)))
    assert fingerprint(sound) == fingerprint(tmp_path / "b")


@pytest.mark.parametrize("name", ["image", "label", "score", "blob", "box", "tensor", "note"])
def test_the_fingerprint_changes_with_any_one_value(sound, tmp_path, name):
    columns = make_columns(SOUND_SAMPLES, 26, 19)
    if name == "note":
        columns["note"][2] = json.dumps({"id": 9, "text": "\u00e9\u00e9"})
    else:
        columns[name][2] += 1
    write_all_fields(tmp_path / "b", columns)
    assert fingerprint(sound) != fingerprint(tmp_path / "b")


def test_the_fingerprint_of_a_foreign_file_is_stable_and_of_its_metadata(foreign, tmp_path):
    before = fingerprint(foreign)
    assert before == fingerprint(shutil.copy(foreign, tmp_path / "again"))
    with Reader(foreign) as reader:
        offset = reader._regions.metadata + reader.metadata.dtype.fields["f2"][1]
    patch(foreign, offset, b"\x77")
    assert fingerprint(foreign) != before


# -- copies, and readers of one file


@pytest.mark.parametrize(
    "duplicate", [copy_module.copy, copy_module.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_copied_reader_has_a_descriptor_of_its_own(sound, duplicate):
    with Reader(sound) as reader:
        with duplicate(reader) as other:
            assert other.fd != reader.fd
            assert other.read(2, "raw") == reader.read(2, "raw")
        reader.read(3, "raw")


def test_a_copy_of_a_reader_opens_the_same_file_in_another_folder(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(sound.parent)
    with Reader(sound.name) as reader:
        stored = pickle.dumps(reader)
        monkeypatch.chdir(tmp_path)
        with copy_module.copy(reader) as one, pickle.loads(stored) as two:
            assert one.fingerprint == two.fingerprint == reader.fingerprint
            assert one.path == two.path == str(sound)


def test_a_copy_of_a_reader_whose_file_was_replaced_is_refused(sound, copy):
    with Reader(copy) as reader:
        write_all_fields(copy, make_columns(SOUND_SAMPLES, 20, 19))
        with pytest.raises(BetonError, match="that of the reader that was copied") as error:
            copy_module.copy(reader)
    assert "\n" not in str(error.value)


def test_a_half_made_reader_closes_nothing(sound):
    with Reader(sound) as reader:
        half_made = Reader.__new__(Reader)
        half_made.close()
        del half_made
        assert len(reader.read(0, "raw")) == 26 * 19 * 3


def test_readers_of_a_file_share_its_tables_until_it_changes(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_SETTLED_S", -1e9)
    with Reader(copy) as one, Reader(os.path.relpath(copy)) as two:
        assert one.metadata is two.metadata and one.extents("raw") is two.extents("raw")
        one.close()
        assert two.read(1, "raw")
        write_all_fields(tmp_path / "b.beton", make_columns(SOUND_SAMPLES, 20, 19))
        os.replace(tmp_path / "b.beton", copy)
        with Reader(copy) as three:
            assert three.fingerprint != two.fingerprint
            assert three.metadata is not two.metadata
            assert len(three.read(0, "raw")) == 20 * 19 * 3
        assert len(two.read(0, "raw")) == 26 * 19 * 3
        with Reader(copy, custom_fields={"label": f.FloatField}) as other:
            assert isinstance(other.fields["label"], f.FloatField)


def test_a_file_that_changed_a_moment_ago_is_read_anew(copy):
    os.utime(copy)
    with Reader(copy) as one, Reader(copy) as two:
        assert one.metadata is not two.metadata


def test_the_tables_go_with_the_last_reader(copy, monkeypatch):
    monkeypatch.setattr(contents, "_SETTLED_S", -1e9)
    before = len(contents._open_contents)
    reader = Reader(copy)
    other = Reader(copy)
    assert len(contents._open_contents) == before + 1
    del reader
    assert len(contents._open_contents) == before + 1
    del other
    assert len(contents._open_contents) == before


def test_a_file_is_read_where_the_system_fills_no_buffers(small_beton, monkeypatch):
    with Reader(small_beton) as reader:
        expected = [reader.decode(index, "image") for index in range(reader.num_samples)]
    monkeypatch.delattr(os, "preadv")
    with Reader(small_beton) as reader:
        for index, image in enumerate(expected):
            assert np.array_equal(reader.decode(index, "image"), image)
