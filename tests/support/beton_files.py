"""Small files for the tests of the format: every field type, and what comes back."""

import json

import numpy as np
import torch

from ffcv_ssl import BetonError, beton
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter

PAGE_BYTES = beton.MIN_PAGE_BYTES


def pattern(index, height_px, width_px):
    """A smooth picture that is different for every index; uint8 (H, W, 3), the same on every
    machine.
    """
    y, x, c = np.ogrid[:height_px, :width_px, :3]
    return ((index * 37 + y * 5 + x * 3 + c * 67) % 256).astype(np.uint8)


def make_columns(num_samples, height_px, width_px):
    """Columns of values for `all_fields`, as tests/support/interop_ffcv.py takes them."""
    index = np.arange(num_samples)
    notes = [json.dumps({"id": int(i), "text": "\u00e9" * (i % 3)}) for i in index]
    return {
        "image": np.stack([pattern(i, height_px, width_px) for i in index]),
        "label": index * 2**40 - 1,
        "score": index / 7 - 1,
        "blob": (index[:, None] * 3 + np.arange(9) * 5 + 1).astype(np.uint8),
        "blob_size": index % 9 + 1,
        "box": (index[:, None, None] + np.arange(6).reshape(2, 3) / 8).astype(np.float32),
        "tensor": index[:, None] - np.arange(4),
        "note": np.array(notes),
    }


class Samples:
    """A dataset over such columns, for `all_fields`."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, index):
        v = {name: column[index] for name, column in self.columns.items()}
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


def all_fields():
    return {
        "raw": f.RGBImageField("raw"),
        "jpg": f.RGBImageField("jpg"),
        "label": f.IntField(),
        "score": f.FloatField(),
        "blob": f.BytesField(),
        "box": f.NDArrayField(np.float32, (2, 3)),
        "tensor": f.TorchTensorField(torch.int64, (4,)),
        "note": f.JSONField(),
    }


def write_all_fields(path, columns, num_workers=1, **settings):
    writer = DatasetWriter(path, all_fields(), PAGE_BYTES, num_workers, **settings)
    writer.from_indexed_dataset(Samples(columns))


def same(a, b):
    """Equality of two decoded values of one field."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


class List:
    """A dataset of given tuples; a callable item is called first, so that it can fail or die."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return item() if callable(item) else item


def without_integrity(path):
    """Turn a file of ours into one as FFCV would have left it, by wiping both marks."""
    with open(path, "r+b") as file:
        header = np.frombuffer(file.read(beton.HEADER_TYPE.itemsize), beton.HEADER_TYPE)[0]
        raw = file.read(int(header["num_fields"]) * beton.DESCRIPTOR_TYPE.itemsize)
        descriptors = np.frombuffer(raw, beton.DESCRIPTOR_TYPE)
        fields = [f.BUILT_IN[d["type_id"]].from_binary(d["arguments"]) for d in descriptors]
        itemsize = beton.metadata_type(fields).itemsize
        regions = beton.layout(header["num_fields"], header["num_samples"], itemsize)
        file.seek(regions.metadata_end)
        file.write(bytes(beton.LOCATOR_TYPE.itemsize))
        file.seek(int(header["alloc_table_ptr"]) - beton.FOOTER_TYPE.itemsize)
        file.write(bytes(beton.FOOTER_TYPE.itemsize))


def write(path, fields, items, num_workers=1, page_size=PAGE_BYTES, chunksize=100, **settings):
    writer = DatasetWriter(path, fields, page_size, num_workers, **settings)
    writer.from_indexed_dataset(
        items if hasattr(items, "columns") else List(items), None, chunksize
    )
    return writer


def encode(field, value):
    """(metadata array (1,), payload bytes) of one value."""
    metadata, buffers = np.zeros(1, field.metadata_type), []

    def malloc(size):
        buffers.append(np.zeros(size, np.uint8))
        return 4096, buffers[-1]

    field.encode(metadata, value, malloc)
    assert len(buffers) <= 1
    return metadata, b"".join(b.tobytes() for b in buffers)


def values(path):
    """{(sample, field): value or the BetonError of reading it}. Errors of opening are raised."""
    out = {}
    with Reader(path) as reader:
        for i in range(reader.num_samples):
            for name in reader.fields:
                try:
                    out[i, name] = reader.decode(i, name)
                except BetonError as error:
                    assert "\n" not in str(error)
                    out[i, name] = error
    return out


def patch(path, offset, raw):
    """Overwrite bytes of a file; returns what was there."""
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(len(raw))
        file.seek(offset)
        file.write(raw)
    return old


def regions_of(path):
    with Reader(path) as reader:
        return reader._regions, reader._table_offset, reader.alloc_table.copy()
