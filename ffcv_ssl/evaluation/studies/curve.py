"""`curve`: a protocol over the checkpoints of one or several runs, and the compute they need.

A run's folder stands for all its kept copies (`checkpoint.keep_every`). One point is one number of
the protocol for one checkpoint; the curve is a table and a picture over epochs, images, FLOPs and
hours. With several runs the first is the yardstick: where does each of the others first reach the
first run's best value (or `reach`), linearly between its points? These are the savings of the
SuNCEt paper (Assran et al. 2020, 4.1). The best value is the highest on the validation file over
all points of the first run, and `selected_on` in the result says so. Runs that are measured on
different data are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import ClosedUnitInterval

from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import protocol_calls
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.protocol_run import refuse_ranks, stop_if_asked
from ffcv_ssl.evaluation.protocols import PROTOCOLS
from ffcv_ssl.evaluation.results import (
    checkpoint_folder,
    main_metric,
    results_folder,
    writable_folder,
)
from ffcv_ssl.files import save_figure, write_text
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.metrics_log import each_metric, has_accuracies
from ffcv_ssl.training.run_folder import CHECKPOINT
from ffcv_ssl.training.world import World

AXES = ("epoch", "updates", "images", "views", "flops", "hours")
PANELS = {"epoch": "epochs", "images": "images", "flops": "FLOPs", "hours": "hours"}
ONLINE = "online"

Points = list[dict[str, Any]]
"""Dicts with `value`, `checkpoint`, `step`, and the axes that are known."""


@dataclass(frozen=True)
class CurveConfig:
    """Which checkpoints, and what is measured of each."""

    checkpoint: list[str] = field(default_factory=list)
    """Checkpoints, or runs' folders: all kept copies of the run. The first run is the yardstick."""
    out: str | None = None
    """Folder of the table, the picture and the protocol's results; null: the first run's, and for
    results each checkpoint's own."""
    protocol: str = "knn"
    """linear, knn..., or online: what the run itself recorded while it trained."""
    metric: str | None = None
    """A number of the protocol's result by name, as backbone.top1; null: the first top1 or map."""
    reach: ClosedUnitInterval | None = None
    """The value whose cost is compared between runs; null: the best value of the first run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The protocol's settings: --settings.ks [20] --settings.data.train A.beton."""
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        measuring = [name for name, command in PROTOCOLS.items() if command.open_data is not None]
        if self.protocol not in (ONLINE, *measuring):
            expected = ", ".join((ONLINE, *measuring))
            raise UserError(f"protocol: got {self.protocol!r}, expected one of {expected}")


