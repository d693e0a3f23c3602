"""DatasetWriter: the same bytes for any workers, all or nothing, errors that name the sample."""

import io
import multiprocessing
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.beton_files import (
    PAGE_BYTES,
    List,
    Samples,
    all_fields,
    make_columns,
    pattern,
    same,
    write,
)

from ffcv_ssl import BetonError
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter

IMAGE = {"image": f.RGBImageField("raw")}
BLOB = {"blob": f.BytesField()}


@pytest.mark.parametrize("num_workers, chunksize", [(1, 1), (2, 3), (3, 7), (5, 100)])
def test_the_files_bytes_are_the_same_for_any_workers_and_chunks(tmp_path, num_workers, chunksize):
    samples = Samples(make_columns(23, 40, 30))
    write(tmp_path / "a", all_fields(), samples)
    write(tmp_path / "b", all_fields(), samples, num_workers, chunksize=chunksize)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_field_comes_back_with_its_value(tmp_path, num_workers):
    samples = Samples(make_columns(9, 40, 30))
    write(tmp_path / "a", all_fields(), samples, num_workers, chunksize=2)
    with Reader(tmp_path / "a") as reader:
        assert reader.verified
        for i in range(9):
            expected = dict(zip(all_fields(), samples[i]))
            del expected["jpg"]
            expected["blob"] = expected["blob"].tobytes()
            assert all(same(reader.decode(i, name), value) for name, value in expected.items())


