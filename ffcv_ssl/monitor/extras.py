"""What else a run's folder tells: its configuration, its evaluations and its current views.

Each is read again when its file has changed. A file that cannot be used costs its part of the page
and is named in the run's notes. Nothing is passed on but numbers and short texts.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import StrPath, kind_of

CONFIG_FILE, RESULTS_FILE = "config.yaml", "results.jsonl"
VIEWS_PICTURE, VIEWS_FILE = "views.png", "views.json"
_MAX_MIB = {CONFIG_FILE: 1, RESULTS_FILE: 16, VIEWS_PICTURE: 3, VIEWS_FILE: 4}
_MAX_CHARACTERS = 300
_MAX_RESULTS, _MAX_SETTINGS, _MAX_SAMPLES, _MAX_VIEWS, _MAX_OPS = 500, 2000, 32, 32, 32
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


class Watched:
    """A part of the page that is made of some files of a folder, by `read(folder)`."""

    def __init__(self, folder: Path, names: tuple[str, ...], read: Callable[[Path], Any]) -> None:
        self.folder, self.names, self.read = folder, names, read
        self.value: Any = None
        self.problem: str | None = None
        self._seen: Any = None

    def refresh(self) -> bool:
        """Read the files if they have changed; returns whether they have."""
        seen = [_state(self.folder / name) for name in self.names]
        if seen == self._seen:
            return False
        self._seen, self.value, self.problem = seen, None, None
        if seen[0] is None:
            return True
        try:
            for name in self.names:
                check_small(self.folder / name)
            self.value = self.read(self.folder)
        except (OSError, ValueError, RecursionError) as error:  # UserError is a ValueError
            self.problem = text(error)
        return True


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None without a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_small(path: Path) -> None:
    """Raise UserError for what is no regular file, or too large to be what its name says."""
    if not path.exists():
        return
    found = path.stat()
    if (kind := kind_of(found.st_mode)) is not None:
        raise UserError(f"{path}: is {kind}, expected a regular file; it is left out")
    limit = _MAX_MIB[path.name]
    if found.st_size > limit << 20:
        size = f"{found.st_size >> 20} MiB"
        raise UserError(f"{path}: got {size}, expected at most {limit} MiB; it is left out")


def text(value: Any) -> str:
    """A value as a short text for the page."""
    shown = value if isinstance(value, str) else _compact(value)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}..."


def _compact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_compact, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_compact(item)}" for key, item in value.items())
    return str(value)


# ---- Configuration -------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, str]:
    """{setting: value as text} of a run's `config.yaml`."""
    path = folder / CONFIG_FILE
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: got no mapping of settings; restore it from the run's checkpoint")
    flat = flatten_as_text(_with_texts(settings))
    return {text(key): text(value) for key, value in list(flat.items())[:_MAX_SETTINGS]}


def _with_texts(settings: dict[Any, Any]) -> dict[str, Any]:
    """Nested settings whose keys are texts, as `flatten` needs them."""
    return {
        str(key): _with_texts(value) if isinstance(value, dict) else value
        for key, value in settings.items()
    }


# ---- Evaluations ---------------------------------------------------------------------------------


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """[{time, protocol, checkpoint, metrics: {name: share}, settings: {name: text}}] of a run's
    `results.jsonl`, the newest first."""
    # imported here: it needs torch, and few runs have results
    from ffcv_ssl.evaluation.results import read_results

    records = read_results(folder)[::-1]
    return [_evaluation(record) for record in records[:_MAX_RESULTS]]


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    from ffcv_ssl.evaluation.results import accuracies

    metrics, settings = record.get("metrics"), record.get("settings")
    found = accuracies(metrics) if isinstance(metrics, dict) else {}
    flat = flatten_as_text(settings) if isinstance(settings, dict) else {}
    return {
        "time": text(record.get("time", "")), "protocol": text(record.get("protocol", "")),
        "checkpoint": text(record.get("checkpoint", "")),
        "metrics": {
            text(key): value
            for key, value in found.items()
            if isinstance(value, int | float) and abs(value) <= 1
        },
        "settings": {text(key): text(value) for key, value in flat.items()},
    }  # fmt: skip


# ---- Current views -------------------------------------------------------------------------------


def read_views(folder: Path) -> dict[str, Any]:
    """{picture: data URI, width, height (px), step, epoch, resolution, samples} of a run's newest
    views. samples: [{index, views: [{name, drawn: [[op, parameters]]}]}], all texts."""
    path = folder / VIEWS_PICTURE
    data = path.read_bytes()
    if not data.startswith(_PNG_HEAD) or len(data) < 24:
        raise UserError(f"{path}: got no PNG picture; remove it, the next evaluation draws another")
    about = _read_drawn(folder / VIEWS_FILE)
    samples = about.get("samples")
    return {
        "picture": f"data:image/png;base64,{base64.b64encode(data).decode()}",
        "width": int.from_bytes(data[16:20], "big"), "height": int.from_bytes(data[20:24], "big"),
        **{key: text(about[key]) for key in ("step", "epoch", "resolution") if key in about},
        "samples": [_sample(one) for one in samples[:_MAX_SAMPLES] if isinstance(one, dict)]
        if isinstance(samples, list) else [],
    }  # fmt: skip


def _read_drawn(path: StrPath) -> dict[str, Any]:
    """What `views.json` says; nothing where it is missing, or is just being written."""
    try:
        about = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    views = sample.get("views")
    items = list(views.items())[:_MAX_VIEWS] if isinstance(views, dict) else []
    return {
        "index": text(sample.get("index", "")),
        "views": [{"name": text(name), "drawn": _drawn(ops)} for name, ops in items],
    }


def _drawn(ops: Any) -> list[list[str]]:
    items = list(ops.items())[:_MAX_OPS] if isinstance(ops, dict) else []
    return [[text(op), text(parameters)] for op, parameters in items]


def is_regular(path: Path) -> bool:
    """Whether a regular file is there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