def run(config: CurveConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Measure every checkpoint; returns the points and the savings. Raises UserError."""
    refuse_ranks("curve", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN RUN ... or files")
    calls = calls_of(config)
    protocol_calls.check_paths(config.checkpoint)
    folder = writable_folder(config.out or checkpoint_folder(config.checkpoint[0]))
    if config.protocol == ONLINE:
        data = recorded_data(config.checkpoint)
        refuse_other_data(data, world, "choose another --protocol")
        metric, runs = recorded_points(config.checkpoint, config.metric)
    else:
        calls, data = _opened(config.protocol, calls, world)
        refuse_other_data(data, world, "give one with --settings.data.val or .label_field")
        metric, runs = measured_points(config, calls, world, stop)
    for name, points in runs.items():
        points.sort(key=lambda point: point["step"])
        if len(points) < 2:
            world.say(f"{name}: one checkpoint makes no curve; pretrain with checkpoint.keep_every")
    names = list(runs)
    target, selected_on = None, None
    savings: dict[str, dict] = {}
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


def calls_of(config: CurveConfig) -> list[Any]:
    """The protocol's configuration for each checkpoint; none for `online`. Raises UserError."""
    if config.protocol == ONLINE:
        if config.settings:
            raise UserError("settings: protocol online has none; choose another --protocol")
        return []
    calls: list[Any] = []
    paths = checkpoints_of(config.checkpoint)
    names = run_names(paths)
    for path in paths:
        out = config.out
        if out and PROTOCOLS[config.protocol].resumes:  # each needs a run's folder of its own
            words = [config.protocol, names[checkpoint_folder(path)].strip("/").replace("/", "_")]
            words += [] if Path(path).is_dir() else [Path(path).stem]
            out = str(Path(out) / "_".join(words))
        fixed: dict[str, Any] = {"checkpoint": path, "out": out, "system": config.system}
        calls.append(protocol_calls.protocol_config(config.protocol, config.settings, **fixed))
    return calls


def measured_points(
    config: CurveConfig, calls: Sequence[Any], world: World, stop: StopSignal | None
) -> tuple[str | None, dict[str, Points]]:
    """(metric, {run: points}) of a protocol on every checkpoint; what is on record is not measured
    again."""
    names = run_names([call.checkpoint for call in calls])
    metric = config.metric
    runs: dict[str, Points] = {}
    for call in calls:
        stop_if_asked(stop)
        record = protocol_calls.call_protocol(config.protocol, call, world, stop)
        metric, value = main_metric(record["metrics"], metric)
        name = names[checkpoint_folder(call.checkpoint)]
        runs.setdefault(name, []).append(_point(record["about"], value, call.checkpoint))
    return metric, runs


def recorded_points(
    paths: Iterable[str], metric: str | None
) -> tuple[str | None, dict[str, Points]]:
    """(metric, {run: points}) of what runs recorded while they trained."""
    runs: dict[str, Points] = {}
    for folder, name in run_names(paths).items():
        records = [record for record in each_metric(folder) if has_accuracies(record)]
        if not records:
            raise UserError(f"{folder}: no evaluations in its metrics; choose another --protocol")
        for record in records:
            values = {
                key.removeprefix("val/").replace("/", "."): value
                for key, value in record.items()
                if key.startswith("val/")
            }
            metric, value = main_metric(values, metric)
            runs.setdefault(name, []).append(_point(record, value, str(folder)))
    return metric, runs


def checkpoints_of(paths: Iterable[str]) -> list[str]:
    """Files to measure: a folder becomes its kept copies, or its last checkpoint if it has none."""
    found: list[str] = []
    for path in paths:
        kept = sorted(Path(path).glob("checkpoint_epoch_*.pt")) if Path(path).is_dir() else []
        found += [str(copy) for copy in kept] or [path]
    return list(dict.fromkeys(found))


def run_names(paths: Iterable[str]) -> dict[Path, str]:
    """{folder: a name for it} of the runs that checkpoints belong to: the folder's own name, or its
    path where two folders have the same name."""
    folders = list(dict.fromkeys(checkpoint_folder(path) for path in paths))
    names = [folder.resolve().name for folder in folders]
    return {f: name if names.count(name) == 1 else str(f) for f, name in zip(folders, names)}


def _point(about: dict[str, Any], value: float, checkpoint: str) -> dict[str, Any]:
    """One point: the value, and where it stands on every axis that is known."""
    point = {"checkpoint": checkpoint, "step": about.get("step", 0), "value": value}
    point |= {axis: about[axis] for axis in AXES if axis in about}
    if "seconds" in about:
        point["hours"] = about["seconds"] / 3600
    return point


# ---- What the points are measured on ------------------------------------------------------------


def _opened(
    protocol: str, calls: Sequence[Any], world: World
) -> tuple[list[Any], dict[str, dict | None]]:
    """(the calls, {run: what it is to be measured on}). Raises UserError, before the first call,
    for a checkpoint or a folder of results that cannot be used."""
    checked = protocol_calls.checked(protocol, calls, world)
    names = run_names([call.checkpoint for call in calls])
    for call in calls:
        results_folder(call)
    data = {names[checkpoint_folder(call.checkpoint)]: measured_on for call, measured_on in checked}
    return [call for call, _ in checked], data


def recorded_data(paths: Iterable[str]) -> dict[str, dict | None]:
    """{run: what its online evaluations are measured on, as of `protocol_calls.checked`}, by its
    checkpoint; None where no checkpoint says it. Raises CheckpointError."""
    data: dict[str, dict | None] = {}
    for folder, name in run_names(paths).items():
        files = [folder / CHECKPOINT, *sorted(folder.glob("checkpoint_epoch_*.pt"))]
        file = next((file for file in files if file.is_file()), None)
        state = checkpoint.load(file) if file else {}
        content = (state.get("datasets") or {}).get("val")
        settings = (state.get("config") or {}).get("data", {})
        data[name] = None
        if content:
            named = {key: settings.get(key) for key in ("val", "label_field")}
            data[name] = {**named, "val_content": content}
    return data


def refuse_other_data(data: dict[str, dict | None], world: World, remedy: str) -> None:
    """Raise UserError where runs are measured on other images or labels than the first run. Where
    a run's data are unknown, a line says so. data: {run: as of `protocol_calls.checked`}."""
    known = {name: measured_on for name, measured_on in data.items() if measured_on is not None}
    for name in data if len(data) > 1 else ():
        if name not in known:
            world.say(
                f"{name}: does not name the validation file it was measured on; "
                "assumed to be that of the other runs",
                sys.stderr,
            )
    first = next(iter(known), "")
    for name, measured_on in known.items():
        if any(measured_on[key] != known[first][key] for key in ("val_content", "label_field")):
            raise UserError(
                f"{name}: measured on {_shown(measured_on)}, but {first} on "
                f"{_shown(known[first])}; {remedy}"
            )


def _shown(measured_on: dict[str, Any]) -> str:
    return "{val}, field '{label_field}', {val_content}".format(**measured_on)


# ---- Compute to reach a value --------------------------------------------------------------------


def first_crossing(points: Points, axis: str, target: float) -> float | None:
    """Where on an axis a run first reaches a value, linearly between its points; None: never.

    points: in order. A run whose first point has reached the value needs what that point needs.
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


def compare(
    runs: dict[str, Points], reach: float | None = None
) -> tuple[float, dict[str, dict[str, dict[str, float | None]]]]:
    """(the value to reach, {run: {axis: {cost, share}}}); the first run is the yardstick.

    runs: {name: points in order}. The value is `reach`, or the first run's best. cost: where the
    run first reaches it, None: never; share: of the first run's cost, None if either is None.
    """
    yardstick = next(iter(runs.values()))
    target = max(point["value"] for point in yardstick) if reach is None else reach
    costs = {
        name: {axis: first_crossing(points, axis, target) for axis in AXES}
        for name, points in runs.items()
    }
    first = costs[next(iter(runs))]
    savings = {
        name: {axis: {"cost": c, "share": _ratio(c, first[axis])} for axis, c in by_axis.items()}
        for name, by_axis in costs.items()
    }
    return target, savings


def _ratio(cost: float | None, whole: float | None) -> float | None:
    return cost / whole if cost is not None and whole else None


# ---- Table and picture ---------------------------------------------------------------------------


def render(
    protocol: str,
    metric: str | None,
    runs: dict[str, Points],
    target: float | None = None,
    savings: dict[str, dict] | None = None,
) -> str:
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
        for name, by_axis in savings.items():
            cells = " | ".join(_saving(by_axis[axis]) for axis in AXES)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def _saving(found: dict[str, float | None]) -> str:
    if found["cost"] is None:
        return "not reached"
    share = "" if found["share"] is None else f" ({found['share']:.0%})"
    return _number(found["cost"]) + share


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.3g}"


def draw(path: Path, title: str, runs: dict[str, Points], target: float | None = None) -> None:
    """The curves over epochs, images, FLOPs and hours, four panels of a PNG; atomic."""
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    figure = Figure(figsize=(12, 8), layout="constrained")
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


COMMAND = Command(CurveConfig, run, "a protocol over checkpoints; compute to reach X")
