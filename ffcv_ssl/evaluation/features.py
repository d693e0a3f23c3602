"""A dataset's features, computed once: memory-mapped files that later commands use again.

Guarantees: a file under its final name is complete; its name is made from the weights, the
dataset's content and the pixels' settings, so that no command reads features of something else. A
damaged file is computed again: beside each file is its digest. Files may be deleted at any time.
"""

# N samples, B images per batch, D features

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.datasets import EvalDatasets
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.image_loaders import clean_loader
from ffcv_ssl.evaluation.protocol_run import stop_if_asked
from ffcv_ssl.evaluation.results import results_folder
from ffcv_ssl.files import check_kind, write_text
from ffcv_ssl.kernels.hash import xxh3_64
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.run_data import RunData, tell_once
from ffcv_ssl.training.world import World

FOLDER = "features"
FORMAT = 1
KEY_BYTES = 10
DIGEST = ".xxh3"
DIGESTED_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class FeaturesConfig:
    """Where the features of clean images are kept."""

    folder: str | None = None
    """Folder of the files; null: `features` beside the results. It may be deleted at any time."""
    dtype: Literal["float32", "float16"] = "float32"
    """float16 halves the files and rounds the features to 11 bits."""


class ChosenRows:
    """Some rows of a memory-mapped array, in the order of `index`: read when they are asked for."""

    def __init__(self, whole: np.ndarray | ChosenRows, index: np.ndarray) -> None:
        self.whole, self.index = whole, index
        self.shape: tuple[int, ...] = (len(index), *whole.shape[1:])
        self.dtype: np.dtype = whole.dtype

    def __getitem__(self, chosen: np.ndarray | slice) -> np.ndarray:
        return self.whole[self.index[chosen]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


@dataclass(frozen=True)
class Features:
    """Features of N samples, one row each."""

    rows: Mapping[str, np.ndarray | ChosenRows]
    """Depth -> (N, D) float32 or float16, memory-mapped."""
    ids: np.ndarray
    """(N,) int64: each row's sample in the file; the replacement's where a sample was corrupt."""

    def take(self, depth: str, chosen: np.ndarray | slice) -> np.ndarray:
        """Rows (B, D) float32 of a depth. chosen: (B,) int64 or a slice."""
        return np.asarray(self.rows[depth][chosen], np.float32)


def extract(
    encoder: Encoder,
    dataset: RunData,
    datasets: EvalDatasets,
    depths: Sequence[str],
    folder: str | Path,
    dtype: str,
    world: World,
    stop: StopSignal | None = None,
    indices: np.ndarray | None = None,
) -> Features:
    """Features of centre crops of one of the two datasets, read from files in `folder` where they
    are there, else computed and written.

    indices: of the samples, sorted; default: all samples.

    depths: names; those without a file are computed in one pass. dtype: "float32" or "float16".
    Raises UserError where the disk is full, and where a feature is not finite; Interrupted where
    `stop` asks for it.
    """
    indices = np.arange(dataset.num_samples) if indices is None else np.asarray(indices, np.int64)
    whole = _Files(folder, encoder, dataset, datasets, dtype, None)
    files = _Files(folder, encoder, dataset, datasets, dtype, indices)
    # the samples' own files first: to look at the whole set's is to read all of them
    if len(indices) < dataset.num_samples and not files.have(depths) and whole.have(depths):
        features = whole.open(depths)
        rows = {depth: ChosenRows(values, indices) for depth, values in features.rows.items()}
        return Features(rows, features.ids[indices])
    missing = [depth for depth in depths if not files.have([depth])]
    if missing:
        batches = _encode(encoder, dataset, datasets, missing, world, stop, indices)
        files.write(batches, missing)
    return files.open(depths)


def extract_labelled(
    part: str,
    config: Any,
    encoder: Encoder,
    datasets: EvalDatasets,
    world: World,
    stop: StopSignal | None,
) -> Features:
    """Features of the images of `train` or `val` whose labels may be used. Raises as `extract`.

    config: a FrozenConfig with a field `features`, a FeaturesConfig.
    """
    is_train = part == "train"
    dataset = datasets.train if is_train else datasets.val
    indices = datasets.chosen if is_train else np.flatnonzero(datasets.val_labels >= 0)
    folder = config.features.folder or results_folder(config) / FOLDER
    return extract(
        encoder, dataset, datasets, config.depths, folder, config.features.dtype, world, stop,
        indices,
    )  # fmt: skip


def check_finite(checkpoint: str, depth: str, rows: torch.Tensor) -> None:
    """Raise UserError where features (B, D) of a depth are not finite: they are near nothing."""
    if not rows.isfinite().all():
        raise UserError(
            f"{checkpoint}: features at {depth} are not finite; take another checkpoint"
        )


def _encode(
    encoder: Encoder,
    dataset: RunData,
    datasets: EvalDatasets,
    depths: Sequence[str],
    world: World,
    stop: StopSignal | None,
    indices: np.ndarray,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield (features by depth (B, D), ids (B,)) of the samples, in order."""
    name = f"features of {Path(dataset.path).name}"
    with (
        clean_loader(dataset, datasets, world, indices) as loader,
        world.console.phase(name, len(indices), announced=True) as phase,
    ):
        phase.advance(0)
        for batch in loader:
            stop_if_asked(stop)
            features = encoder.encode(batch.view_0)
            valid = np.asarray(batch.valid)
            rows = {depth: features[depth].cpu().numpy()[valid] for depth in depths}
            yield rows, np.asarray(batch.indices)[valid]
            phase.advance(int(valid.sum()))


class _Files:
    """The files of one set of samples: `<key>-<depth>.npy` and `<key>-ids.npy`, each with a
    `.xxh3` of the same name that holds its digest."""

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        dataset: RunData,
        datasets: EvalDatasets,
        dtype: str,
        indices: np.ndarray | None,
    ) -> None:
        self.folder, self.dtype, self.widths = Path(folder), np.dtype(dtype), encoder.widths
        self.checkpoint = encoder.path
        indices = None if indices is None or len(indices) == dataset.num_samples else indices
        self.num_rows = dataset.num_samples if indices is None else len(indices)
        chosen = b"" if indices is None else np.ascontiguousarray(indices).tobytes()
        loading = datasets.loading
        text = repr((
            FORMAT, encoder.fingerprint, encoder.arithmetic, dataset.fingerprint,
            loading.image_field,
            tuple(map(float, loading.mean)), tuple(map(float, loading.std)), datasets.resolution_px,
            float(datasets.center_ratio), self.dtype.name, loading.on_error,
        ))  # fmt: skip
        self.key = hashlib.blake2b(text.encode() + chosen, digest_size=KEY_BYTES).hexdigest()

    def path(self, name: str) -> Path:
        return self.folder / f"{self.key}-{name}.npy"

    def have(self, depths: Iterable[str]) -> bool:
        return all(self._is_whole(self.path(name)) for name in [*depths, "ids"])

    def _is_whole(self, path: Path) -> bool:
        """Whether a file is there and has its digest. Where they differ, a line on stderr says so,
        and the digest is removed, so that no later command reads the file for nothing. The file
        itself stays: another process may just have put a new one there."""
        try:
            _check_kinds(path)  # a reader of a pipe would wait
            digest = path.with_suffix(DIGEST).read_text(encoding="ascii", errors="replace")
            about = path.stat()
            is_whole = _known_digest(path, about.st_size, about.st_mtime_ns) == digest
        except OSError:
            return False
        if not is_whole:
            tell_once(f"{path}: damaged (its digest differs); the features are computed again")
            with contextlib.suppress(OSError):
                path.with_suffix(DIGEST).unlink()
        return is_whole

    def open(self, depths: Iterable[str]) -> Features:
        # copy-on-write: torch warns of memory that it may not write to
        rows = {depth: np.load(self.path(depth), mmap_mode="c") for depth in depths}
        return Features(rows, np.load(self.path("ids")))

    def write(self, batches: Iterable[tuple[dict, np.ndarray]], depths: Sequence[str]) -> None:
        """Write all rows, then give the files their final names, the ids last."""
        shapes = {depth: (self.num_rows, self.widths[depth]) for depth in depths}
        self._check_target([*depths, "ids"], sum(rows * width for rows, width in shapes.values()))
        # several processes, of several machines too, may compute the same features at once
        mine = f"tmp{os.getpid()}-{secrets.token_hex(4)}"
        temporary = {name: self.path(f"{name}.{mine}") for name in [*depths, "ids"]}
        id_parts = []
        try:
            files = {depth: _start(temporary[depth], shapes[depth], self.dtype) for depth in depths}
            try:
                for rows, batch_ids in batches:
                    id_parts.append(batch_ids)
                    for depth, file in files.items():
                        # not mmap: there a full disk kills the process, here it is an error
                        file.write(self._rounded(rows[depth], depth).data)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                for file in files.values():
                    file.close()
            ids = np.concatenate(id_parts).astype(np.int64)
            assert len(ids) == self.num_rows, f"{len(ids)} rows instead of {self.num_rows}"
            np.save(temporary["ids"], ids)
            for name, path in temporary.items():
                digest = _digest(path)
                os.replace(path, self.path(name))
                beside = self.path(name).with_suffix(DIGEST)
                write_text(beside, digest, beside.with_suffix(f"{DIGEST}.{mine}"))
        except OSError as error:
            raise self._disk_error(error) from None
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def _rounded(self, rows: np.ndarray, depth: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(rows, self.dtype)
        check_finite(self.checkpoint, depth, torch.from_numpy(rows))
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.checkpoint}: features at {depth} are not finite; {self.dtype.name} cannot "
                "hold them; use --features.dtype float32"
            )
        return values

    def _check_target(self, names: Sequence[str], num_values: int) -> None:
        """Refuse at once what cannot fit, and names that are taken by something else."""
        needed = num_values * self.dtype.itemsize
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                _check_kinds(self.path(name))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._disk_error(error) from None
        if free < needed:
            raise UserError(
                f"{self.folder}: got {free / 1e6:.0f} MB free, the features need "
                f"{needed / 1e6:.0f} MB; use another --features.folder, or --features.dtype float16"
            )

    def _disk_error(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"{self.folder}: the disk is full; "
                "free some space, use another --features.folder, or --features.dtype float16"
            )
        return UserError(
            f"{self.folder}: features cannot be written ({error.strerror}); "
            "use another --features.folder"
        )


def _check_kinds(path: Path) -> None:
    """Refuse a file of features that is none, and such a digest. Raises UserError and OSError."""
    check_kind(path)
    check_kind(path.with_suffix(DIGEST))


def _digest(path: Path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as file:  # not mmap: a file cut meanwhile would kill the process
        pieces = [xxh3_64(piece) for piece in iter(lambda: file.read(DIGESTED_AT_ONCE), b"")]
    return f"{xxh3_64(np.array(pieces, np.uint64)):016x}"


@functools.lru_cache(maxsize=64)  # a study opens the same files for each of its measurements
def _known_digest(path: Path, num_bytes: int, mtime_ns: int) -> str:
    return _digest(path)


def _start(path: Path, shape: tuple[int, int], dtype: np.dtype) -> BinaryIO:
    """An open file with the header of an .npy of that shape, to append the rows to."""
    file = open(path, "wb")  # noqa: SIM115, the caller closes it
    header: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file
