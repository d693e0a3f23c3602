"""Lists of runs, one Slurm job each or one chain of jobs: `--slurm.batch LIST.yaml`.

- configs/a.yaml
- {config: configs/b.yaml, name: lr_0.1, overrides: {optim.lr: 0.1}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_ssl.config.app_files import find_config
from ffcv_ssl.config.messages import find_mistake
from ffcv_ssl.config.parsing import read_words
from ffcv_ssl.config.plain import as_words
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One run of a list; a file's name alone is its `config`."""

    config: str
    name: str | None = None
    """The run's folder is runs/NAME; null: the name of the configuration file."""
    overrides: dict[str, Any] | None = None
    """Settings over those of the file."""


def batch_file(argv: Sequence[str]) -> str | None:
    """The list that a command line names, or None."""
    files = [text or "" for key, text in read_words(argv) if key == "--slurm.batch"]
    return files[-1] if files else None


def read_batch(path: str, argv: Sequence[str] = ()) -> list[list[str]]:
    """The command line of each run in a list of runs, all words of `argv` last.

    Raises UserError for a list that is not one.
    """
    try:
        entries = read_yaml(find_config(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: got no list, expected a list of configuration files")
    if any(key == "--config" for key, _ in read_words(argv)):
        raise UserError(f"{path}: got --config too, expected it in the list's entries")
    return [[*_words(entry, f"{path}: entry {i}"), *argv] for i, entry in enumerate(entries, 1)]


def _words(entry: Any, where: str) -> list[str]:
    given = {"config": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not given.get("config"):
        raise UserError(f"{where}: got {entry!r}, expected a file or {{config, name, overrides}}")
    if mistake := find_mistake(Entry, given):
        raise UserError(f"{where}: {mistake}")
    run = Entry(**given)
    name = run.name or Path(run.config).stem
    return [f"--config={run.config}", f"--out=runs/{name}", *as_words(run.overrides or {})]
