"""What a chain's stage leaves in its folder when it has finished, so that it is not run twice.

Guarantees: a mark stands for the settings and for what the files they name held when the stage
started; it is written at once or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import yaml

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.files import explained, write_text
from ffcv_ssl.reader import Reader

MARK = "stage.json"
_BLOCK_BYTES = 2**20


def read_inputs(folder, settings):
    """{path: digest} of the files that a stage's settings name, but for those of other stages.

    folder: the stage's own, beside theirs. settings: all of its command's, as YAML.
    """
    chain = Path(folder).resolve().parent
    named = flatten_as_text(yaml.safe_load(settings) or {}).values()
    files = [value for value in named if isinstance(value, str) and os.path.isfile(value)]
    return {path: _digest(path) for path in files if chain not in Path(path).resolve().parents}


def _digest(path):
    """Text that is equal for equal content; a `.beton` says it without being read as a whole."""
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


def mark_finished(folder, settings, inputs, summary):
    """Note in a stage's folder that its command has finished with `settings` (YAML), begun with
    `inputs` as of `read_inputs`; summary: the command's, or None. Raises CheckpointError."""
    record, path = {"settings": settings, "inputs": inputs, "summary": summary}, Path(folder) / MARK
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")


def unmark(folders):
    """Forget that the stages of some folders have finished."""
    for folder in folders:
        (folder / MARK).unlink(missing_ok=True)


def is_finished(folder, settings):
    """Whether the stage has finished with these settings. Raises UserError for a file that they
    name and that has changed since."""
    try:
        mark = json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))
        is_same, before = mark["settings"] == settings, mark["inputs"]
    except (OSError, ValueError, KeyError):
        return False
    for path, now in read_inputs(folder, settings).items() if is_same else ():
        if before.get(path, now) != now:
            remedy = f"restore it, or {how_to_run_anew(folder)}"
            raise UserError(f"{folder}: {path} has changed since this finished; {remedy}")
    return is_same


def summary_of(folder):
    """What the command of a finished stage said in its last line."""
    return json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))["summary"]


def how_to_run_anew(folder):
    """In words, for a stage that has trained a network in its folder with something else."""
    return f"move {folder} away to run the stage anew, or give the chain another --out"
