"""`curve`: a protocol over the checkpoints of one or several runs, and the compute they need.

A run's folder stands for all its kept copies (`checkpoint.keep_every`). One point is one number of
the protocol for one checkpoint; the curve is a table and a picture over epochs, images, FLOPs and
hours. Of two or more runs, the first is the yardstick: its best value, or `reach`, is looked up in
the others, linearly between their points, as in the savings of the SuNCEt paper (Assran et al.
2020, 4.1). That best value is the highest on the validation file, over all of the run's points; the
result's `selected_on` says so. Runs that are measured on different data are refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import nested
from ffcv_ssl.evaluation.common import refuse_ranks, results_folder, stop_if_asked, writable_folder
from ffcv_ssl.files import save_figure, write_text
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.metrics_log import is_evaluation, read_metrics
from ffcv_ssl.training.run_folder import CHECKPOINT

AXES = ("epoch", "updates", "images", "views", "flops", "hours")
PANELS = {"epoch": "epochs", "images": "images", "flops": "FLOPs", "hours": "hours"}


@dataclass(frozen=True)
class CurveConfig:
    """Which checkpoints, and what is measured of each."""

    checkpoint: list[str] = field(default_factory=list)
    """Checkpoints, or runs' folders: all kept copies of the run. The first run is the yardstick."""
    out: str | None = None
    """Folder of the table, the picture and the protocol's results; null: the first run's, and for
    results each checkpoint's own."""
    protocol: Literal["online", "linear", "mlp", "knn", "snn", "finetune", "transfer"] = "knn"
    """online: what the run itself recorded while it trained."""
    metric: str | None = None
    """A number of its result by name, as backbone.top1; null: the first top1 or map."""
    reach: ClosedUnitInterval | None = None
    """The value whose cost is compared between runs; null: the best one of the first run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The protocol's own settings: --settings.k [20] --settings.data.train A.beton."""
    system: SystemConfig = field(default_factory=SystemConfig)


def run(config, world, stop):
    """Measure every checkpoint; returns the points and the savings. Raises UserError."""
    refuse_ranks("curve", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN RUN ... or files")
    calls = calls_of(config)
    nested.check_paths(config.checkpoint)
    folder = writable_folder(config.out or nested.run_folder(config.checkpoint[0]))
    if config.protocol == "online":
        data = recorded_data(config.checkpoint)
        refuse_other_data(data, world, "choose another --protocol")
        metric, runs = recorded_points(config.checkpoint, config.metric)
    else:
        calls, data = _opened(calls, world)
        refuse_other_data(data, world, "give one with --settings.data.val or .label_field")
        metric, runs = measured_points(config, calls, world, stop)
    for name, points in runs.items():
        points.sort(key=lambda point: point["step"])
        if len(points) < 2:
            world.say(f"{name}: one checkpoint makes no curve; pretrain with checkpoint.keep_every")
    names = list(runs)
    target, savings, selected_on = None, {}, None
    if len(names) > 1 or config.reach is not None:
        target, savings = compare(runs, config.reach)
        selected_on = "val" if config.reach is None else None
    text = render(config.protocol, metric, runs, target, savings)
    stem = f"curve_{config.protocol}_{metric}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{stem}.md", text)
        draw(folder / f"{stem}.png", f"{config.protocol}, {metric}", runs, target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)}); use --out") from None
    world.say(text)
    return {
        "protocol": "curve", "of": config.protocol, "metric": metric, "runs": runs, "data": data,
        "reach": target, "selected_on": selected_on, "savings": savings,
        "table": str(folder / f"{stem}.md"),
        "picture": str(folder / f"{stem}.png"),
    }  # fmt: skip


# ---- Points --------------------------------------------------------------------------------------


