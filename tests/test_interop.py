"""The real ffcv 1.0.2 reads our files and we read its files: equal values, in every cache mode.

Needs an interpreter that has ffcv: FFCV_SSL_INTEROP_PYTHON, or what `.ci/install_ffcv` makes.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
PYTHON = Path(
    os.environ.get("FFCV_SSL_INTEROP_PYTHON")
    or _CACHE / "ffcv-ssl" / "ffcv-1.0.2" / "bin" / "python"
)
SCRIPT = Path(__file__).with_name("support") / "interop_ffcv.py"
NUM_SAMPLES, HEIGHT_PX, WIDTH_PX = 40, 213, 167  # raw images alone fill more than one page

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no ffcv at {PYTHON}: run .ci/install_ffcv first"
    ),
]


def run_ffcv(*arguments):
    done = subprocess.run(
        [PYTHON, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def values():
    """Columns of NUM_SAMPLES values each. Smooth images, as JPEG is meant for, with some noise."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (NUM_SAMPLES, 8, 6, 3), dtype=np.uint8)
    image = coarse.repeat(27, axis=1).repeat(28, axis=2)[:, :HEIGHT_PX, :WIDTH_PX]
    noise = rng.integers(0, 30, image.shape, dtype=np.uint8)
    notes = [json.dumps({"id": i, "text": "\u00e9" * (i % 3)}) for i in range(NUM_SAMPLES)]
    return {
        "image": (image // 2 + noise).astype(np.uint8),
        "label": rng.integers(-(2**62), 2**62, NUM_SAMPLES),
        "score": rng.standard_normal(NUM_SAMPLES),
        "blob": rng.integers(1, 256, (NUM_SAMPLES, 50), dtype=np.uint8),
        "blob_size": np.arange(NUM_SAMPLES) % 50 + 1,
        "box": rng.standard_normal((NUM_SAMPLES, 3, 4)).astype(np.float32),
        "tensor": rng.integers(-9, 9, (NUM_SAMPLES, 5)),
        "note": np.array(notes),
    }


class Samples:
    def __init__(self, values):
        self.values = values
        self.grey = [
            simplejpeg.encode_jpeg(image[:, :, :1].copy(), 85, "GRAY", "Gray")
            for image in values["image"]
        ]

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        v = {name: column[index] for name, column in self.values.items()}
        return (
            v["image"],
            v["image"],
            f.EncodedImage(self.grey[index]),
            int(v["label"]),
            float(v["score"]),
            v["blob"][: v["blob_size"]],
            v["box"],
            torch.from_numpy(v["tensor"]),
            json.loads(str(v["note"])),
        )


@pytest.fixture(scope="module")
def our_file(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "ours.beton"
    fields = {
        "raw": f.RGBImageField("raw"),
        "jpg": f.RGBImageField("jpg", jpeg_quality=90),
        "kept": f.RGBImageField("passthrough"),
        "label": f.IntField(),
        "score": f.FloatField(),
        "blob": f.BytesField(),
        "box": f.NDArrayField(np.float32, (3, 4)),
        "tensor": f.TorchTensorField(torch.int64, (5,)),
        "note": f.JSONField(),
    }
    names = [hashlib.sha512(b"%d" % i).hexdigest() for i in range(NUM_SAMPLES)]
    writer = DatasetWriter(path, fields, page_size=1 << 21, num_workers=2, names=names)
    writer.from_indexed_dataset(Samples(values), chunksize=7)
    with Reader(path) as reader:
        assert reader.names == tuple(names)  # FFCV steps over them
    return path


@pytest.fixture(scope="module")
def their_file(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    np.savez(folder / "values.npz", **values)
    run_ffcv("write", folder / "values.npz", folder / "theirs.beton")
    return folder / "theirs.beton"


@pytest.mark.parametrize("options", [(), ("--no-os-cache",), ("--no-os-cache", "--random")])
def test_ffcv_reads_every_field_of_our_files(our_file, values, tmp_path, options):
    run_ffcv("read", our_file, tmp_path / "out.npz", *options)
    out = np.load(tmp_path / "out.npz")
    order = out["_order"]
    assert sorted(order) == list(range(NUM_SAMPLES))
    assert np.array_equal(out["raw"], values["image"][order])
    for name in ("label", "score"):
        assert np.array_equal(out[name][:, 0], values[name][order])
    for name in ("box", "tensor", "note"):
        assert np.array_equal(out[name], values[name][order])
    with Reader(our_file) as reader:
        for row, sample in enumerate(order):
            size = values["blob_size"][sample]
            assert np.array_equal(out["blob"][row, :size], values["blob"][sample, :size])
            for name in ("jpg", "kept"):
                payload = reader.read(sample, name)
                expected = simplejpeg.decode_jpeg(payload, "RGB", fastdct=True)
                assert np.array_equal(out[name][row], expected)


def test_ffcv_sees_the_original_bytes_of_kept_jpegs(our_file, values):
    with Reader(our_file) as reader:
        assert [reader.read(i, "kept") for i in range(NUM_SAMPLES)] == Samples(values).grey


def test_we_read_every_field_of_ffcvs_files(their_file, values, tmp_path):
    run_ffcv("read", their_file, tmp_path / "out.npz")
    theirs = np.load(tmp_path / "out.npz")
    with Reader(their_file) as reader:
        assert not reader.verified
        assert reader.num_samples == NUM_SAMPLES
        for i in range(NUM_SAMPLES):
            assert np.array_equal(reader.decode(i, "raw"), values["image"][i])
            assert reader.decode(i, "label") == values["label"][i]
            assert reader.decode(i, "score") == values["score"][i]
            assert reader.decode(i, "blob") == values["blob"][i, : values["blob_size"][i]].tobytes()
            assert np.array_equal(reader.decode(i, "box"), values["box"][i])
            assert torch.equal(reader.decode(i, "tensor"), torch.from_numpy(values["tensor"][i]))
            assert reader.decode(i, "note") == json.loads(str(values["note"][i]))
            payload = reader.read(i, "jpg")
            fast = simplejpeg.decode_jpeg(payload, "RGB", fastdct=True)
            assert np.array_equal(fast, theirs["jpg"][i])
            assert np.array_equal(reader.decode(i, "jpg"), simplejpeg.decode_jpeg(payload, "RGB"))


def test_a_file_of_ints_alone_travels_both_ways(values, tmp_path):
    class Labels:
        def __len__(self):
            return NUM_SAMPLES

        def __getitem__(self, index):
            return (int(values["label"][index]),)

    DatasetWriter(
        tmp_path / "a.beton", {"label": f.IntField()}, num_workers=1
    ).from_indexed_dataset(Labels())
    run_ffcv("read", tmp_path / "a.beton", tmp_path / "out.npz")
    assert np.array_equal(np.load(tmp_path / "out.npz")["label"][:, 0], values["label"])