def test_no_allocation_crosses_a_page_and_samples_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    items = [(bytes(rng.integers(1, 700_000)), bytes(rng.integers(1, 500_000))) for _ in range(30)]
    write(tmp_path / "a", {"x": f.BytesField(), "y": f.BytesField()}, items, 2, chunksize=3)
    with Reader(tmp_path / "a") as reader:
        table = reader.alloc_table
        first = table["ptr"] // reader.page_size
        assert np.array_equal(first, (table["ptr"] + table["size"] - 1) // reader.page_size)
        assert np.array_equal(first[::2], first[1::2])
        assert len(np.unique(first)) > 3


@pytest.mark.parametrize("where", [0, 2, 4])
def test_the_page_grows_to_hold_the_largest_sample(tmp_path, where):
    sizes = [1000] * 5
    sizes[where] = 5 * PAGE_BYTES // 2
    items = [(os.urandom(size),) for size in sizes]
    write(tmp_path / "a", BLOB, items, 2, chunksize=1)
    with Reader(tmp_path / "a") as reader:
        assert reader.page_size == 4 * PAGE_BYTES
        assert [reader.decode(i, "blob") for i in range(5)] == [blob for (blob,) in items]
        table = reader.alloc_table
        last = table["ptr"] + table["size"] - 1
        assert np.array_equal(table["ptr"] // reader.page_size, last // reader.page_size)


def test_empty_payloads_have_places_of_their_own(tmp_path):
    write(tmp_path / "a", BLOB, [(b"",), (b"a",), (b"",), (b"",), (b"bc",)])
    with Reader(tmp_path / "a") as reader:
        assert len(np.unique(reader.alloc_table["ptr"])) == 5
        assert [reader.decode(i, "blob") for i in range(5)] == [b"", b"a", b"", b"", b"bc"]


def test_a_chunk_of_many_large_images_travels_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("ffcv_ssl.writer.pool._PART_BYTES", 4000)
    items = [(pattern(i, 30, 20),) for i in range(12)]
    write(tmp_path / "a", IMAGE, items, 2)
    with Reader(tmp_path / "a") as reader:
        assert all(same(reader.decode(i, "image"), items[i][0]) for i in range(12))


def test_photographs_keep_their_bytes_when_passed_through(tmp_path, data_folder):
    with tarfile.open(data_folder / "imagenet_samples256.tar") as archive:
        members = [member for member in archive if member.isfile()][:24]
        photos = [archive.extractfile(member).read() for member in members]
    field = f.RGBImageField("passthrough")
    writer = write(tmp_path / "a", {"image": field}, [(f.EncodedImage(p),) for p in photos], 2)
    assert writer.counts["image"]["original bytes kept"] == 24
    with Reader(tmp_path / "a") as reader:
        for i, photo in enumerate(photos):
            assert reader.read(i, "image") == photo
            with Image.open(io.BytesIO(photo)) as image:
                expected = np.asarray(image.convert("RGB"))
            # two builds of one decoder may round chroma apart
            assert np.abs(reader.decode(i, "image").astype(int) - expected).max() <= 2


def test_photographs_encoded_anew_stay_close_to_the_pixels(tmp_path, data_folder):
    with tarfile.open(data_folder / "imagenet_samples256.tar") as archive:
        members = [member for member in archive if member.isfile()][:12]
        photos = [archive.extractfile(member).read() for member in members]
    field = f.RGBImageField("jpg", max_resolution=300)
    write(tmp_path / "a", {"image": field}, [(f.EncodedImage(p),) for p in photos], 2)
    with Reader(tmp_path / "a") as reader:
        for i, photo in enumerate(photos):
            got = reader.decode(i, "image").astype(int)
            assert max(got.shape) <= 300
            with Image.open(io.BytesIO(photo)) as image:
                size = got.shape[1::-1]
                expected = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
            assert np.abs(got - expected).mean() < 6


def test_indices_choose_and_order_the_samples(tmp_path):
    writer = DatasetWriter(tmp_path / "a", {"n": f.IntField()}, num_workers=1)
    writer.from_indexed_dataset(List([(i * i,) for i in range(10)]), indices=np.array([7, 2, 2]))
    with Reader(tmp_path / "a") as reader:
        assert [reader.decode(i, "n") for i in range(3)] == [49, 4, 4]


def test_shuffling_is_a_permutation_that_never_changes(tmp_path):
    for name in "ab":
        writer = DatasetWriter(tmp_path / name, {"n": f.IntField()}, num_workers=1)
        writer.from_indexed_dataset(List([(i,) for i in range(10)]), shuffle_indices=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Reader(tmp_path / "a") as reader:
        # computed apart from our code: files written years apart must agree
        assert reader.metadata["f0"].tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]


def test_class_names_history_and_counts_are_kept(tmp_path):
    items = [(pattern(i, 30, 20), i - 1) for i in range(3)]
    fields = {"image": f.RGBImageField("smart"), "label": f.IntField()}
    settings = {"class_names": {"label": ["cat", "dog"]}, "made": {"source": "here"}}
    writer = write(tmp_path / "a", fields, items, 2, chunksize=1, **settings)
    assert writer.counts["image"] == {"raw": 3}
    with Reader(tmp_path / "a") as reader:
        assert reader.class_names == {"label": ["cat", "dog"]}
        assert reader.made["source"] == "here"
        assert reader.made["counts"] == {"image": {"raw": 3}}


class Upside(f.BytesField):
    """A custom field: bytes stored backwards."""

    @staticmethod
    def from_binary(binary):
        return Upside()

    def encode(self, destination, value, malloc):
        super().encode(destination, value[::-1], malloc)

    def decode(self, metadata_row, payload):
        return payload[::-1]


def test_custom_fields_are_written_and_need_naming_when_read(tmp_path):
    write(tmp_path / "a", {"x": Upside()}, [(b"abc",)])
    with pytest.raises(BetonError, match=r"custom_fields=\{'x'"):
        Reader(tmp_path / "a")
    with Reader(tmp_path / "a", {"x": Upside}) as reader:
        assert reader.decode(0, "x") == b"abc"
        assert reader.read(0, "x") == b"cba"


class MadeForFfcv(f.Field):
    """Only what FFCV asks of a field."""

    @property
    def metadata_type(self):
        return np.dtype([("height", "<u2"), ("ptr", "<u8")])

    @staticmethod
    def from_binary(binary):
        return MadeForFfcv()

    def to_binary(self):
        return np.zeros(1, dtype=f.base.ARG_TYPE)[0]

    def encode(self, destination, value, malloc):
        destination["height"] = len(value)
        destination["ptr"], buffer = malloc(value.nbytes)
        buffer[:] = value.reshape(-1)

    def get_decoder_class(self):
        return None


def test_a_custom_field_made_for_ffcv_is_written_and_read(tmp_path):
    mask = np.arange(12, dtype=np.uint8).reshape(4, 3)
    write(tmp_path / "a", {"n": f.IntField(), "mask": MadeForFfcv()}, [(1, mask), (2, mask + 1)], 2)
    with Reader(tmp_path / "a", {"mask": MadeForFfcv}) as reader:
        assert reader.read(1, "mask") == (mask + 1).tobytes()
        assert reader.field_metadata("mask")["height"].tolist() == [4, 4]
        with pytest.raises(TypeError, match="has no method decode; define one"):
            reader.decode(0, "mask")


@pytest.mark.slow
def test_writing_works_where_processes_cannot_fork(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    samples = Samples(make_columns(5, 40, 30))
    write(tmp_path / "spawned", all_fields(), samples, 2, chunksize=2)
    write(tmp_path / "alone", all_fields(), samples)
    assert (tmp_path / "spawned").read_bytes() == (tmp_path / "alone").read_bytes()


def test_writing_works_beside_threads_and_torch(tmp_path):
    import torch

    # starts torch's thread pool, which forks do not inherit
    torch.randn(300, 300) @ torch.randn(300, 300)

    class Products:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return (int((torch.ones(300, 300) @ torch.ones(300, 300)).sum()) + index,)

    writer = DatasetWriter(tmp_path / "a", {"x": f.IntField()}, num_workers=2)
    writer.from_indexed_dataset(Products(), chunksize=1)
    with Reader(tmp_path / "a") as reader:
        assert [reader.decode(i, "x") for i in range(8)] == [300**3 + i for i in range(8)]
