"""Shared by all tests: where photographs lie, and a small dataset."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder():
    """The folder of photographs (FFCV_SSL_TEST_DATA, default ../shared/data); the test is skipped
    where it is absent."""
    folder = Path(os.environ.get("FFCV_SSL_TEST_DATA", REPOSITORY / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no test photographs: {folder} is not a folder (set FFCV_SSL_TEST_DATA)")
    return folder


class SmallImages:
    """Generated images of many sizes, some smooth, some noisy; item: (image, label, weight,
    name)."""

    def __init__(self, count, fixed_size=None):
        self.count, self.fixed_size = count, fixed_size

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        height, width = self.fixed_size or rng.integers(20, 90, 2)
        ramps = np.add.outer(np.arange(height) * 2.0, np.arange(width))[..., None]
        image = ramps * rng.uniform(0.3, 1.5, 3) + rng.uniform(0, 60, 3)
        image += rng.normal(0, 8, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8), i % 7, i / 3, f"sample {i}".encode()


def write_small(path, count, fixed_size=None, mode="smart", page_size=None):
    """A small `.beton` with fields image, label, weight, name; half of its images JPEG, half raw
    (mode "proportion")."""
    from ffcv_ssl import DatasetWriter
    from ffcv_ssl.fields import BytesField, FloatField, IntField, RGBImageField

    image = RGBImageField(write_mode=mode, compress_probability=0.5)
    fields = {"image": image, "label": IntField(), "weight": FloatField(), "name": BytesField()}
    extra = {} if page_size is None else {"page_size": page_size}
    writer = DatasetWriter(str(path), fields, num_workers=1, **extra)
    writer.from_indexed_dataset(SmallImages(count, fixed_size))
    return str(path)


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory):
    """97 images of many sizes, JPEG and raw mixed."""
    return write_small(tmp_path_factory.mktemp("small") / "small.beton", 97, mode="proportion")


@pytest.fixture(scope="session")
def raw_beton(tmp_path_factory):
    """200 raw images of 16 x 16."""
    return write_small(tmp_path_factory.mktemp("raw") / "raw.beton", 200, (16, 16), mode="raw")


SOUND_SAMPLES = 6


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A file of ours with every field type; not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "a.beton"
    from beton_files import make_columns, write_all_fields

    write_all_fields(path, make_columns(SOUND_SAMPLES, 26, 19), made={"by": "test"})
    return path


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copy(sound, tmp_path / "copy.beton"))


@pytest.fixture
def foreign(copy):
    """The same file without checksums, as FFCV would have written it."""
    from beton_files import without_integrity

    without_integrity(copy)
    return copy
