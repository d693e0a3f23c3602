"""Checkpoints: plain data, written atomically.

A reader never sees a half-written file: the state goes to a temporary name, is flushed to disk and
then renamed. Files hold plain types and tensors only, so `torch.load(weights_only=True)` opens
them.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffcv_ssl.errors import CheckpointError
from ffcv_ssl.files import StrPath, explained, replacing, sync_folder


def save(path: StrPath, state: dict[str, Any]) -> None:
    """Write `state` (dict of tensors and plain types) to `path`. The old file stays until the new
    file is safe on disk.

    Raises TypeError, naming the key, for a value that `weights_only` loading would refuse, and
    CheckpointError where the file cannot be written (disk full...).
    """
    path = Path(path)
    state = to_plain(state)
    with explained(path, ", the checkpoint before it is kept"), replacing(path) as file:
        torch.save(state, file)
    sync_folder(path.parent)


def load(
    path: StrPath, remedy: str = "restore a kept copy, or delete it to start again"
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything in it. Raises CheckpointError;
    its message ends with `remedy` where the file is no checkpoint."""
    try:
        # mapped: ranks of one machine share the file's pages instead of holding a copy each; `save`
        # replaces the file, and a mapped one then stays what it was
        mapped = _is_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen types for bad files
        reason = _reason(path, error)
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); {remedy}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: got a {type(state).__name__}, expected a checkpoint's dict of state"
        )
    return state


def _is_archive(path):
    """Whether a file begins as those of torch.save do since torch 1.6."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
    if start != b"PK\x03\x04" and start[:1] != b"\x80":  # a zip archive; a pickle, before torch 1.6
        return "torch.save did not write it"
    is_foreign = isinstance(error, pickle.UnpicklingError)
    return "it holds objects that are not tensors" if is_foreign else "it is damaged or cut off"


def keep_copy(path: StrPath, kept: StrPath) -> None:
    """Keep the checkpoint at `path` as `kept`, unless `kept` exists: a hard link where the file
    system has hard links, else a copy. A link is safe because `save` never overwrites a file."""
    path, kept = Path(path), Path(kept)
    if kept.exists():
        return
    temporary = kept.with_name(kept.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EMLINK,
            errno.EACCES,
        ):
            raise
        shutil.copyfile(path, temporary)
    os.replace(temporary, kept)


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
    `about` (dict of str). Atomic. Raises CheckpointError where the file cannot be written."""
    from safetensors.torch import save

    path = Path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with explained(path), replacing(path) as file:
        file.write(save(state, metadata=about))