def calls_of(config):
    """The protocol's configuration for each checkpoint; none for `online`. Raises UserError."""
    if config.protocol == "online":
        if config.settings:
            raise UserError("settings: protocol online has none; choose another --protocol")
        return []
    calls, paths = [], checkpoints_of(config.checkpoint)
    names = run_names(paths)
    for path in paths:
        out = config.out
        if out and config.protocol in nested.RESUMED:  # each has a run's folder of its own
            words = [config.protocol, names[nested.run_folder(path)].strip("/").replace("/", "_")]
            words += [] if Path(path).is_dir() else [Path(path).stem]
            out = str(Path(out) / "_".join(words))
        fixed = {"checkpoint": path, "out": out, "system": config.system}
        calls.append(nested.protocol_config(config.protocol, config.settings, **fixed))
    return calls


def measured_points(config, calls, world, stop):
    """(metric, {run: points}) of a protocol on every checkpoint, those on record not again."""
    names = run_names([call.checkpoint for call in calls])
    metric, runs = config.metric, {}
    for call in calls:
        stop_if_asked(stop)
        record = nested.call(config.protocol, call, world, stop)
        metric, value = nested.main_metric(record["metrics"], metric)
        name = names[nested.run_folder(call.checkpoint)]
        runs.setdefault(name, []).append(_point(record["about"], value, call.checkpoint))
    return metric, runs


def recorded_points(paths, metric):
    """(metric, {run: points}) of what runs recorded while they trained."""
    runs, names = {}, run_names(paths)
    for folder, name in names.items():
        records = [record for record in read_metrics(folder) if is_evaluation(record)]
        if not records:
            raise UserError(f"{folder}: no evaluations in its metrics; choose another --protocol")
        for record in records:
            values = {key[4:].replace("/", "."): record[key] for key in record if key[:4] == "val/"}
            metric, value = nested.main_metric(values, metric)
            runs.setdefault(name, []).append(_point(record, value, str(folder)))
    return metric, runs


def checkpoints_of(paths):
    """Files to measure: a folder becomes its kept copies, or its last checkpoint if it has none."""
    found = []
    for path in paths:
        kept = sorted(Path(path).glob("checkpoint_epoch_*.pt")) if Path(path).is_dir() else []
        found += [str(copy) for copy in kept] or [path]
    return list(dict.fromkeys(found))


def run_names(paths):
    """{folder: a name for it} of the runs that checkpoints belong to: the folder's own name, or its
    path where two share that."""
    folders = list(dict.fromkeys(nested.run_folder(path) for path in paths))
    own = [folder.resolve().name for folder in folders]
    return {f: name if own.count(name) == 1 else str(f) for f, name in zip(folders, own)}


def _point(about, value, checkpoint):
    """One point: the value, and where it stands on every axis that is known."""
    point = {"checkpoint": checkpoint, "step": about.get("step", 0), "value": value}
    point |= {axis: about[axis] for axis in AXES if axis in about}
    if "seconds" in about:
        point["hours"] = about["seconds"] / 3600
    return point


# ---- What the points are measured on ------------------------------------------------------------


def _opened(calls, world):
    """(the calls, {run: what it is to be measured on}), all checkpoints and folders for results
    found sound before the first one is measured. Raises UserError."""
    checked, names = nested.checked(calls, world), run_names([call.checkpoint for call in calls])
    for call in calls:
        results_folder(call)
    data = {names[nested.run_folder(call.checkpoint)]: measured_on for call, measured_on in checked}
    return [call for call, _ in checked], data


def recorded_data(paths):
    """{run: what its own evaluations are of, as in `nested.checked`}, as its checkpoint says; None
    where it has none that does. Raises CheckpointError."""
    data = {}
    for folder, name in run_names(paths).items():
        files = [folder / CHECKPOINT, *sorted(folder.glob("checkpoint_epoch_*.pt"))]
        file = next((file for file in files if file.is_file()), None)
        state = checkpoint.load(file) if file else {}
        content = (state.get("datasets") or {}).get("val")
        its = (state.get("config") or {}).get("data", {})
        known = {"val": its.get("val"), "val_content": content} if content else None
        data[name] = known and {**known, "label_field": its.get("label_field")}
    return data


