"""Results of evaluations: `results.jsonl`, one record a line, and `results.csv`, one row each.

Both files only grow, and several processes may report into one folder at the same time.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import io
import json
import math
import os
from pathlib import Path

from ffcv_ssl.config.plain import config_dict, flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import locked, write_text
from ffcv_ssl.training.checkpoint import to_plain

JSON_FILE, CSV_FILE = "results.jsonl", "results.csv"
LOCK_FILE = ".results.lock"
MAX_CELL = 500  # characters of a table's cell
PATIENCE_S = 60  # that another process may take to write its row


def make_record(protocol, encoder, data, config, metrics):
    """What one evaluation says of itself, as nested dicts of plain types.

    protocol: its name; encoder: an Encoder; data: dict with the datasets' paths and contents;
    config: the protocol's frozen dataclass; metrics: dict, accuracies as shares in [0, 1].
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


def report(record, folder):
    """Append a record (nested dicts of plain types) to the results in `folder`; returns it as it
    was written: with the time, and numbers that are not finite as None.

    Keys of the table are the record's, joined by dots. Raises UserError where it cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = _finite(to_plain({"time": now, **record}, "record"))
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), open(folder / JSON_FILE, "a", encoding="utf-8") as file:
            start = "" if _ends_in_newline(folder / JSON_FILE) else "\n"  # a killed writer's half
            file.write(start + json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            _append_row(folder / CSV_FILE, flatten_as_text(record))
    except OSError as error:
        raise UserError(f"{folder}: results cannot be written ({error.strerror})") from None
    return record


@contextlib.contextmanager
def _alone(folder):
    """Keep other processes from writing results here; the lock dies with the process."""
    try:
        with locked(folder / LOCK_FILE, PATIENCE_S):
            yield
    except TimeoutError:
        expected = f"held by another process for {PATIENCE_S} s; end that one"
        raise UserError(f"{folder / LOCK_FILE}: {expected}") from None


def settings_key(record):
    """Eight hex digits of what was asked: equal for the same checkpoint and weights, data, labels
    and settings, wherever the results go. A record that lacks one of these has a key that no
    complete one has."""
    asked = [record.get(key) for key in ("checkpoint", "about", "weights", "data")]
    settings = record.get("settings") or {}
    asked.append({key: value for key, value in settings.items() if key != "out"})
    text = json.dumps(to_plain(asked), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def read_results(folder):
    """All records in a folder, in order; an empty list where there are none.

    Lines that are not a JSON object (a killed writer's last one) are left out.
    """
    path = Path(folder) / JSON_FILE
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _ends_in_newline(path):
    """Whether a file's last line is whole; True of an empty one."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _append_row(path, row):
    """Add a row; where it has new columns, the table is written anew with them at the end, and also
    where the last row is not whole. Long lists (accuracies of a thousand classes) are left to the
    other file. What a spreadsheet may have done is borne: cells beyond the columns are dropped, and
    bytes that are not UTF-8 replaced."""
    row = {key: value for key, value in row.items() if len(str(value)) <= MAX_CELL}
    columns, rows, is_whole = [], [], True
    if path.exists():
        is_whole = _ends_in_newline(path)
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = next(csv.reader(file), [])
    new = [key for key in row if key not in columns]
    if not new and is_whole:
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
        return
    if columns:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
        for old in rows:
            old.pop(None, None)
    text = io.StringIO()
    table = csv.DictWriter(text, columns + new, lineterminator="\n")
    table.writeheader()
    table.writerows([*rows, row])
    write_text(path, text.getvalue())


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
