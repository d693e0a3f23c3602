"""What the loader refuses while it reads, and the line that says so."""

import copy
import shutil
import types

import numpy as np
import pytest
from support.beton_files import patch, write

from ffcv_ssl import BetonError, Loader, Reader, inspect
from ffcv_ssl.errors import NotCopyable, UserError
from ffcv_ssl.fields import IntField, NDArrayField, RGBImageField
from ffcv_ssl.fields.ndarray import NDArrayDecoder
from ffcv_ssl.jobs import slurm
from pipelines.__main__ import _image_field


def make_loader(path, **settings):
    return Loader(str(path), 2, num_workers=1, seed=0, drop_last=False, **settings)


@pytest.fixture
def images(tmp_path):
    """Two JPEGs."""
    path = tmp_path / "a.beton"
    picture = np.zeros((8, 8, 3), np.uint8)
    write(path, {"image": RGBImageField("jpg"), "label": IntField()}, [(picture, 0), (picture, 1)])
    return path


def test_a_file_without_a_sample_that_replaces_a_bad_one_is_refused(images, tmp_path):
    bad = shutil.copy(images, tmp_path / "bad.beton")
    with Reader(bad) as reader:
        pointers = reader.extents("image").pointer.tolist()
    for pointer in pointers:
        patch(bad, pointer + 30, b"\x5a\x5a")
    with make_loader(bad, on_error="replace") as loader:
        with pytest.raises(
            BetonError,
            match=r"checksum does not match.* \(no valid sample to replace it was found in \d+ ",
        ):
            list(loader)


def test_an_image_that_is_decoded_to_another_size_is_an_error(images, monkeypatch):
    class Decoder:
        """A decoder gone wrong."""

        @staticmethod
        def decode_jpeg(*_, **__):
            return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("ffcv_ssl.loader.decoding.simplejpeg", Decoder)
    with make_loader(images, decoder="simplejpeg") as loader:
        with pytest.raises(
            BetonError,
            match=r"decoded to \(4, 4, 3\), expected \(8, 8, 3\)\); re-write it, or load",
        ):
            list(loader)


def test_a_picture_of_a_file_without_images_is_refused(tmp_path):
    path = tmp_path / "labels.beton"
    write(path, {"label": IntField()}, [(1,)])
    with Reader(path) as reader:
        with pytest.raises(
            BetonError, match=r"got the fields \['label'\], expected one of images to draw"
        ):
            inspect.draw_grid(reader, str(tmp_path / "a.png"))
        with pytest.raises(UserError, match=r"labels.beton: no image field; the file has: label"):
            _image_field(reader)


def test_a_job_without_a_file_to_train_on_is_refused(tmp_path):
    command = types.SimpleNamespace(folder=str(tmp_path), script="train.py")
    job = slurm.Job(command, {"data": {"train": ""}, "out": str(tmp_path)}, slurm.SlurmConfig())
    with pytest.raises(
        UserError,
        match=r"data.train: got no file to train on; write one with write_dataset.py",
    ):
        slurm._check(job)


def test_what_prepares_batches_is_not_copied(images):
    with make_loader(images) as loader:
        with pytest.raises(
            NotCopyable,
            match=r"a.beton: a Loader cannot be copied or pickled, as it has threads and an open "
            "file; make another Loader, and give it this one's state_dict",
        ):
            copy.copy(loader)
        with pytest.raises(
            NotCopyable,
            match=r"a.beton: an epoch's iterator cannot be copied or pickled, as batches are in "
            "preparation for it; copy the loader's state_dict instead",
        ):
            copy.copy(iter(loader))


@pytest.mark.parametrize("dtype", ["<M8[s]", "<U3", "|V4"])
def test_arrays_that_torch_cannot_hold_are_refused_at_once(tmp_path, dtype):
    path = tmp_path / "a.beton"
    write(path, {"when": NDArrayField(dtype, (2,))}, [(np.zeros(2, dtype),)] * 3)
    said = r"field 'when': got arrays of .*, expected a type that torch has too; give the field a"
    with pytest.raises(UserError, match=said):
        make_loader(path)
    with make_loader(path, pipelines={"when": [NDArrayDecoder()]}) as loader:
        assert sum(len(batch.when) for batch in loader) == 3