def refuse_other_data(data, world, remedy):
    """Raise UserError where runs are measured on other images or labels than the first one; a run
    of which that is not known is taken, which is said. data: {run: of `nested.checked`}."""
    known = {name: its for name, its in data.items() if its is not None}
    for name in data if len(data) > 1 else ():
        if name not in known:
            what = "does not hold which validation file its numbers are of"
            world.say(f"{name}: {what}; taken to be the other runs'", sys.stderr)
    first = next(iter(known), None)
    for name, its in known.items():
        if any(its[key] != known[first][key] for key in ("val_content", "label_field")):
            sides = f"measured on {_shown(its)}, but {first} on {_shown(known[first])}"
            raise UserError(f"{name}: {sides}; {remedy}")


def _shown(its):
    return f"{its['val']}, field '{its['label_field']}', {its['val_content']}"


# ---- Compute to reach a value --------------------------------------------------------------------


def first_crossing(points, axis, target):
    """Where on an axis a run first reaches a value, linearly between its points; None: never.

    points: dicts with `value` and the axis, in order. A run that starts there counts from its first
    point.
    """
    before = None
    for point in points:
        if axis not in point:
            return None
        if point["value"] >= target:
            if before is None:
                return point[axis]
            share = (target - before["value"]) / (point["value"] - before["value"])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


def compare(runs, reach=None):
    """(the value to reach, {run: {axis: {cost, share}}}) of runs, the first one the yardstick.

    runs: {name: points in order}. The value is `reach`, or the first run's best. cost: where the
    run first reaches it, None if never; share: of the first run's cost, None if either never does.
    """
    yardstick = next(iter(runs.values()))
    target = max(point["value"] for point in yardstick) if reach is None else reach
    costs = {
        name: {axis: first_crossing(points, axis, target) for axis in AXES}
        for name, points in runs.items()
    }
    first = costs[next(iter(runs))]
    savings = {
        name: {axis: {"cost": c, "share": _ratio(c, first[axis])} for axis, c in own.items()}
        for name, own in costs.items()
    }
    return target, savings


def _ratio(cost, whole):
    return cost / whole if cost is not None and whole else None


# ---- Table and picture ---------------------------------------------------------------------------


def render(protocol, metric, runs, target=None, savings=None):
    """The curve, and the savings, as Markdown tables."""
    lines = [f"| run | {' | '.join(AXES)} | {protocol} {metric} |"]
    lines += ["|---" * (len(AXES) + 2) + "|"]
    for name, points in runs.items():
        for point in points:
            axes = " | ".join(_number(point.get(axis)) for axis in AXES)
            lines.append(f"| {name} | {axes} | {point['value']:.2%} |")
    if savings:
        first = next(iter(runs))
        lines += ["", f"To reach {target:.2%}, and the share of what {first} needs:", ""]
        lines += [f"| run | {' | '.join(AXES)} |", "|---" * (len(AXES) + 1) + "|"]
        for name, own in savings.items():
            cells = " | ".join(_saving(own[axis]) for axis in AXES)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def _saving(found):
    if found["cost"] is None:
        return "not reached"
    share = "" if found["share"] is None else f" ({found['share']:.0%})"
    return _number(found["cost"]) + share


def _number(value):
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.3g}"


def draw(path, title, runs, target=None):
    """The curves over epochs, images, FLOPs and hours, four panels of a PNG; atomic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (axis, label) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for name, points in runs.items():
            known = [point for point in points if axis in point]
            values = [100 * point["value"] for point in known]
            panel.plot([point[axis] for point in known], values, marker=".", label=name)
        if target is not None:
            panel.axhline(100 * target, color="grey", linestyle=":")
        panel.set(xlabel=label, ylabel="%")
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title)
    save_figure(figure, path, dpi=90)
