"""A run's `metrics.jsonl` and TensorBoard events: one JSON object per line, in order of steps, each
step once.

`metrics.jsonl` is the only record. When a run resumes, the TensorBoard events are rewritten from
it. So a run that was killed and resumed leaves the same lines as an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from ffcv_ssl.files import StrPath, write_text

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
MEASURED = (
    "seconds", "train/images_per_s", "train/data_wait", "train/copy_wait", "train/rank_wait",
    "train/peak_memory_mib",
)  # fmt: skip
"""What equal runs need not have in common: times and memory."""
X_AXES = ("epoch", "step", "updates", "images", "views", "flops", "seconds")


def read_metrics(folder: StrPath) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics, in order, as dicts; an empty list without a file.

    A last line without newline (the writer was killed) is left out; so is every line that is not a
    JSON object.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class MetricsLog:
    """Append metrics to `folder/metrics.jsonl` and, if asked, to TensorBoard events.

    Lines of steps after `last_step` are removed, because the resumed run repeats these steps; None
    removes all lines. When `write` returns, the line is in the file; `sync` puts it on disk.
    """

    def __init__(
        self, folder: StrPath, last_step: int | None = None, tensorboard: bool = True
    ) -> None:
        self.folder = Path(folder)
        kept = (
            [] if last_step is None else [r for r in read_metrics(folder) if r["step"] <= last_step]
        )
        write_text(self.folder / METRICS_FILE, "".join(_line(record) for record in kept))
        self._file = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        self.records = kept
        self._events = self._open_events() if tensorboard else None
        for record in kept:
            self._write_events(record)

    def _open_events(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where needed

        shutil.rmtree(self.folder / EVENTS_FOLDER, ignore_errors=True)
        return SummaryWriter(str(self.folder / EVENTS_FOLDER))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record: a dict with `step` and numbers. Non-finite numbers become null."""
        line = _line(record)
        self._file.write(line)
        self._file.flush()
        self.records.append(json.loads(line))
        self._write_events(self.records[-1])

    def _write_events(self, record):
        if self._events is None:
            return
        for key, value in record.items():
            if key not in X_AXES and isinstance(value, int | float):
                self._events.add_scalar(key, value, record["step"])

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold the evaluation after `step` steps."""
        return any(r["step"] == step and is_evaluation(r) for r in self.records)

    def latest(self, prefix: str) -> dict[str, Any]:
        """The newest record with a key that starts with `prefix`, or an empty dict."""
        for record in reversed(self.records):
            if any(key.startswith(prefix) for key in record):
                return record
        return {}

    def sync(self) -> None:
        """Put all lines on disk. Called before a checkpoint is written, so that the metrics are
        never behind the checkpoint."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the file and the events; a second call does nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record holds an evaluation rather than training figures."""
    return any(key.startswith("val/") for key in record)


def _line(record):
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
