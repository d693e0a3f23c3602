"""dataset -> `.beton` file, in parallel, all or nothing.

The file's bytes depend on the dataset and the fields alone, not on the number of workers or the
size of chunks. The file is written under a temporary name in the same folder, header last, flushed
to disk and renamed. A failed writer leaves nothing behind; what a killed writer leaves does not
open, and the next writer of the same file removes it. Where two write one file at once, the file is
that of the writer that ends last.

    writer = DatasetWriter("train.beton", {"image": RGBImageField("jpg"), "label": IntField()})
    writer.from_indexed_dataset(dataset)          # dataset[i] -> (image, label)
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import BetonError
from ffcv_ssl.fields import BUILT_IN, IntField
from ffcv_ssl.fields.base import Field
from ffcv_ssl.files import StrPath, check_target
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.writer.pool import (
    Chunk,
    Encoded,
    SampleEncoder,
    SampleError,
    add_counts,
    encode_in_order,
)
from ffcv_ssl.writer.unfinished import UnfinishedFile, unfinished

MIN_PAGE_SIZE = beton.MIN_PAGE_BYTES
MAX_PAGE_SIZE = beton.MAX_PAGE_BYTES
_PROGRESS_INTERVAL_S = 10.0


class DatasetWriter:
    """Writes one `.beton` file.

    path: the file to make or replace; of a link, the file that it points to. fields: name -> Field,
    in the order of a sample's values; names are ASCII of at most 16 bytes. page_size: a power of
    two from 2 MiB to 2 GiB; it grows until it holds the largest sample, since no sample may cross a
    page. num_workers: processes; -1: one per usable core, 1: this process alone. class_names:
    field -> names of its labels 0, 1, ... made: how the data came about, serialisable as JSON.
    names: a file name for each item of the dataset, by its index. The file keeps class_names, made
    and names.

    After writing, `counts` says for each field how many images were kept or encoded, and why.
    Raises ValueError for impossible settings, UserError (a ValueError) for a path that is a device,
    a pipe, a socket or a folder, BetonError for data that does not fit the fields.
    Source: FFCV's DatasetWriter.
    """

    def __init__(
        self,
        path: StrPath,
        fields: Mapping[str, Field],
        page_size: int = 4 * MIN_PAGE_SIZE,
        num_workers: int = -1,
        *,
        class_names: Mapping[str, Sequence[str]] | None = None,
        made: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.fields = dict(fields)
        self.page_size = page_size
        self.num_workers = num_workers if num_workers >= 1 else len(usable_cores())
        self.class_names = {name: list(names) for name, names in (class_names or {}).items()}
        self.made = dict(made or {})
        self.names = names
        self.counts: dict[str, Counter[str]] = {}
        self._check_settings()

    def _check_settings(self) -> None:
        check_target(self.path)
        if not self.fields:
            raise ValueError(f"{self.path}: no fields to write, expected at least one")
        for name in self.fields:
            beton.checked_name(name)
        is_power = self.page_size > 0 and self.page_size & (self.page_size - 1) == 0
        if not is_power or not MIN_PAGE_SIZE <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(
                f"page_size: got {self.page_size}, expected a power of two from {MIN_PAGE_SIZE} to "
                f"{MAX_PAGE_SIZE}"
            )
        for name in self.class_names:
            if not isinstance(self.fields.get(name), IntField):
                raise ValueError(
                    f"class_names: got names for '{name}', which is not an IntField of this "
                    "file; name one of its integer fields"
                )
        try:
            beton.pack_text(self.class_names, self.made)
        except TypeError as error:
            raise ValueError(f"made: {error}; give plain values") from None

    def from_indexed_dataset(
        self,
        dataset: Any,
        indices: Iterable[int] | None = None,
        chunksize: int = 100,
        shuffle_indices: bool = False,
    ) -> None:
        """Write dataset[i] for i in `indices` (default: all, in order) as samples 0, 1, ...

        dataset: `dataset[i]` is a tuple with one value per field; `len(dataset)` is needed only
        without `indices`. chunksize: samples that a worker takes at once. shuffle_indices: permute
        the samples, the same way every time.
        """
        sources = [int(i) for i in (range(len(dataset)) if indices is None else indices)]
        if not sources:
            raise ValueError(f"{self.path}: the dataset is empty, expected at least 1 sample")
        if chunksize < 1:
            raise ValueError(f"chunksize: got {chunksize}, expected at least 1")
        if shuffle_indices:
            sources = [sources[position] for position in _fixed_permutation(len(sources))]
        chunks = [
            Chunk(first, sources[first : first + chunksize])
            for first in range(0, len(sources), chunksize)
        ]
        encoder = SampleEncoder(self.fields, dataset)
        names = self._pack_names(sources)
        # Load the hash kernel now: once and not in every worker, and before the file is made, as an
        # interrupt that comes while numba loads a kernel can get lost in one of its callbacks.
        xxh3_64(b"")
        try:
            with unfinished(self.path) as file:
                self._write(file, encoder, chunks, len(sources), names)
        except SampleError as error:
            raise BetonError(f"{self.path}: {error}") from error.__cause__

    def _pack_names(self, sources: list[int]) -> tuple[bytes, beton.NamesPlace] | None:
        if self.names is None:
            return None
        if max(sources) >= len(self.names):
            raise ValueError(
                f"names: got {len(self.names)} names, expected one for each item of the dataset; "
                f"item {max(sources)} has none"
            )
        return beton.pack_names([self.names[source] for source in sources])

    def _write(
        self,
        file: UnfinishedFile,
        encoder: SampleEncoder,
        chunks: list[Chunk],
        num_samples: int,
        names: tuple[bytes, beton.NamesPlace] | None,
    ) -> None:
        body = _Body(file, self.fields, encoder.metadata_type, num_samples, self.page_size)
        self.counts = {}
        # closing: if writing fails, the workers end now and not when the traceback is collected
        encoded = closing(encode_in_order(encoder, chunks, self.num_workers))
        with encoded as parts, _progress(self.path, num_samples) as advance:
            for part in parts:
                add_counts(self.counts, part.counts)
                advance(body.append(part))
        self._check_labels(body.metadata)
        names_place = None if names is None else body.append_names(*names)
        body.finish(beton.pack_text(self.class_names, self._history(), names_place))

    def _check_labels(self, metadata: np.ndarray) -> None:
        for index, name in enumerate(self.fields):
            names = self.class_names.get(name)
            if names is not None:
                low, high = int(metadata[f"f{index}"].min()), int(metadata[f"f{index}"].max())
                if low < -1 or high >= len(names):
                    raise BetonError(
                        f"{self.path}: field '{name}': got labels {low} to {high}, expected -1 "
                        f"(unlabelled) to {len(names) - 1}, as there are {len(names)} class names"
                    )

    def _history(self) -> dict[str, Any]:
        from ffcv_ssl import __version__

        counts = {name: dict(count) for name, count in self.counts.items() if count}
        return {"writer": f"ffcv-ssl {__version__}", "counts": counts, **self.made}


class _Body:
    """The file while it grows: places payloads in pages, collects metadata and table."""

    def __init__(
        self,
        file: UnfinishedFile,
        fields: Mapping[str, Field],
        metadata_type: np.dtype,
        num_samples: int,
        page_size: int,
    ) -> None:
        self._file = file
        self._fields = fields
        self._page_size = page_size
        self._regions = beton.layout(len(fields), num_samples, metadata_type.itemsize)
        self._num_samples = num_samples
        self._raw = np.zeros(num_samples * metadata_type.itemsize, np.uint8)
        self.metadata = self._raw.view(metadata_type)
        self._next_sample = 0
        self._position = -(-self._regions.locator_end // page_size) * page_size
        self._tables: list[np.ndarray] = []
        self._checksums: list[np.ndarray] = []
        self._data_end = self._regions.locator_end

    def append(self, part: Encoded) -> int:
        """Write encoded samples; returns their number."""
        num_samples = len(part.metadata) // self.metadata.dtype.itemsize
        rows = slice(self._next_sample, self._next_sample + num_samples)
        start = rows.start * self.metadata.dtype.itemsize
        raw = np.frombuffer(part.metadata, np.uint8)
        self._raw[start : start + len(raw)] = raw  # as bytes: padding between columns is copied too
        if part.sizes.size:
            slots = np.maximum(part.sizes, np.uint64(1))
            starts = self._place(rows.start, slots.sum(axis=1).tolist())
            self._write_blob(part.blob, starts, slots.sum(axis=1).tolist())
            pointers = np.array(starts, np.uint64)[:, None] + np.cumsum(slots, axis=1) - slots
            self._record(rows, pointers, part)
        self._next_sample = rows.stop
        return num_samples

    def _place(self, first: int, totals: list[int]) -> list[int]:
        """Offsets of consecutive samples of these sizes. Each sample lies within one page; the page
        size grows until it holds the largest.
        """
        starts = []
        for sample, total in enumerate(totals, first):
            while total > self._page_size:
                self._page_size *= 2  # earlier samples cross none of the larger pages either
                if self._page_size > MAX_PAGE_SIZE:
                    raise SampleError(
                        f"sample {sample}: got {total} bytes, expected at most {MAX_PAGE_SIZE}"
                    )
            room = self._page_size - self._position % self._page_size
            if total > room:
                self._position += room
            starts.append(self._position)
            self._position += total
        return starts

    def _write_blob(self, blob: bytes, starts: list[int], totals: list[int]) -> None:
        """Write samples at their offsets, neighbours in one call."""
        view, done, run = memoryview(blob), 0, 0
        for index, (start, total) in enumerate(zip(starts, totals)):
            run += total
            if index + 1 == len(starts) or starts[index + 1] != start + total:
                self._file.seek(start + total - run)
                self._file.write(view[done : done + run])
                done, run = done + run, 0
        self._data_end = self._position

    def _record(self, rows: slice, pointers: np.ndarray, part: Encoded) -> None:
        """Put the pointers, uint64 (n, P), into the metadata and add rows to the table."""
        payload = 0
        for index, field in enumerate(self._fields.values()):
            column = field.pointers(self.metadata[rows][f"f{index}"])
            if column is not None:
                column[...] = pointers[:, payload]
                payload += 1
        table = np.zeros(pointers.shape, beton.ALLOC_ROW_TYPE)
        table["sample_id"] = np.arange(rows.start, rows.stop)[:, None]
        table["ptr"], table["size"] = pointers, part.sizes
        self._tables.append(table.reshape(-1))
        self._checksums.append(part.checksums.reshape(-1))

    def append_names(self, packed: bytes, place: beton.NamesPlace) -> beton.NamesPlace:
        """Write packed names behind the last payload; returns where they are."""
        place = place._replace(offset=self._data_end)
        self._file.seek(place.offset)
        self._file.write(packed)
        self._data_end += len(packed)
        return place

    def finish(self, text: bytes) -> None:
        """Write everything but the payloads. The header comes last, once the rest is on disk."""
        table = np.concatenate([np.zeros(0, beton.ALLOC_ROW_TYPE), *self._tables])
        checksums = np.concatenate([np.zeros(0, np.uint64), *self._checksums])
        section_offset = self._data_end
        table_offset = section_offset + beton.section_bytes(text, len(table))
        parts = {
            "header": beton.pack_header(
                len(self._fields), self._page_size, self._num_samples, table_offset
            ),
            "descriptors": b"".join(
                beton.pack_descriptor(_type_id(field), name, field.to_binary())
                for name, field in self._fields.items()
            ),
            "metadata": self._raw.tobytes(),
            "table": table.tobytes(),
        }
        locator, section = beton.pack_integrity(
            self._regions, section_offset, table_offset, text, checksums, parts
        )
        for offset, raw in (
            (self._regions.descriptors, parts["descriptors"]),
            (self._regions.metadata, parts["metadata"]),
            (self._regions.metadata_end, locator),
            (section_offset, section),
            (table_offset, parts["table"]),
        ):
            self._file.seek(offset)
            self._file.write(raw)
        self._file.sync()
        self._file.seek(0)
        self._file.write(parts["header"])  # `unfinished` flushes it to disk


def _type_id(field: Field) -> int:
    """A subclass of a built-in field is a custom field, as in FFCV: a reader needs its class."""
    return field.TYPE_ID if BUILT_IN.get(field.TYPE_ID) is type(field) else beton.CUSTOM_TYPE_ID


def _fixed_permutation(length: int) -> np.ndarray:
    """A permutation of range(length), the same on every machine and version: the order of mixed
    counters.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014); NumPy's own shuffles promise
    no stable stream.
    """
    with np.errstate(over="ignore"):
        mixed = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


@contextmanager
def _progress(path: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield advance(num_samples): it moves a bar on a terminal, and elsewhere prints a line on
    stderr every ten seconds.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(os.path.basename(path), total=total)
            yield lambda count: bar.advance(task, count)
        return
    began = spoke = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal spoke, done
        done += count
        now = time.monotonic()
        if now - spoke >= _PROGRESS_INTERVAL_S:
            spoke = now
            rate = done / (now - began)
            with suppress(OSError):  # a full or closed stderr is no reason not to write
                print(f"{path}: {done} of {total} samples, {rate:.0f} per second", file=sys.stderr)

    yield advance
