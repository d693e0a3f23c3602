"""What the file of a chain and its command line ask for: stages, each a command with its settings.

All mistakes in them are UserErrors of one line, before the first stage starts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import PositiveInt

from ffcv_ssl.config.app_files import app_folder
from ffcv_ssl.config.flags import with_true
from ffcv_ssl.config.messages import find_mistake, one_line
from ffcv_ssl.config.parsing import read_words
from ffcv_ssl.config.plain import as_words
from ffcv_ssl.config.yaml_layers import merge, nested, read_layers
from ffcv_ssl.errors import UserError
from ffcv_ssl.jobs.slurm import SlurmConfig

SCRIPTS = app_folder()  # of train.py and evaluate.py


@dataclass(frozen=True)
class StageEntry:
    """A stage in a chain's file."""

    command: str = ""
    """train, or a protocol of evaluate.py."""
    config: str | None = None
    """The command's configuration file."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings over those of the file."""
    processes: PositiveInt = 1
    """Ranks, started by torchrun; on Slurm the job's tasks count instead."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Settings of the stage's job."""


@dataclass(frozen=True)
class ChainFile:
    """A chain's file."""

    stages: dict[str, StageEntry]
    out: str | None = None
    """The folder of all stages; null: runs/NAME for NAME.yaml."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Settings of all jobs."""


class Stage(NamedTuple):
    """One command of a chain."""

    name: str
    command: list[str]
    """train.py, or evaluate.py and a protocol."""
    words: list[str]
    """The command's settings as words."""
    folder: Path
    processes: int
    slurm: dict[str, Any]
    """The chain's settings of its job, over those of its own configuration."""
    settings: str = ""
    """All settings of its command as YAML, once they are resolved."""


def read_chain(argv: Sequence[str]) -> list[Stage]:
    """The stages that a command line asks for, in their order. Raises UserError."""
    given = _given(argv)
    path = given["config"]
    try:
        chain = merge(*(own for _, own in read_layers(path)))
    except ValueError as error:
        raise UserError(one_line(error)) from None
    stages = chain.get("stages") or {}
    if mistake := find_mistake(ChainFile, chain):
        raise UserError(f"{path}: {mistake}")
    if not stages:
        raise UserError(f"{path}: stages: got none, expected a mapping of at least one stage")
    for reserved in {"config", "out", "all", "slurm"} & set(stages):
        raise UserError(f"{path}: stages: {reserved!r} is a reserved word; rename the stage")
    for group in set(given) - {"config", "out", "all", "slurm", *stages}:
        expected = f"expected out, all, slurm or a stage: {', '.join(stages)}"
        raise UserError(f"{path}: --{group}: no such stage, {expected}")
    out = Path(given.get("out") or chain.get("out") or f"runs/{Path(path).stem}")
    folders = {name: out / name for name in stages}
    jobs = merge(chain.get("slurm") or {}, given.get("slurm", {}))
    try:
        return [_stage(name, stages[name], folders, jobs, given) for name in stages]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """A command line as nested settings, whose values are texts; `config` is the chain's file."""
    words = list(argv)
    if words and not words[0].startswith("--"):
        words[0] = f"--config={words[0]}"
    given: dict[str, Any] = {}
    for key, text in read_words(with_true(words, StageEntry)):
        group, dot, _ = key.removeprefix("--").partition(".")
        if not key.startswith("--") or (group in ("config", "out")) == bool(dot):
            raise UserError(f"got {key!r}, expected --out, --STAGE.KEY, --all.KEY or --slurm.KEY")
        if (not text and group in ("config", "out")) or text is None:
            raise UserError(f"{key}: got nothing, expected a value")
        given = merge(given, nested({key.removeprefix("--"): text}))
    if "config" not in given:
        usage = "python -m ffcv_ssl.jobs.chain CHAIN.yaml"
        raise UserError(f"got no chain, expected a YAML file: {usage}")
    return given


def _stage(
    name: str,
    entry: dict[str, Any],
    folders: dict[str, Path],
    jobs: dict[str, Any],
    given: dict[str, Any],
) -> Stage:
    """A stage of the chain's file with the command line's settings over it.

    jobs: the settings of all jobs; those of this stage win, since it needs a job of its own kind.
    """
    if not entry.get("command"):
        raise UserError(f"stages.{name}.command: got none, expected train, finetune, snn...")
    own = dict(given.get(name, {}))
    job = merge(jobs, entry.get("slurm") or {}, own.pop("slurm", {}))
    command = [str(SCRIPTS / "train.py")]
    if entry["command"] != "train":
        command = [str(SCRIPTS / "evaluate.py"), entry["command"]]
    settings = merge(entry.get("overrides") or {}, given.get("all", {}), own)
    words = [f"--config={entry['config']}"] if entry.get("config") else []
    words += [_with_folders(word, folders, f"stages.{name}") for word in as_words(settings)]
    words += [f"--out={folders[name]}"]
    return Stage(name, command, words, folders[name], entry.get("processes", 1), job)


def _with_folders(word: str, folders: dict[str, Path], where: str) -> str:
    """A word in which each `{stage}` is replaced by the folder of that stage."""
    for name in re.findall(r"\{(\w[\w-]*)\}", word):
        if name not in folders:
            raise UserError(f"{where}: got {{{name}}}, expected one of {', '.join(folders)}")
        word = word.replace(f"{{{name}}}", str(folders[name]))
    return word


def resolved(stage: Stage) -> Stage:
    """A stage with all settings of its command. Raises UserError for what that would refuse."""
    words = [sys.executable, *stage.command, *stage.words, "--print_config"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"stages.{stage.name}: {lines[-1]}")
    print(done.stderr, end="", file=sys.stderr)  # notes, say on names of settings that are old
    return stage._replace(settings=done.stdout)
