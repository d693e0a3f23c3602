"""`seeds`: mean and spread of results over seeds, as a table.

    python evaluate.py seeds --checkpoint runs/simclr_seed* runs/suncet_seed*

Results are those in the folders' `results.jsonl`. They belong together where protocol, data,
settings and the pretraining run's configuration are the same but for seeds and paths; the table
says the settings in which its rows differ. Of several of one run the newest counts; several runs of
one seed are refused, as one would count for all. The spread is the standard deviation of one result
(n - 1).
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.common import refuse_ranks, writable_folder
from ffcv_ssl.evaluation.nested import accuracies, run_folder
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.files import write_text

TABLE = "seeds.md"
# What may differ between runs that are to be averaged: what is drawn, where things lie, how fast.
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
    """Folders with results.jsonl: those of runs, or of the stages of chains."""
    metric: str | None = None
    """A number by name, as backbone.top1; null: every top1 and map, of each setting once."""
    out: str | None = None
    """Folder in which to write the table, seeds.md; null: it is only shown."""


def run(config, world, stop):
    """Average the results; returns them by group. Raises UserError."""
    refuse_ranks("seeds", world)
    folder = writable_folder(config.out) if config.out else None
    groups = collect(config.checkpoint, config.metric)
    rows = [
        {"checkpoint": common_name(paths), **about, **summary(values)}
        for about, _, paths, values in groups
    ]
    for row, shown in zip(rows, told_apart(rows, [asked for _, asked, *_ in groups])):
        row["settings"] = shown
    text = render(rows)
    if folder is not None:
        _write(folder / TABLE, text)
    world.say(text)
    return {"protocol": "seeds", "groups": rows}


def _write(path, text):
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); use --out") from None


def collect(folders, metric=None):
    """[(what a group is, what was asked, checkpoints, values)] of all results in some folders, in
    their order; the first two as of `describe`.

    Raises UserError for a folder without results, where none has the metric, and for two runs with
    equal seeds.
    """
    if not folders:
        raise UserError("checkpoint: got none, expected --checkpoint RUN RUN ...")
    groups = {}
    for folder in {Path(folder).resolve(): folder for folder in folders}.values():
        records = read_results(folder)
        if not records:
            raise UserError(f"{folder}: no results.jsonl with results; evaluate something there")
        for record in records:
            numbers = _numbers(record, metric)
            for name, value in numbers.items():
                about, asked, seeds = describe(record, name)
                key = json.dumps([record["protocol"], name, asked], sort_keys=True, default=str)
                _, _, members = groups.setdefault(key, (about, asked, {}))
                before = members.setdefault(seeds, (folder, record, value))
                _refuse_other_run(before, folder, record, about)
                if str(record.get("time")) >= str(before[1].get("time")):
                    members[seeds] = (folder, record, value)
    if not groups:
        raise UserError(f"metric: got {metric!r}, but no result has it")
    found = []
    for about, asked, members in groups.values():
        _, records, values = zip(*members.values())
        found.append((about, asked, [record.get("checkpoint") for record in records], values))
    return found


def _refuse_other_run(before, folder, record, about):
    """Raise UserError where two results of equal seeds are not of one run: they lie in different
    folders, or are of different files with different weights."""
    sides = [before[0], folder]
    if before[0] == folder:
        sides = [side.get("checkpoint") for side in (before[1], record)]
        if before[1].get("weights") == record.get("weights"):
            return
    if sides[0] != sides[1]:
        what = f"{about['protocol']} on {about['data']} has equal seeds and settings"
        raise UserError(f"{sides[0]}, {sides[1]}: {what} in both; give one of them")


def common_name(paths):
    """What some paths have in common, with a * for what differs: `runs/a_seed*/pretrain`."""
    paths = [str(path) for path in dict.fromkeys(paths)]
    start = _common_start(paths)
    if len(paths) == 1:
        return start
    ends = [path[len(start) :][::-1] for path in paths]
    return f"{start}*{_common_start(ends)[::-1]}"


def _common_start(texts):
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts))
    return "".join(letters[0] for letters in same)


def _numbers(record, metric):
    """The numbers of a record that are asked for, by name."""
    metrics = record.get("metrics", {})
    found = {metric: flatten_as_text(metrics).get(metric)} if metric else accuracies(metrics)
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def describe(record, metric):
    """(what a result is, in words by column; what was asked, alike in a group; its seeds, a key).

    What was asked are three flat dicts: the result's own settings; its files' contents; the age of
    its checkpoint and the settings of the run which that is of, `run.` before their names, or else
    its path.
    """
    settings, origin = (
        flatten_as_text(record.get("settings", {})),
        _origin(record.get("checkpoint")),
    )
    data, about = record.get("data", {}), record.get("about", {})
    words = {"protocol": record["protocol"], "data": Path(str(data.get("val"))).stem}
    words["metric"] = metric
    own = _bound(settings) | {"data.label_field": data.get("label_field")}
    own["data.image_field"] = data.get("image_field", "image")  # records of before do not say it
    files = {key: data.get(key) for key in ("train_content", "val_content")}
    rest = {"step": about.get("step")}
    for age, config in enumerate(origin):
        prefix = "run." + age * "checkpoint."
        rest |= {prefix + key: value for key, value in _bound(config).items()}
    if not origin:
        rest["checkpoint"] = record.get("checkpoint")
    seeds = [[side.get(key) for key in SEEDS] for side in (settings, *origin)]
    return words, (own, files, rest), json.dumps(seeds)


def told_apart(rows, asked):
    """For each row of the table {setting: value}: those in which rows of its protocol differ, the
    contents of files that differ under one name, and where rows still look the same, what else
    differs between these. asked: as of `describe`."""
    own, files, rest = zip(*asked)
    own = _differences([row["protocol"] for row in rows], own)
    files = _differences([(row["protocol"], row["data"]) for row in rows], files)
    shown = [first | second for first, second in zip(own, files)]
    names = ("checkpoint", "protocol", "data", "metric")
    looks = [(*(row[name] for name in names), its) for row, its in zip(rows, shown)]
    return [its | more for its, more in zip(shown, _differences(looks, rest))]


def _differences(kinds, settings):
    """For each dict of settings what differs between it and others of its kind."""
    found = []
    for kind, its in zip(kinds, settings):
        others = [other for same, other in zip(kinds, settings) if same == kind]
        keys = [key for key in its if any(key not in o or o[key] != its[key] for o in others)]
        found.append({key: its[key] for key in keys})
    return found


def _bound(flat):
    """The settings that results of one group share."""
    return {k: v for k, v in flat.items() if k not in FREE and not k.startswith(FREE_GROUPS)}


def _origin(checkpoint):
    """Configurations, flat, of the run that a checkpoint is of, of the run which that one began
    with, and so on; none where they are gone."""
    found, seen = [], set()
    while checkpoint and (path := run_folder(str(checkpoint)) / "config.yaml") not in seen:
        seen.add(path)
        try:
            found.append(flatten_as_text(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (OSError, yaml.YAMLError, AttributeError):
            break
        checkpoint = found[-1].get("checkpoint")
    return found


def summary(values):
    """{n, mean, sd, min, max} of shares; sd None for one."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return {"n": len(values), "mean": mean, "sd": spread, "min": min(values), "max": max(values)}


def render(rows):
    """The table as Markdown, in %; without a column of settings where none are to be told."""
    heads = ["checkpoint", "protocol", "data", "metric", "settings", "n", "mean +- sd, %", "range"]
    if not any(row["settings"] for row in rows):
        heads.remove("settings")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        spread = "" if row["sd"] is None else f" +- {100 * row['sd']:.2f}"
        ends = f"{100 * row['min']:.2f} to {100 * row['max']:.2f}" if row["n"] > 1 else ""
        settings = [f"{k}={'null' if v is None else v}" for k, v in row["settings"].items()]
        own = {"settings": ", ".join(settings), "range": ends}
        own["mean +- sd, %"] = f"{100 * row['mean']:.2f}{spread}"
        lines.append(f"| {' | '.join(str(own.get(head, row.get(head))) for head in heads)} |")
    return "\n".join(lines) + "\n"
