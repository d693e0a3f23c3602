"""A dataset's features, computed once: memory-mapped files that later commands use again.

Guarantees: a file under its final name is complete and belongs to these weights, this dataset's
content and these pixels; whatever differs has another name. Files may be deleted at any time.
"""

# N samples, B images a batch, D features

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.common import clean_loader, stop_if_asked

FOLDER = "features"


@dataclass(frozen=True)
class FeaturesConfig:
    """Where the features of clean images are kept."""

    folder: str | None = None
    """Folder of the files; null: `features` beside the results. It may be deleted at any time."""
    dtype: Literal["float32", "float16"] = "float32"
    """float16 halves the files and rounds the features to 11 bits."""


@dataclass(frozen=True)
class Features:
    """Features of N samples, one row each."""

    rows: dict
    """Depth -> (N, D) float32 or float16, memory-mapped."""
    ids: np.ndarray
    """(N,) int64: each row's sample in the file; another one than asked for where a corrupt sample
    was replaced."""

    def take(self, depth, chosen):
        """Rows (B, D) float32 of a depth. chosen: (B,) int64 or a slice."""
        return np.asarray(self.rows[depth][chosen], np.float32)


def extract(encoder, dataset, pair, depths, folder, dtype, world, stop=None, indices=None):
    """Features of centre crops of the samples `indices` (sorted; default: all) of a RunData, read
    from files in `folder` where they are there, else computed and written.

    depths: names; all that lack a file are computed in one pass. dtype: "float32" or "float16".
    Raises UserError where the disk is full, and where a feature is not finite; Interrupted where
    `stop` asks for it.
    """
    indices = np.arange(dataset.num_samples) if indices is None else np.asarray(indices, np.int64)
    whole = _Files(folder, encoder, dataset, pair, dtype, None)
    files = _Files(folder, encoder, dataset, pair, dtype, indices)
    if len(indices) < dataset.num_samples and whole.have(depths):
        features = whole.open(depths)
        rows = {depth: values[indices] for depth, values in features.rows.items()}
        return Features(rows, features.ids[indices])
    missing = [depth for depth in depths if not files.have([depth])]
    if missing:
        files.write(_encode(encoder, dataset, pair, missing, world, stop, indices), missing)
    return files.open(depths)


def _encode(encoder, dataset, pair, depths, world, stop, indices):
    """Yield (features by depth (B, D) as NumPy arrays, ids (B,)) of all samples, in order."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    what = f"features of {Path(dataset.path).name}"
    with clean_loader(dataset, pair, world, indices) as loader:
        with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(what, total=len(indices))
            for batch in loader:
                stop_if_asked(stop)
                features = encoder.encode(batch.view_0)
                valid = np.asarray(batch.valid)
                rows = {depth: features[depth].cpu().numpy()[valid] for depth in depths}
                yield rows, np.asarray(batch.indices)[valid]
                progress.advance(task, int(valid.sum()))


class _Files:
    """The files of one set of samples: `<key>-<depth>.npy` and `<key>-ids.npy`."""

    def __init__(self, folder, encoder, dataset, pair, dtype, indices):
        self.folder, self.dtype, self.widths = Path(folder), np.dtype(dtype), encoder.widths
        self.checkpoint = encoder.path
        indices = None if indices is None or len(indices) == dataset.num_samples else indices
        self.num_rows = dataset.num_samples if indices is None else len(indices)
        chosen = b"" if indices is None else np.ascontiguousarray(indices).tobytes()
        loading = pair.loading
        text = repr((
            1, encoder.fingerprint, encoder.precision, dataset.fingerprint, loading.image_field,
            tuple(map(float, loading.mean)), tuple(map(float, loading.std)), pair.resolution_px,
            float(pair.center_ratio), self.dtype.name, loading.on_error,
        ))  # fmt: skip
        self.key = hashlib.blake2b(text.encode() + chosen, digest_size=10).hexdigest()

    def path(self, name):
        return self.folder / f"{self.key}-{name}.npy"

    def have(self, depths):
        return all(self.path(name).is_file() for name in [*depths, "ids"])

    def open(self, depths):
        # copy-on-write: torch warns of memory that it may not write to
        rows = {depth: np.load(self.path(depth), mmap_mode="c") for depth in depths}
        return Features(rows, np.load(self.path("ids")))

    def write(self, batches, depths):
        """Write all rows one after the other, then give the files their names, the ids last."""
        shapes = {depth: (self.num_rows, self.widths[depth]) for depth in depths}
        self._check_space(sum(rows * width for rows, width in shapes.values()))
        temporary = {name: self.path(f"{name}.tmp{os.getpid()}") for name in [*depths, "ids"]}
        ids = []
        try:
            files = {depth: _start(temporary[depth], shapes[depth], self.dtype) for depth in depths}
            try:
                for rows, numbers in batches:
                    ids.append(numbers)
                    for depth, file in files.items():
                        # plain writes: a full disk is an error here, and a killed process with mmap
                        file.write(self._rounded(rows[depth], depth).data)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                for file in files.values():
                    file.close()
            ids = np.concatenate(ids).astype(np.int64)
            assert len(ids) == self.num_rows, f"{len(ids)} rows instead of {self.num_rows}"
            np.save(temporary["ids"], ids)
            for name, path in temporary.items():
                os.replace(path, self.path(name))
        except OSError as error:
            raise self._disk_error(error) from None
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def _rounded(self, rows, depth):
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(rows, self.dtype)
        if not np.isfinite(values).all():
            advice = "take another checkpoint"
            if np.isfinite(rows).all():
                advice = f"{self.dtype.name} is too short for them; use --features.dtype float32"
            raise UserError(f"{self.checkpoint}: features at {depth} are not finite; {advice}")
        return values

    def _check_space(self, count):
        """Refuse at once what cannot fit."""
        needed = count * self.dtype.itemsize
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._disk_error(error) from None
        if free < needed:
            sides = f"{needed / 1e6:.0f} MB wanted, {free / 1e6:.0f} MB free"
            raise UserError(f"{self.folder}: {sides}; use --features.folder, or dtype float16")

    def _disk_error(self, error):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space, use --features.folder elsewhere, or dtype float16"
            return UserError(f"{self.folder}: the disk is full; {advice}")
        return UserError(f"{self.folder}: features cannot be written ({error.strerror})")


def _start(path, shape, dtype):
    """An open file with the head of an .npy of that shape, to append the rows to."""
    file = open(path, "wb")  # noqa: SIM115, the caller closes it
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file
