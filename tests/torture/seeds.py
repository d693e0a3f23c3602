"""Small sound `.beton` files of every kind, in parts: what mutants are made from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from support.beton_files import Samples, all_fields, make_columns, without_integrity

from ffcv_ssl import beton
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import CenterCrop, ToTensor
from ffcv_ssl.writer import DatasetWriter
from torture.oracle import read_values

CROP_PX = (4, 5)
"""(H, W) of the views that a loader makes of a seed's images."""


class Seed:
    """A sound file in memory, and what it holds. `parts` are its bytes; all pages are one hole."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        with Reader(path) as reader:
            regions, table_offset = reader._regions, reader._table_offset
            self.is_verified, self._data_end = reader.verified, reader._data_end
            self.num_rows, self.num_fields = len(reader.alloc_table), len(reader.fields)
            self.dtype = reader.metadata.dtype
            images = [n for n, field in reader.fields.items() if isinstance(field, f.RGBImageField)]
            self.crops = {name: [CenterCrop(CROP_PX, 1), ToTensor()] for name in images}
            self.extents = [reader.extents(name) for name in reader.fields]
            end = np.uint64(self._data_end if self.is_verified else table_offset)
            first = int(reader.alloc_table["ptr"].min(initial=end))
            self.text_bytes = len(reader._text)
        self.values = read_values(path)
        self.first = first
        content = path.read_bytes()
        cuts = {
            "header": (0, 24),
            "descriptors": (24, regions.metadata),
            "metadata": (regions.metadata, regions.metadata_end),
            "payloads": (first, self._data_end if self.is_verified else table_offset),
            "table": (table_offset, len(content)),
        }
        if self.is_verified:
            cuts["text"] = (self._data_end, self._data_end + self.text_bytes)
        self.parts = {name: content[begin:end] for name, (begin, end) in cuts.items()}
        self.head = content[: regions.locator_end]
        self.tail = content[first:]
        self.regions = regions
        self.written = self.head, self.tail
        self.fd = os.open(path, os.O_RDWR)

    def write(self, head: bytes, tail: bytes, end: int | None = None) -> None:
        """Make the file this one; end: its size, if it is not to end with `tail`."""
        size = self.first + len(tail)
        self.written = head, tail
        os.pwrite(self.fd, head, 0)
        os.pwrite(self.fd, tail, self.first)
        os.ftruncate(self.fd, size if end is None else end)

    def bytes_at(self, begin: int, size: int) -> bytes:
        """What the file now has there: before its pages, or in its data and behind."""
        head, tail = self.written
        if begin < self.first:
            return head[begin : begin + size].ljust(min(size, self.first - begin), b"\0")
        return tail[begin - self.first :][:size]

    def restore(self) -> None:
        os.ftruncate(self.fd, self.first + len(self.tail))
        self.write(self.head, self.tail)


class Pictures:
    """Tiny images, some smooth, some noisy; item: (image, label)."""

    def __init__(self, count, largest=12):
        self.count, self.largest = count, largest

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = np.random.default_rng(index)
        shape = (*draw.integers(1, self.largest, 2), 3)
        return draw.integers(0, 256, shape, np.uint8), index % 3


def make_seeds(folder: Path) -> list[Seed]:
    """Small sound files of every kind: all fields and one, raw, jpg and smart, 1 to 50 samples,
    names or none, with an integrity section and without."""
    folder.mkdir(parents=True, exist_ok=True)
    page = beton.MIN_PAGE_BYTES
    about = {"class_names": {"label": ["cat", "dog", "owl"]}, "made": {"by": "test"}}

    def write(name, fields, samples, **settings):
        path = folder / f"{name}.beton"
        DatasetWriter(path, fields, page, 1, **settings).from_indexed_dataset(samples)
        return path

    columns = make_columns(2, 7, 5)
    names = [f"a/{index}.jpg" for index in range(50)]
    smart = f.RGBImageField("smart", smart_threshold=200)
    both = {"image": f.RGBImageField("proportion"), "label": f.IntField()}
    paths = [
        write("all", all_fields(), Samples(columns), made={"by": "test"}),
        write("one", {"image": f.RGBImageField("jpg")}, [(Pictures(9)[3][0],)]),
        write("raw", {"image": f.RGBImageField("raw"), "label": f.IntField()}, Pictures(5)),
        write("smart", {"image": smart, "label": f.IntField()}, Pictures(4), names=names[:4]),
        write("many", both, Pictures(50, 6), names=names, **about),
        write("numbers", {"label": f.IntField(), "x": f.FloatField()}, [(3, 0.5), (-1, 2.5)] * 2),
        write("empty", {"b": f.BytesField(), "c": f.BytesField()}, [(b"", b"ab"), (b"c", b"")]),
    ]
    foreign = []
    for path in paths:
        copy = path.with_name(f"foreign_{path.name}")
        copy.write_bytes(path.read_bytes())
        without_integrity(copy)
        foreign.append(copy)
    return [Seed(path) for path in paths + foreign]
