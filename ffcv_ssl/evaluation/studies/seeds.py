"""`seeds`: mean and spread of results over seeds, as a table.

    python evaluate.py seeds --checkpoint runs/simclr_seed* runs/suncet_seed*

Results are read from the folders' `results.jsonl`. They belong together where protocol, data,
settings and the pretraining run's configuration differ only in seeds and paths; the table shows the
settings in which its rows differ. Of several results of one run the newest counts; two runs with
the same seed are refused. The spread is the standard deviation of one result (n - 1).
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.former_names import with_new_names
from ffcv_ssl.evaluation.protocol_run import refuse_ranks
from ffcv_ssl.evaluation.results import (
    accuracies,
    checkpoint_folder,
    read_results,
    writable_folder,
)
from ffcv_ssl.files import write_text
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World

TABLE = "seeds.md"
# What may differ between results that are averaged: seeds, paths, and what only changes the speed.
SEEDS = ("seed", "labels.seed", "labelled.labels.seed")
FREE = (
    *SEEDS,
    "out",
    "checkpoint",
    "data.num_workers",
    "data.image_field",
    "data.label_field",
    "data.train",
    "data.val",
    "features.folder",
)
FREE_GROUPS = ("system.", "slurm.", "log.", "saving.")


@dataclass(frozen=True)
class SeedsConfig:
    """Whose results."""

    checkpoint: list[str] = field(default_factory=list)
    """Folders with results.jsonl: of runs, or of the stages of chains."""
    metric: str | None = None
    """A number by name, as backbone.top1; null: every top1 and map, once per setting."""
    out: str | None = None
    """Folder in which to write the table, seeds.md; null: it is only shown."""


class Asked(NamedTuple):
    """What a result was asked for, alike in a group: three flat dicts."""

    settings: dict[str, Any]
    """The result's own settings."""
    files: dict[str, Any]
    """The contents of its files."""
    origin: dict[str, Any]
    """The age of its checkpoint, and the settings of the run that the checkpoint is of, with `run.`
    before their names, or else the checkpoint's path."""


class Group(NamedTuple):
    """Results that are averaged."""

    shown: dict[str, str]
    """What they are, in words by column."""
    asked: Asked
    checkpoints: list[Any]
    values: list[float]


