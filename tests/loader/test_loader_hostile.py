"""Files of any origin: damage and lies give a BetonError or the right pixels, never a crash or a
wrong image."""

import shutil

import numpy as np
import pytest
from support.beton_files import without_integrity
from support.loading import epoch_of, samples_of, two_views

from ffcv_ssl import BetonError, Loader, Reader


def patched(path, source, offset, value):
    shutil.copy(source, path)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(value)
    return str(path)


def load(path):
    with Loader(path, 16, num_workers=1, seed=5, drop_last=False, pipelines=two_views()) as loader:
        return samples_of(loader)


@pytest.fixture(scope="module")
def sequential(small_beton):
    return load(small_beton)


def test_a_flipped_bit_anywhere_never_yields_a_wrong_image(small_beton, sequential, tmp_path):
    """The file is mostly padding, where a flip does no harm; half of the flips go to payloads."""
    rng = np.random.default_rng(0)
    content = np.fromfile(small_beton, np.uint8)
    with Reader(small_beton) as reader:
        extents = reader.extents("image")
    raised = 0
    for number in range(60):
        sample = rng.integers(97)
        offset = int(extents.pointer[sample]) + int(rng.integers(extents.size[sample]))
        if number % 2:
            offset = int(rng.integers(content.size))
        flipped = bytes([content[offset] ^ (1 << rng.integers(8))])
        path = patched(tmp_path / "flipped.beton", small_beton, offset, flipped)
        try:
            assert load(path) == sequential
        except BetonError as error:
            assert "\n" not in str(error)
            raised += 1
    assert raised >= 30  # every flip inside a payload


def test_a_truncated_file_never_loads(small_beton, tmp_path):
    content = open(small_beton, "rb").read()  # noqa: SIM115
    for part in (0.999999, 0.9, 0.5, 0.1, 0.0):
        path = tmp_path / "cut.beton"
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(BetonError):
            load(str(path))


@pytest.mark.parametrize("columns", ["height", "width"])
def test_metadata_that_lies_about_a_jpegs_size_is_an_error_of_that_sample(
    small_beton, tmp_path, columns
):
    """Without checksums nothing else would notice."""
    path = tmp_path / "foreign.beton"
    shutil.copy(small_beton, path)
    without_integrity(path)
    with Reader(path) as reader:
        assert not reader.verified
        metadata = reader.field_metadata("image")
        sample = int(np.flatnonzero(metadata["mode"] == 0)[0])
        whole = reader.metadata
        row = whole[sample : sample + 1].tobytes()
    changed = np.frombuffer(row, whole.dtype).copy()
    changed["f0"][columns] = 300
    content = path.read_bytes()
    assert content.count(row) == 1
    path.write_bytes(content.replace(row, changed.tobytes()))
    with pytest.raises(BetonError, match=rf"sample {sample}, field 'image': .*metadata says"):
        load(str(path))


def test_a_file_without_checksums_loads_the_same_and_says_so(
    small_beton, sequential, tmp_path, caplog
):
    path = tmp_path / "foreign.beton"
    shutil.copy(small_beton, path)
    without_integrity(path)
    assert load(str(path)) == sequential
    assert sum("unverified" in record.getMessage() for record in caplog.records) == 1


def test_damage_in_a_file_without_checksums_never_crashes(small_beton, tmp_path):
    foreign = tmp_path / "foreign.beton"
    shutil.copy(small_beton, foreign)
    without_integrity(foreign)
    rng = np.random.default_rng(1)
    size = foreign.stat().st_size
    with Reader(foreign) as reader:
        extents = reader.extents("image")
    for _ in range(60):
        sample = rng.integers(97)
        offset = int(extents.pointer[sample]) + int(rng.integers(extents.size[sample]))
        if rng.random() < 0.5:
            offset = int(rng.integers(size))
        path = patched(tmp_path / "damaged.beton", foreign, offset, rng.bytes(4))
        try:
            epoch_of(path)
        except BetonError as error:
            assert "\n" not in str(error)
