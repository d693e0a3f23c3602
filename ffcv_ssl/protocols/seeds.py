"""`seeds`: mean and spread of results over seeds, as a table.

    python evaluate.py seeds --checkpoint runs/simclr_seed* runs/suncet_seed*

Results are those in the folders' `results.jsonl`. They belong together where protocol, data,
settings and the pretraining run's configuration are the same but for seeds and paths. Of several of
one run the newest counts; several runs of one seed are refused, as one would count for all. The
spread is the standard deviation of one result (n - 1).
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ffcv_ssl.checkpoint import write_text
from ffcv_ssl.command import UserError
from ffcv_ssl.protocols.common import refuse_ranks, writable_folder
from ffcv_ssl.protocols.nested import accuracies, run_folder
from ffcv_ssl.results import flatten, read_results

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
        for about, paths, values in groups
    ]
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
    """[(what a group is, checkpoints, values)] of all results in some folders, in their order.

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
                about, key, seeds = describe(record, name)
                _, members = groups.setdefault(key, (about, {}))
                before = members.setdefault(seeds, (folder, record, value))
                _refuse_other_run(before, folder, record, about)
                if str(record.get("time")) >= str(before[1].get("time")):
                    members[seeds] = (folder, record, value)
    if not groups:
        raise UserError(f"metric: got {metric!r}, but no result has it")
    found = []
    for about, members in groups.values():
        _, records, values = zip(*members.values())
        found.append((about, [record.get("checkpoint") for record in records], values))
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
    found = {metric: flatten(metrics).get(metric)} if metric else accuracies(metrics)
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def describe(record, metric):
    """(what a result is, in words by column; its group's key; its seeds, a key too)."""
    settings, origin = flatten(record.get("settings", {})), _origin(record.get("checkpoint"))
    data, about = record.get("data", {}), record.get("about", {})
    words = {"protocol": record["protocol"], "data": Path(str(data.get("val"))).stem}
    words["metric"] = metric
    content = [data.get(key) for key in ("train_content", "val_content", "label_field")]
    content.append(data.get("image_field", "image"))  # which records of before do not say
    whose = [_bound(config) for config in origin] or record.get("checkpoint")
    key = [record["protocol"], metric, content, _bound(settings), whose, about.get("step")]
    seeds = [[side.get(key) for key in SEEDS] for side in (settings, *origin)]
    return words, json.dumps(key, sort_keys=True, default=str), json.dumps(seeds)


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
            found.append(flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))
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
    """The table as Markdown, in %."""
    lines = ["| checkpoint | protocol | data | metric | n | mean +- sd, % | range |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = "" if row["sd"] is None else f" +- {100 * row['sd']:.2f}"
        ends = f"{100 * row['min']:.2f} to {100 * row['max']:.2f}" if row["n"] > 1 else ""
        cells = [row["checkpoint"], row["protocol"], row["data"], row["metric"], str(row["n"])]
        lines.append(f"| {' | '.join(cells)} | {100 * row['mean']:.2f}{spread} | {ends} |")
    return "\n".join(lines) + "\n"
