"""Damaged label lists and metrics, and what their bytes say by a reading of their own."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.training.label_choice import choose_labels
from ffcv_ssl.training.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from torture.processes import one_line
from torture.text_mutants import damaged_bytes

LABELS = np.where(np.arange(40) == 7, -1, np.arange(40) % 4)
"""Of 40 samples; sample 7 has none."""
NAMES = [f"c{index % 4}/image {index}.jpg" for index in range(40)]
LISTS = [b"0\n5\n9\n# a comment\n12\n", "".join(f"{name}\n" for name in NAMES[8:20]).encode()]
RECORDS = [{"epoch": k / 4, "step": k, "train/loss": 1 / (k + 1)} for k in range(12)]
METRICS = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
SOUND_LINES = frozenset(METRICS.splitlines())
LAST_STEP = 6


def try_label_list(folder: Path, choose: random.Random) -> str:
    """Choose labels by a damaged list. Raises AssertionError unless they are those of the samples
    that the list names, or the list is refused because it names none, or one twice."""
    content, path = damaged_bytes(choose.choice(LISTS), choose), folder / "list.txt"
    path.write_bytes(content)
    named = named_samples(content)
    try:
        kept = choose_labels(LABELS, 4, "file", file=str(path), names=NAMES)
    except UserError as error:
        assert named is None, f"refused, but it names {named}: {error}"
        return one_line(error)
    assert named is not None, f"{content!r} was read"
    expected = np.full(len(LABELS), -1)
    expected[named] = LABELS[named]
    assert np.array_equal(kept, expected), f"{np.flatnonzero(kept >= 0)}, not {named}"
    return "read"


def named_samples(content: bytes) -> list[int] | None:
    """The samples that a list names, by a reading of its own; None where it is to be refused."""
    try:
        lines = re.split("\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError:
        return None
    entries = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
    if all(re.fullmatch(r"\d{1,18}", entry) for entry in entries):
        samples = [int(entry) for entry in entries]
    else:
        files = {name.partition("/")[2]: sample for sample, name in enumerate(NAMES)}
        samples = [files.get(re.sub(".*/", "", entry, flags=re.DOTALL), -1) for entry in entries]
    are_right = all(0 <= sample < len(LABELS) and LABELS[sample] >= 0 for sample in samples)
    return samples if samples and are_right and len(set(samples)) == len(samples) else None


def try_metrics(folder: Path, choose: random.Random) -> str:
    """Read damaged metrics, and go on behind them. Raises AssertionError where a record that their
    whole lines hold is not read, or another is, or where others are kept than those up to the last
    one of LAST_STEP or before."""
    content = damaged_bytes(METRICS, choose)
    (folder / METRICS_FILE).write_bytes(content)
    whole = whole_lines(content)
    untouched = [record for line, record in whole if line in SOUND_LINES]
    assert all(record in RECORDS for record in untouched)
    records = [record for _, record in whole if record is not None]
    check_records(read_metrics(folder), records)
    log = MetricsLog(folder, last_step=LAST_STEP, tensorboard=False)
    behind = max((k for k, r in enumerate(records, 1) if r["step"] <= LAST_STEP), default=0)
    kept = records[:behind]
    check_records(read_metrics(folder), kept)
    log.write({"step": 7, "train/loss": 0.5})
    log.close()
    check_records(read_metrics(folder), [*kept, {"step": 7, "train/loss": 0.5}])
    if any(record["step"] > LAST_STEP for record in kept):
        return "later lines kept before a damaged step"
    return "no line lost" if len(untouched) == len(RECORDS) else "lines lost"


def whole_lines(content: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
    """[(line, its record or None)] of the lines that end, by a reading of its own."""
    found: list[tuple[bytes, dict[str, Any] | None]] = []
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        is_record = type(step) is int and step in range(2**63)
        found.append((line, record if is_record else None))
    return found


def check_records(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Raise AssertionError where records differ; as text, in which NaN equals NaN."""
    assert json.dumps(found) == json.dumps(expected), f"{found}, not {expected}"
