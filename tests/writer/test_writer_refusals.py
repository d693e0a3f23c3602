"""What the writer refuses, and the line that says so."""

import numpy as np
import pytest
from support.beton_files import List, write

from ffcv_ssl import BetonError, DatasetWriter
from ffcv_ssl.fields import BytesField, FloatField, IntField

INT = {"label": IntField()}


SETTINGS = [
    ({"fields": {}}, "x.beton: no fields to write, expected at least one"),
    ({"page_size": 3}, r"page_size: got 3, expected a power of two from \d+ to \d+"),
    (
        {"class_names": {"other": ["a"]}},
        "class_names: got names for 'other', which is not an IntField of this file; name one of "
        "its",
    ),
    (
        {"made": {"by": object()}},
        "made: Object of type object is not JSON serializable; give plain",
    ),
]


@pytest.mark.parametrize("settings, line", SETTINGS)
def test_a_writer_refuses_settings_that_make_no_file(settings, line):
    with pytest.raises(ValueError, match=line):
        DatasetWriter("x.beton", **{"fields": INT, **settings})


def test_a_writer_refuses_a_dataset_that_makes_no_file(tmp_path):
    path = tmp_path / "a.beton"
    with pytest.raises(
        ValueError, match=r"a.beton: the dataset is empty, expected at least 1 sample"
    ):
        write(path, INT, [])
    with pytest.raises(ValueError, match="chunksize: got 0, expected at least 1"):
        write(path, INT, [(1,)], chunksize=0)
    with pytest.raises(
        ValueError,
        match="names: got 1 names, expected one for each item of the dataset; item 1 has none",
    ):
        write(path, INT, [(1,), (2,)], names=["a"])
    with pytest.raises(ValueError, match="names: got 3, expected texts without zero bytes"):
        write(path, INT, [(1,)], names=[3])
    with pytest.raises(
        ValueError,
        match=r"sample 0 \(dataset index 0\), field 'label': expected an integer, got str",
    ):
        write(path, INT, [("cat",)])
    with pytest.raises(ValueError, match=r"expected a tuple of 1 values \(label\), got 2"):
        write(path, INT, [(1, 2)])
    assert not path.exists()


def test_a_sample_that_no_page_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ffcv_ssl.writer.writer.MAX_PAGE_SIZE", 1 << 21)
    with pytest.raises(
        BetonError, match=r"a.beton: sample 0: got 3000000 bytes, expected at most 2097152"
    ):
        write(tmp_path / "a.beton", {"b": BytesField()}, [(np.zeros(3_000_000, np.uint8),)])


class Hungry(FloatField):
    """A field of a user's own that stores a payload without a pointer."""

    def encode(self, destination, value, malloc):
        malloc(4)


class Twice(BytesField):
    """A field of a user's own that stores two payloads."""

    def encode(self, destination, value, malloc):
        malloc(4)
        malloc(4)


def test_a_field_that_stores_what_it_has_no_pointer_for_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"Hungry.encode calls malloc, but Hungry.pointers returns None; override"
    ):
        write(tmp_path / "a.beton", {"x": Hungry()}, [(1.0,)])
    with pytest.raises(ValueError, match=r"Twice.encode calls malloc twice, expected once"):
        write(tmp_path / "a.beton", {"x": Twice()}, [(b"",)])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/a.beton: cannot be written \(Not a directory\)"):
        DatasetWriter(tmp_path / "file/a.beton", INT, num_workers=1).from_indexed_dataset(
            List([(1,)])
        )
