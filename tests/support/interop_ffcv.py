"""One side of tests/test_interop.py: run by the interpreter that has ffcv 1.0.2, never imported.

python interop_ffcv.py write VALUES.npz OUT.beton
python interop_ffcv.py read IN.beton OUT.npz [--no-os-cache] [--random]
"""

import json
import sys
import types


def _stand_in_for_cupy():
    """ffcv's ops for GPUs import cupy at import time; the tests use none of them."""
    try:
        import cupy  # noqa: F401
    except ImportError:
        sys.modules["cupy"] = types.ModuleType("cupy")


_stand_in_for_cupy()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ffcv import DatasetWriter, Loader  # noqa: E402
from ffcv.fields import (  # noqa: E402
    BytesField,
    FloatField,
    IntField,
    JSONField,
    NDArrayField,
    RGBImageField,
    TorchTensorField,
)
from ffcv.loader import OrderOption  # noqa: E402


class Samples:
    def __init__(self, path):
        self.values = dict(np.load(path))

    def __len__(self):
        return len(self.values["image"])

    def __getitem__(self, index):
        v = {name: column[index] for name, column in self.values.items()}
        return (
            v["image"],
            v["image"],
            int(v["label"]),
            float(v["score"]),
            v["blob"][: v["blob_size"]],
            v["box"],
            torch.from_numpy(v["tensor"]),
            json.loads(str(v["note"])),
        )


def write(values_path, beton_path):
    samples = Samples(values_path)
    box, tensor = samples.values["box"], samples.values["tensor"]
    fields = {
        "raw": RGBImageField(write_mode="raw"),
        "jpg": RGBImageField(write_mode="jpg", jpeg_quality=90),
        "label": IntField(),
        "score": FloatField(),
        "blob": BytesField(),
        "box": NDArrayField(box.dtype, box.shape[1:]),
        "tensor": TorchTensorField(torch.from_numpy(tensor).dtype, tensor.shape[1:]),
        "note": JSONField(),
    }
    writer = DatasetWriter(beton_path, fields, page_size=1 << 21, num_workers=2)
    writer.from_indexed_dataset(samples, chunksize=5)


def read(beton_path, out_path, *options):
    order = OrderOption.RANDOM if "--random" in options else OrderOption.SEQUENTIAL
    loader = Loader(
        beton_path,
        batch_size=16,
        num_workers=1,
        os_cache="--no-os-cache" not in options,
        order=order,
        seed=1,
        drop_last=False,
    )
    names = list(loader.reader.handlers)
    columns = {name: [] for name in names}
    for batch in loader:
        for name, value in zip(names, batch):
            columns[name].append(value.numpy().copy())
    out = {name: np.concatenate(parts) for name, parts in columns.items()}
    if "note" in out:  # ffcv reads a JSON field back as a plain BytesField
        out["note"] = np.array([json.dumps(x) for x in JSONField.unpack(out["note"])])
    out["_order"] = np.array(loader.traversal_order.sample_order(0))
    np.savez(out_path, **out)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
