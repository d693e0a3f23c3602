"""Results of evaluations: `results.jsonl`, one record per line.

The file only grows, and several processes may report into one folder at the same time. Each line
ends with the digest of its record, so that a damaged one is noticed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffcv_ssl.config.plain import config_dict, flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.encoder import Encoder
from ffcv_ssl.evaluation.former_names import with_new_names, with_old_names
from ffcv_ssl.files import check_kind, locked
from ffcv_ssl.training.checkpoint import to_plain
from ffcv_ssl.training.run_data import tell_once

RESULTS_FILE = "results.jsonl"
DIGEST = "digest"
LOCK_FILE = ".results.lock"
LOCK_PATIENCE_S = 60
"""How long another process may take to write its record."""
MAIN_METRICS = ("top1", "map")


def make_record(
    protocol: str, encoder: Encoder, data: dict, config: Any, metrics: dict
) -> dict[str, Any]:
    """The record of one evaluation, as nested dicts of plain types.

    protocol: its name; data: the datasets' paths and contents; config: the protocol's frozen
    dataclass; metrics: accuracies as shares in [0, 1].
    """
    settings = config_dict(config)
    settings.pop("checkpoint", None)
    return {
        "protocol": protocol,
        "checkpoint": encoder.path,
        "name": encoder.name,
        "about": dict(encoder.about),
        "weights": encoder.fingerprint,
        "data": data,
        "settings": settings,
        "metrics": metrics,
    }


def report(record: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Append a record (nested dicts of plain types) to the results in `folder`; returns it as it
    was written: with the time, and numbers that are not finite as None.

    Raises UserError where it cannot be written; the file is then as it was, and the record is on
    stdout, as it may have cost hours.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = _finite(to_plain({"time": now, **record}, "record"))
    line = json.dumps({**record, DIGEST: _digest(record)}, allow_nan=False) + "\n"
    path = Path(folder) / RESULTS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(path.parent):
            _append(path, line.encode())
    except (OSError, UserError) as error:
        with contextlib.suppress(OSError):  # stdout may go to the same disk
            print(line, end="", flush=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{folder}: results cannot be written ({reason}); this one is on stdout, append that "
            f"line to {RESULTS_FILE}"
        ) from None
    return record


def _append(path: Path, line: bytes) -> None:
    """Append a line in one write, and flush it to disk; where that fails, cut it off again."""
    check_kind(path)  # a device takes any line and keeps none
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if not _ends_in_newline(path):  # a killed writer left half a line
            line = b"\n" + line
        try:
            while line:  # the disk may take a part
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """All records in a folder, in order; an empty list where there are none.

    Settings have their new names in records of before, too. Lines that are not a JSON object (a
    killed writer's last one), and records that are not as they were written, are left out with a
    line on stderr each. Raises UserError for a file that cannot be read.
    """
    path = Path(folder) / RESULTS_FILE
    try:
        if not path.is_dir():  # its error says enough
            check_kind(path)  # a reader of a pipe would wait
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            record = _intact(line, f"{path}:{number}")
            if record is not None:
                if isinstance(record.get("settings"), dict):
                    record["settings"] = with_new_names(record["settings"])
                records.append(record)
    return records


def _intact(line: str, where: str) -> dict[str, Any] | None:
    """The record of a line, without its digest; None for a line that is none, and for a record that
    its digest contradicts: one of its numbers may be wrong."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record:
        tell_once(f"{where}: damaged, this result is left out")
        return None
    *_, last = record
    rest = {key: value for key, value in record.items() if key != last}
    if record[last] == _digest(rest):  # even if the digest's own name is damaged
        return rest
    if last == DIGEST:
        tell_once(
            f"{where}: changed since it was written, this result is left out; measure it again, or "
            f"remove its {DIGEST!r} if you changed it by hand"
        )
        return None
    return record  # records of before have no digest


def _digest(record: dict[str, Any]) -> str:
    """16 hex digits of a record without its digest."""
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=8).hexdigest()


def settings_key(record: dict[str, Any]) -> str:
    """Eight hex digits of what was asked: equal for the same checkpoint and weights, data, labels
    and settings, wherever the results go. A record that lacks one of these has a key that no
    complete one has.

    Made from the settings' first names, so that records of before have the keys they had.
    """
    asked = [record.get(key) for key in ("checkpoint", "about", "weights", "data")]
    settings = with_old_names(record.get("settings") or {})
    asked.append({key: value for key, value in settings.items() if key != "out"})
    text = json.dumps(to_plain(asked), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# ---- Folders -------------------------------------------------------------------------------------


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def results_folder(config: Any) -> Path:
    """Where a protocol's results go: `out`, or the checkpoint's folder; made if need be."""
    return writable_folder(config.out or checkpoint_folder(config.checkpoint))


def writable_folder(folder: str | Path) -> Path:
    """A folder for results as a Path, made if need be. Raises UserError where it cannot be written:
    better to know that before anything is measured."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_kind(folder / RESULTS_FILE)
    except OSError as error:
        raise UserError(f"{folder}: cannot hold results ({error.strerror}); use --out") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: results cannot be written there; use --out")
    return folder


# ---- The numbers of a record ---------------------------------------------------------------------


def main_metric(metrics: dict[str, Any], name: str | None = None) -> tuple[str, float]:
    """(name, value) of one number of nested metrics: `name`, its parts joined by dots, or the first
    top1 or map. Raises UserError where it is not there."""
    flat = {
        key: value
        for key, value in flatten_as_text(metrics).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if name is None:
        name = next((key for key in flat if key.rsplit(".", 1)[-1] in MAIN_METRICS), None)
    if name is None or name not in flat:
        known = ", ".join(key for key in flat if "per_class" not in key) or "none"
        raise UserError(f"metric: got {name!r}, expected one of {known}")
    return name, flat[name]


def accuracies(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{name, its parts joined by dots: value} of every top1 and map of nested metrics, each once.

    k-NN and NPI list the accuracy of every setting by its name within a depth, and repeat the first
    one as the depth's. With one setting, return the depth's value; with several, one value per
    setting.
    """
    settings = {key: value for key, value in metrics.items() if isinstance(value, dict)}
    by_setting: dict[str, float] = {}
    for key, value in settings.items():
        by_setting |= accuracies(value, f"{prefix}{key}.")
    direct = {prefix + key: metrics[key] for key in MAIN_METRICS if metrics.get(key) is not None}
    return direct if direct and len(settings) < 2 else by_setting or direct


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing results here; the lock dies with the process."""
    try:
        with locked(folder / LOCK_FILE, LOCK_PATIENCE_S):
            yield
    except TimeoutError:
        raise UserError(
            f"{folder / LOCK_FILE}: held by another process for {LOCK_PATIENCE_S} s; "
            "end that process"
        ) from None


def _ends_in_newline(path: Path) -> bool:
    """Whether a file's last line is complete; True for an empty file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
