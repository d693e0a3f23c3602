"""A run's `metrics.jsonl`, and TensorBoard and Weights & Biases, which show the same: one JSON
object per line, in order of steps, each step once.

`metrics.jsonl` is the only record, and the file alone holds it: a run of any length keeps none of
it in memory. When a run resumes, the lines after its checkpoint are cut off, and TensorBoard hides
the events after it. So a run that was killed and resumed shows the same as an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ffcv_ssl.files import StrPath, check_kind
from ffcv_ssl.training.event_file import EVENTS_PREFIX, EventFile

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
MEASURED = (
    "seconds", "train/images_per_s", "train/data_wait", "train/copy_wait", "train/rank_wait",
    "train/peak_memory_mib",
)  # fmt: skip
"""What equal runs need not have in common: times and memory."""
MAX_STEPS = 1 << 63
"""Steps are fewer than this; TensorBoard's counter has 64 bits."""
X_AXES = ("epoch", "step", "updates", "images", "views", "flops", "seconds")


_CHUNK_BYTES = 1 << 18


def each_metric(folder: StrPath) -> Iterator[dict[str, Any]]:
    """The complete lines of a run's metrics as dicts, in order; nothing without a file.

    A last line without newline (the writer was killed) is left out; so is every line that is not a
    JSON object. Raises UserError for a pipe, a device or a folder of that name.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return
    check_kind(path)  # a reader of a pipe would wait
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (record := parse_line(line)) is not None:
                yield record


def read_metrics(folder: StrPath) -> list[dict[str, Any]]:
    """All that `each_metric` yields."""
    return list(each_metric(folder))


def each_metric_from_the_end(folder: StrPath) -> Iterator[dict[str, Any]]:
    """What `each_metric` yields, in reverse order; a long file is read only as far as needed."""
    for _, line in _lines_from_the_end(Path(folder) / METRICS_FILE):
        if (record := parse_line(line)) is not None:
            yield record


class Follower(Protocol):
    """What shows the metrics somewhere else, as they are written."""

    def write(self, record: dict[str, Any]) -> None:
        """Show one record."""

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Show a PNG."""

    def close(self) -> None:
        """Show nothing more; a second call does nothing."""