def run(config: SeedsConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Average the results; returns them by group. Raises UserError."""
    refuse_ranks("seeds", world)
    folder = writable_folder(config.out) if config.out else None
    groups = collect(config.checkpoint, config.metric)
    rows: list[dict[str, Any]] = [
        {"checkpoint": common_name(group.checkpoints), **group.shown, **summary(group.values)}
        for group in groups
    ]
    for row, settings in zip(rows, told_apart(rows, [group.asked for group in groups])):
        row["settings"] = settings
    text = render(rows)
    if folder is not None:
        _write(folder / TABLE, text)
    world.say(text)
    return {"protocol": "seeds", "groups": rows}


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); use --out") from None


def collect(folders: Sequence[str], metric: str | None = None) -> list[Group]:
    """All results in some folders by group, in their order.

    Raises UserError for a folder without results, where none has the metric, and for two runs with
    equal seeds.
    """
    if not folders:
        raise UserError("checkpoint: got none, expected --checkpoint RUN RUN ...")
    groups: dict[str, tuple[dict[str, str], Asked, dict]] = {}
    for folder in {Path(folder).resolve(): folder for folder in folders}.values():
        records = read_results(folder)
        if not records:
            raise UserError(f"{folder}: no results.jsonl with results; evaluate something there")
        for record in records:
            for name, value in _numbers(record, metric).items():
                shown, asked, seeds = describe(record, name)
                key = json.dumps([record["protocol"], name, asked], sort_keys=True, default=str)
                _, _, members = groups.setdefault(key, (shown, asked, {}))
                before = members.setdefault(seeds, (folder, record, value))
                _refuse_other_run(before, folder, record, shown)
                if str(record.get("time")) >= str(before[1].get("time")):
                    members[seeds] = (folder, record, value)
    if not groups:
        raise UserError(f"metric: got {metric!r}, but no result has it; leave out --metric")
    found = []
    for shown, asked, members in groups.values():
        checkpoints = [record.get("checkpoint") for _, record, _ in members.values()]
        found.append(Group(shown, asked, checkpoints, [value for *_, value in members.values()]))
    return found


def _refuse_other_run(
    before: tuple[str, dict, float], folder: str, record: dict[str, Any], shown: dict[str, str]
) -> None:
    """Raise UserError where two results of equal seeds are not of one run: they lie in different
    folders, or are of different files with different weights."""
    sides: list[Any] = [before[0], folder]
    if before[0] == folder:
        sides = [side.get("checkpoint") for side in (before[1], record)]
        if before[1].get("weights") == record.get("weights"):
            return
    if sides[0] != sides[1]:
        raise UserError(
            f"{sides[0]}, {sides[1]}: {shown['protocol']} on {shown['data']} has equal seeds and "
            "settings in both; give only one of them"
        )


def common_name(paths: Iterable[Any]) -> str:
    """What some paths have in common, with a * for what differs: `runs/a_seed*/pretrain`."""
    names = [str(path) for path in dict.fromkeys(paths)]
    start = _common_start(names)
    if len(names) == 1:
        return start
    ends = [name[len(start) :][::-1] for name in names]
    return f"{start}*{_common_start(ends)[::-1]}"


def _common_start(texts: Iterable[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts))
    return "".join(letters[0] for letters in same)


def _numbers(record: dict[str, Any], metric: str | None) -> dict[str, float]:
    """The numbers of a record that are asked for, by name."""
    metrics = record.get("metrics", {})
    found = {metric: flatten_as_text(metrics).get(metric)} if metric else accuracies(metrics)
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def describe(record: dict[str, Any], metric: str) -> tuple[dict[str, str], Asked, str]:
    """(what a result is, in words by column; what was asked; its seeds, as a key)."""
    settings = flatten_as_text(record.get("settings", {}))
    origin = _origin(record.get("checkpoint"))
    data, about = record.get("data", {}), record.get("about", {})
    shown = {"protocol": record["protocol"], "data": Path(str(data.get("val"))).stem}
    shown["metric"] = metric
    own = _bound(settings) | {"data.label_field": data.get("label_field")}
    own["data.image_field"] = data.get("image_field", "image")  # older records lack it
    files = {key: data.get(key) for key in ("train_content", "val_content")}
    of_run = {"step": about.get("step")}
    for age, config in enumerate(origin):
        prefix = "run." + age * "checkpoint."
        of_run |= {prefix + key: value for key, value in _bound(config).items()}
    if not origin:
        of_run["checkpoint"] = record.get("checkpoint")
    seeds = [[side.get(key) for key in SEEDS] for side in (settings, *origin)]
    return shown, Asked(own, files, of_run), json.dumps(seeds)


def told_apart(rows: Sequence[dict[str, Any]], asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """For each row of the table the settings to show, {setting: value}.

    They are the settings in which rows of the same protocol differ, and the contents of files that
    differ under one name; where rows still look the same, also what else differs between them.
    """
    settings, files, origins = zip(*asked)
    own = _differences([row["protocol"] for row in rows], settings)
    contents = _differences([(row["protocol"], row["data"]) for row in rows], files)
    shown = [first | second for first, second in zip(own, contents)]
    names = ("checkpoint", "protocol", "data", "metric")
    looks = [(*(row[name] for name in names), first) for row, first in zip(rows, shown)]
    return [first | more for first, more in zip(shown, _differences(looks, origins))]


def _differences(kinds: Sequence[Any], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dict of settings what differs between it and others of the same kind."""
    found = []
    for kind, own in zip(kinds, settings):
        others = [other for same, other in zip(kinds, settings) if same == kind]
        keys = [key for key in own if any(key not in o or o[key] != own[key] for o in others)]
        found.append({key: own[key] for key in keys})
    return found


def _bound(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings that results of one group share."""
    return {k: v for k, v in flat.items() if k not in FREE and not k.startswith(FREE_GROUPS)}


def _origin(checkpoint: Any) -> list[dict[str, Any]]:
    """Flat configurations: of the run that a checkpoint is of, of the run that this one started
    from, and so on, as far as their folders are there."""
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while checkpoint and (path := checkpoint_folder(str(checkpoint)) / "config.yaml") not in seen:
        seen.add(path)
        try:
            config = read_yaml(path)
            config = with_new_names(config) if "checkpoint" in config else config
            found.append(flatten_as_text(config))
        except (ValueError, AttributeError, TypeError):
            break
        checkpoint = found[-1].get("checkpoint")
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """{n, mean, sd, min, max} of shares; sd is None for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return {"n": len(values), "mean": mean, "sd": spread, "min": min(values), "max": max(values)}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, in %; without a column of settings where no row shows any."""
    heads = ["checkpoint", "protocol", "data", "metric", "settings", "n", "mean +- sd, %", "range"]
    if not any(row["settings"] for row in rows):
        heads.remove("settings")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        spread = "" if row["sd"] is None else f" +- {100 * row['sd']:.2f}"
        ends = f"{100 * row['min']:.2f} to {100 * row['max']:.2f}" if row["n"] > 1 else ""
        settings = [f"{k}={'null' if v is None else v}" for k, v in row["settings"].items()]
        cells = {"settings": ", ".join(settings), "range": ends}
        cells["mean +- sd, %"] = f"{100 * row['mean']:.2f}{spread}"
        lines.append(f"| {' | '.join(str(cells.get(head, row.get(head))) for head in heads)} |")
    return "\n".join(lines) + "\n"


COMMAND = Command(SeedsConfig, run, "mean and spread of results over seeds")
