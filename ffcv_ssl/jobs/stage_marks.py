"""What a stage of a chain leaves in its folder when it has finished, so that it is not run twice.

Guarantees: a mark holds the stage's settings and digests of the files that they named when the
stage started; it is written completely or not at all. A stage that has finished removes the marks
of the stages after it: they have worked on what it left before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.files import explained, write_text
from ffcv_ssl.jobs.slurm_task import RequeueingCommand, is_first_task
from ffcv_ssl.reader import Reader

MARK = "stage.json"
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class StageCommand(RequeueingCommand):
    """What each task of a stage's job runs; rank 0 marks the stage as finished."""

    settings: str
    """All settings of the stage's command, as YAML."""
    later: tuple[str, ...]
    """The folders of the stages after it."""

    def __call__(self) -> None:
        """Run the command; raises SystemExit unless it ended with exit code 0."""
        inputs = read_inputs(self.folder, self.settings) if is_first_task() else {}
        super().__call__()
        if is_first_task():
            mark_finished(self.folder, self.settings, inputs, None, self.later)


def read_inputs(folder: str | Path, settings: str) -> dict[str, str]:
    """{path: digest} of the files that a stage's settings name, without the files of other stages.

    folder: the stage's own, beside the folders of the other stages. settings: all settings of its
    command, as YAML.
    """
    chain = Path(folder).resolve().parent
    named = flatten_as_text(yaml.safe_load(settings) or {}).values()
    files = [value for value in named if isinstance(value, str) and os.path.isfile(value)]
    return {path: _digest(path) for path in files if chain not in Path(path).resolve().parents}


def _digest(path: str) -> str:
    """Text that is equal for equal content; of a `.beton`, only its fingerprint is read."""
    with contextlib.suppress(OSError):
        if path.endswith(".beton"):
            with contextlib.suppress(BetonError), Reader(path) as reader:
                return reader.fingerprint
        digest = hashlib.blake2b(digest_size=8)
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()
    return "not readable"


def mark_finished(
    folder: str | Path,
    settings: str,
    inputs: dict[str, str],
    summary: Any,
    later: Iterable[str | Path] = (),
) -> None:
    """Note in a stage's folder that its command has finished with `settings` (YAML), having begun
    with `inputs` as of `read_inputs`. Raises CheckpointError.

    summary: what the command said in its last line, or None. later: folders of the stages after it.
    """
    for other in later:
        (Path(other) / MARK).unlink(missing_ok=True)
    record, path = {"settings": settings, "inputs": inputs, "summary": summary}, Path(folder) / MARK
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")


def is_finished(folder: str | Path, settings: str) -> bool:
    """Whether the stage has finished with these settings. Raises UserError where a file that they
    name has changed since."""
    try:
        mark = json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))
        is_same, before = mark["settings"] == settings, mark["inputs"]
    except (OSError, ValueError, KeyError):
        return False
    for path, now in read_inputs(folder, settings).items() if is_same else ():
        if before.get(path, now) != now:
            remedy = f"restore it, or {how_to_run_anew(folder)}"
            raise UserError(f"{folder}: {path} has changed since this stage finished; {remedy}")
    return is_same


def summary_of(folder: str | Path) -> Any:
    """What the command of a finished stage said in its last line."""
    return json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))["summary"]


def how_to_run_anew(folder: str | Path) -> str:
    """The remedy where a stage has trained a network in its folder with other settings or files."""
    return f"move {folder} away to run the stage anew, or give the chain another --out"