class MetricsLog:
    """Append metrics to `folder/metrics.jsonl` and, if asked, to TensorBoard events.

    Lines of steps after `last_step` are removed, because the resumed run repeats these steps; None
    removes all lines. When `write` returns, the line is in the file; `sync` puts it on disk. about:
    the run's settings, as a text for TensorBoard; pictures: {tag: (path, step)} of those that the
    folder has already. follow(records, seen): makes a Follower of the kept records; `seen` is the
    place (see `place_of`) of the last line that the file had, or None.
    """

    def __init__(
        self,
        folder: StrPath,
        last_step: int | None = None,
        tensorboard: bool = True,
        about: str = "",
        pictures: Mapping[str, tuple[Path, int]] | None = None,
        follow: Callable[[Iterator[dict[str, Any]], Any], Follower] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._events: EventFile | None = None
        self._follower: Follower | None = None
        seen = next(map(place_of, each_metric_from_the_end(self.folder)), None) if follow else None
        _cut_back(self.folder / METRICS_FILE, last_step)
        self._file = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        if tensorboard:
            self._open_events(last_step, about, pictures or {})
        if follow is not None:
            seen = None if last_step is None else seen
            self._follower = follow(each_metric(self.folder), seen)

    def _open_events(
        self, last_step: int | None, about: str, pictures: Mapping[str, tuple[Path, int]]
    ) -> None:
        """Begin the events anew, or add a file to them that hides those from `last_step` on."""
        folder = self.folder / EVENTS_FOLDER
        if last_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        goes_on = _let_events_sort_first(folder)
        # Lines after `last_step` are gone. Lines of `last_step` may have been written after the
        # last sync, so that their events were lost in a kill: these are written again. Where there
        # are no events (the setting was off), all lines are.
        self._events = EventFile(folder, hide_from=last_step if goes_on else None)
        unseen = self._of_step(last_step)[::-1] if goes_on else each_metric(self.folder)
        for record in unseen:
            self._write_events(record)
        if about:
            indented = "".join(f"    {line}\n" for line in about.splitlines())
            self._events.add_text("config", indented, last_step or 0)
        for tag, (path, step) in pictures.items():
            if last_step is not None and (step == last_step or not goes_on):
                self._add_picture(tag, path, step)

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Show the PNG at `path`, as it is after `step` steps."""
        self._add_picture(tag, path, step)
        if self._follower is not None:
            self._follower.picture(tag, path, step)

    def _add_picture(self, tag: str, path: Path, step: int) -> None:
        if self._events is not None and path.is_file():
            self._events.add_picture(tag, path.read_bytes(), step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record: a dict with `step` and numbers. Non-finite numbers become null."""
        line = _line(record)
        self._file.write(line)
        self._file.flush()
        self._write_events(json.loads(line))
        if self._follower is not None:
            self._follower.write(json.loads(line))

    def _write_events(self, record: dict[str, Any]) -> None:
        if self._events is not None:
            scalars = {k: v for k, v in record.items() if k not in X_AXES and _is_scalar(v)}
            self._events.add(scalars, record["step"])

    def _of_step(self, step: int | None) -> list[dict[str, Any]]:
        """The records of one of the last steps, the newest first."""
        found = []
        for record in each_metric_from_the_end(self.folder):
            if step is None or record["step"] < step:
                break
            if record["step"] == step:
                found.append(record)
        return found

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold the evaluation after `step` steps."""
        return any(is_evaluation(record) for record in self._of_step(step))

    def latest(self, prefix: str) -> dict[str, Any]:
        """The newest record with a key that starts with `prefix`, or an empty dict."""
        quoted = f'"{prefix}'.encode()  # parsing every line would take 20 times longer
        for _, line in _lines_from_the_end(self.folder / METRICS_FILE):
            record = parse_line(line) if quoted in line else None
            if record is not None and any(key.startswith(prefix) for key in record):
                return record
        return {}

    def sync(self) -> None:
        """Put all lines on disk. Called before a checkpoint is written, so that the metrics are
        never behind the checkpoint."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.sync()

    def close(self) -> None:
        """Close the file and the events; a second call does nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._follower is not None:
            self._follower.close()
            self._follower = None


def place_of(record: dict[str, Any]) -> tuple[int, bool]:
    """Where a record stands in the order of the metrics: after its step's training figures comes
    the evaluation."""
    return record["step"], is_evaluation(record)


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record holds an evaluation rather than training figures."""
    return has_accuracies(record) or any(key.startswith("health/") for key in record)


def has_accuracies(record: dict[str, Any]) -> bool:
    """Whether a record holds accuracies on the validation file, which need labels."""
    return any(key.startswith("val/") for key in record)


def _is_scalar(value: Any) -> bool:
    """Whether TensorBoard can show a value; float64 has no integer of 400 digits."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _line(record):
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line's record; None where it is no JSON object with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < MAX_STEPS else None


def _lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset behind its newline, line without newline) of a file's complete lines, the last line
    first; nothing without a file."""
    if not path.exists():
        return
    check_kind(path)
    with path.open("rb") as file:
        position = end = file.seek(0, os.SEEK_END)
        first, is_complete = b"", False  # what follows the last newline is no complete line
        while position > 0:
            size = min(_CHUNK_BYTES, position)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + first).split(b"\n")
            for line in reversed(lines if position else [first, *lines]):
                if is_complete:
                    yield end + 1, line
                is_complete = True
                end -= len(line) + 1


def _cut_back(path: Path, last_step: int | None) -> None:
    """Make a metrics file end with the last record of `last_step` or of a step before; None: empty.

    The lines are in order of steps. Cutting is one system call: a kill leaves the file as it was,
    or cut.
    """
    check_kind(path)  # a device takes any line and keeps none
    kept_bytes = 0
    for end, line in _lines_from_the_end(path) if last_step is not None else ():
        record = parse_line(line)
        if record is not None and record["step"] <= last_step:
            kept_bytes = end
            break
    with path.open("ab") as file:
        file.truncate(kept_bytes)


def _let_events_sort_first(folder: Path) -> bool:
    """Whether a folder has event files. TensorBoard reads them in the order of their names, which
    begin with the second in which they were made: if that is not over (or the clock was put back),
    give them names of a time long ago."""
    before = sorted(folder.glob(f"{EVENTS_PREFIX}*"))
    if before and before[-1].name >= f"{EVENTS_PREFIX}{int(time.time()):010d}":
        for number, path in enumerate(before):
            path.rename(folder / f"{EVENTS_PREFIX}{number:010d}.before")
    return bool(before)
