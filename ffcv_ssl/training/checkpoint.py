"""Checkpoints: plain data, written atomically, read with every checksum compared.

A reader never sees a half-written file: the state goes to a temporary name, is flushed to disk,
read back and compared with its checksums, and only then renamed. Files hold plain types and tensors
only, so `torch.load(weights_only=True)` opens them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import CheckpointError, FfcvSslError
from ffcv_ssl.files import (
    StrPath,
    check_kind,
    drop_from_memory,
    explained,
    kind_of,
    replacing,
    sync_folder,
)
from ffcv_ssl.training.checksums import (
    ZIP_START,
    archive_damage,
    can_be_mapped,
    is_archive,
    signed,
    weights_damage,
)
from ffcv_ssl.training.lost_ranks import is_loss
from ffcv_ssl.training.memory import what_ran_out

PREVIOUS = "checkpoint_previous.pt"
"""The checkpoint before the last one, in a run's folder until the run is finished."""


def save(path: StrPath, state: dict[str, Any], previous: StrPath | None = None) -> None:
    """Write `state` (dict of tensors and plain types) to `path`. The old file stays until the new
    file is on disk and has been read back from there; then it is kept as `previous`, if given.

    Raises TypeError, naming the key, for a value that `weights_only` loading would refuse, and
    CheckpointError where the file cannot be written (disk full...) or not be read back.
    """
    path = Path(path)
    state = to_plain(state)
    is_first = not path.exists()
    more = "" if is_first else ", the checkpoint before it is kept"
    with explained(path, more), contextlib.ExitStack() as former:

        def before(new):
            _read_back(path, archive_damage, new)
            if previous is not None and not is_first:
                former.enter_context(_second_name(path, Path(previous)))

        with replacing(path, check_new=before) as file:
            _write_archive(state, file)
    sync_folder(path.parent)


def _write_archive(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, with the OSError of a failed write instead of torch's words for it."""
    watched: Any = _Watched(file)
    try:
        torch.save(state, watched)
    except RuntimeError as error:
        raise watched.error or error from None


class _Watched:
    """A file for torch.save that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """torch.save calls this where a file has it; `replacing` flushes."""


def _read_back(path, damage, new):
    """Raise CheckpointError if the file `new`, to replace `path`, is not what was written."""
    drop_from_memory(new)
    if (found := damage(new)) is not None:
        raise CheckpointError(
            f"{path}: what was just written cannot be read back ({found}); check the disk and the "
            "memory, and start again; the file before it is kept"
        )


def load(
    path: StrPath, remedy: str = "restore a kept copy, or delete it to start again"
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything in it.

    Every checksum in the file is compared first. Raises CheckpointError; its message ends with a
    whole checkpoint of the same folder to go back to, or with `remedy` where there is none.
    """
    cause = None
    try:
        kind = kind_of(os.stat(path).st_mode)
        damage = archive_damage(path) if kind is None else f"it is {kind}"
        if damage is None:
            # mapped: ranks of one machine share the file's pages instead of holding a copy each;
            # `save` replaces the file, and a mapped one then stays what it was
            mapped = can_be_mapped(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen types for bad files
        damage, cause = _reason(path, error), error
    if damage is not None:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({damage}); {way_back(path) or remedy}"
        ) from cause
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: got a {type(state).__name__}, expected a checkpoint's dict of state"
        )
    return state


@contextlib.contextmanager
def needing(path: StrPath, needed: str) -> Iterator[None]:
    """The checkpoint at `path`, whose checksums hold, is used in the block. A part that is missing
    there, or that is another than the block needs, is a CheckpointError.

    needed: the parts in words, for its message, which ends as that of `load`."""
    try:
        yield
    except (  # a class of FfcvSslError may be one of them too
        LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError
    ) as error:  # fmt: skip
        if isinstance(error, FfcvSslError) or is_loss(error) or what_ran_out(error):
            raise
        raise CheckpointError(
            f"{path}: lacks {needed}, or contradicts it "
            f"({type(error).__name__}: {one_line(error)}); "
            f"{way_back(path) or 'restore a kept copy, or take another checkpoint'}"
        ) from error


def way_back(path: StrPath) -> str | None:
    """What to do about a run's checkpoint that cannot be read: the newest whole checkpoint in its
    folder, and how the run goes on from it; None where there is none."""
    path = Path(path)
    if not path.match("checkpoint*.pt"):
        return None
    others = [p for p in path.parent.glob("checkpoint*.pt") if p != path and p.is_file()]
    for other in sorted(others, key=_time_of_change, reverse=True):
        if is_whole(other):
            # a copy over the damaged file would change kept copies, which are the same file
            first = f"delete {path.name} and " if path.exists() else ""
            return f"{other.name} is whole: {first}copy it to {path.name} to go on from there"
    return None


def _time_of_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def is_whole(path: StrPath) -> bool:
    """Whether a file is an archive of torch.save whose checksums hold."""
    try:
        return is_archive(path) and archive_damage(path) is None
    except OSError:
        return False


def _reason(path, error):
    """Why torch could not read a file, in short. (Torch's message is long; it advises to trust the
    file.)"""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as own:
        return own.strerror
    if not start:
        return "it is empty"
    if start != ZIP_START and start[:1] != b"\x80":  # a zip archive; a pickle, before torch 1.6
        return "torch.save did not write it"
    is_foreign = isinstance(error, pickle.UnpicklingError)
    return "it holds objects that are not tensors" if is_foreign else "it is damaged or cut off"


def keep_copy(path: StrPath, kept: StrPath) -> None:
    """Keep the checkpoint at `path` as `kept`, also where there is such a file, which may have been
    damaged: a hard link where the file system has hard links, else a copy. A link is safe because
    `save` never overwrites a file."""
    with _second_name(Path(path), Path(kept)):
        pass


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@contextlib.contextmanager
def _second_name(path: Path, name: Path) -> Iterator[None]:
    """Hold the file at `path`, and give it the second name `name` when the block ends: `path` may
    meanwhile become another file. A file of that name is replaced; if the block fails, it stays."""
    check_kind(name)
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
        yield
        os.replace(temporary, name)
    finally:
        # also where both names are of one file already: os.replace then does nothing
        temporary.unlink(missing_ok=True)


def to_plain(value: Any, where: str = "state") -> Any:
    """The same value in types that `weights_only` loading accepts.

    NumPy scalars become numbers; subclasses of str (such as `torch.__version__`) and paths become
    str; mappings become dict. Raises TypeError, naming the key, for anything else."""
    if value is None or isinstance(value, bool | torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return value.item()
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(
        f"checkpoint: {where} is a {type(value).__name__}, expected tensors and plain types"
    )


def versions() -> dict[str, str]:
    """Versions of the software that computes a run's losses."""
    import torchvision

    import ffcv_ssl

    modules = (ffcv_ssl, torch, torchvision, np)
    return {module.__name__: str(module.__version__) for module in modules}


def rng_state() -> dict[str, Any]:
    """State of torch's random generators, of the CPU and of each CUDA device, as tensors."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state()` returned; CUDA states only for devices that exist here too."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


def save_weights(path: StrPath, module: torch.nn.Module, about: dict[str, str]) -> None:
    """Write a module's weights and buffers, under its own names, as safetensors with the metadata
    `about` (dict of str). Atomic; equal weights and metadata give equal files. Raises
    CheckpointError where the file cannot be written or not be read back."""
    from safetensors.torch import save

    path = Path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    header, data = signed(save(state, metadata=about))

    def before(new):
        _read_back(path, weights_damage, new)

    with explained(path), replacing(path, check_new=before) as file:
        file.write(header)
        file.write(data)
