"""`suite`: probes on several datasets and label fields, in one table and one bar chart.

    python evaluate.py suite --checkpoint runs/a runs/b --suite configs/suites/shapes.yaml

A suite is a YAML list of datasets, each with a `name`, `train` and `val`, and any other key of
`data`: label_field, resolution_px... Every dataset of the list is opened before the first probe is
trained, and a result that is on record with the same settings is not measured again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ffcv_ssl.config.app_files import find_config
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import as_words
from ffcv_ssl.config.settings import SystemConfig
from ffcv_ssl.config.yaml_layers import read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import protocol_calls
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.datasets import open_datasets
from ffcv_ssl.evaluation.protocol_run import refuse_ranks, stop_if_asked
from ffcv_ssl.evaluation.protocol_settings import Architecture, EvalData, EvalLabels
from ffcv_ssl.evaluation.results import (
    accuracies,
    checkpoint_folder,
    results_folder,
    writable_folder,
)
from ffcv_ssl.files import save_figure, write_text
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World

Column = tuple[str, str, str]
"""(checkpoint, protocol, depth)."""
Columns = dict[str, dict[str, float]]
"""{heading: {dataset: top-1}}."""


@dataclass(frozen=True)
class SuiteConfig:
    """Which checkpoints, on which datasets."""

    checkpoint: list[str] = field(default_factory=list)
    """Folders of runs, checkpoints or files of weights."""
    suite: str = ""
    """YAML list of datasets."""
    out: str | None = None
    """Folder of the table, the chart and the probes' results; null: the first checkpoint's folder,
    and for results each checkpoint's."""
    protocols: list[Literal["linear", "mlp", "knn", "snn"]] = field(
        default_factory=lambda: ["linear", "mlp"]
    )
    """What is measured on each."""
    linear: dict[str, Any] = field(default_factory=dict)
    """Settings of the linear probe: --linear.epochs 50."""
    mlp: dict[str, Any] = field(default_factory=dict)
    """Settings of the MLP probe."""
    knn: dict[str, Any] = field(default_factory=dict)
    """Settings of k-NN."""
    snn: dict[str, Any] = field(default_factory=dict)
    """Settings of non-parametric inference (NPI)."""
    model: Architecture = field(default_factory=Architecture)
    data: EvalData = field(default_factory=EvalData)
    labels: EvalLabels = field(default_factory=EvalLabels)
    system: SystemConfig = field(default_factory=SystemConfig)


@dataclass(frozen=True)
class Entry:
    """One dataset of a suite: its settings win over the command's own `data`."""

    data: EvalData = field(default_factory=EvalData)


def run(config: SuiteConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Measure every checkpoint on every dataset; returns the table. Raises UserError."""
    refuse_ranks("suite", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE ...")
    if not config.protocols:
        raise UserError("protocols: got an empty list, expected linear, mlp, knn or snn")
    datasets = read_suite(config.suite, config.data)
    calls = _checked(_calls(config, datasets))
    folder = writable_folder(config.out or checkpoint_folder(config.checkpoint[0]))
    for _, _, call in calls:
        results_folder(call)  # made, or refused, before the first probe is trained
    cells: dict[Column, dict[str, float]] = {}
    names: dict[str, str] = {}
    for dataset, protocol, call in calls:
        stop_if_asked(stop)
        world.say(f"{dataset}: {protocol} of {call.checkpoint}")
        record = protocol_calls.call_protocol(protocol, call, world, stop)
        names[call.checkpoint] = record["name"]
        for metric, value in accuracies(record["metrics"]).items():
            column = (call.checkpoint, protocol, metric.removesuffix(".top1"))
            cells.setdefault(column, {})[dataset] = value
    columns = {label: cells[column] for column, label in labels_of(list(cells), names).items()}
    table, chart = write(folder, Path(config.suite).stem, columns, list(datasets))
    world.say(render(columns, list(datasets)))
    return {
        "protocol": "suite", "suite": config.suite, "top1": columns, "table": str(table),
        "chart": str(chart),
    }  # fmt: skip


def read_suite(path: str, data: EvalData) -> dict[str, EvalData]:
    """{name: EvalData} of a suite's file, in its order; what an entry leaves open is as in `data`.

    Raises UserError for what is not a list of datasets.
    """
    if not path:
        raise UserError("suite: got none, expected --suite configs/suites/NAME.yaml")
    try:
        entries = read_yaml(find_config(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of {{name, train, val, ...}}")
    datasets: dict[str, EvalData] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not {"name", "train", "val"} <= set(entry):
            raise UserError(f"{where}: got {entry!r}, expected a mapping with name, train and val")
        name = str(entry["name"])
        if name in datasets:
            raise UserError(f"{where}: the name {name!r} occurs twice; choose another name")
        settings = {key: value for key, value in entry.items() if key != "name"}
        datasets[name] = _data(settings, data, where)
    return datasets


def _data(entry: dict[str, Any], data: EvalData, where: str) -> EvalData:
    """The command's settings with an entry's over them. Fields that neither names are `image` and
    `label`: the pretraining run's names belong to another file."""
    settings = {"image_field": "image", "label_field": "label"}
    settings |= {key: value for key, value in vars(data).items() if value is not None} | entry
    words = as_words({"data": settings})
    try:
        return parse_config(Entry, words, "suite", "")[0].data
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('data.')}") from None


Call = tuple[str, str, Any]
"""(dataset, protocol, the protocol's configuration)."""


def _calls(config: SuiteConfig, datasets: dict[str, EvalData]) -> list[Call]:
    """One call for each checkpoint, dataset and protocol, in this order."""
    same: dict[str, Any] = {"model": config.model, "labels": config.labels}
    same |= {"system": config.system, "out": config.out}
    calls: list[Call] = []
    for checkpoint in config.checkpoint:
        for name, data in datasets.items():
            for protocol in config.protocols:
                settings = getattr(config, protocol)
                fixed = {"checkpoint": checkpoint, "data": data, **same}
                call = protocol_calls.protocol_config(protocol, settings, protocol, **fixed)
                calls.append((name, protocol, call))
    return calls


def _checked(calls: Sequence[Call]) -> list[Call]:
    """The calls, with `model` only for checkpoints that need it. Raises UserError for a checkpoint,
    a dataset or a depth that is not there."""
    checked, configs = [], protocol_calls.opened([call for *_, call in calls])
    for (dataset, protocol, _), (call, encoder) in zip(calls, configs):
        encoder.check_depths(call.depths)
        try:
            open_datasets(call.data, call.labels, encoder)
        except UserError as error:
            raise UserError(f"{dataset}: {error}") from None
        checked.append((dataset, protocol, call))
    return checked


def labels_of(columns: Sequence[Column], names: dict[str, str]) -> dict[Column, str]:
    """{column: its heading}: the parts that differ between columns, and always the protocol. A
    checkpoint has its name in `names`, or its path where two checkpoints have the same name."""
    varies = [len({column[part] for column in columns}) > 1 for part in range(3)]
    varies[1] = True
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    labels = {}
    for column in columns:
        name = names[column[0]]
        parts = (column[0] if name in shared else name, *column[1:])
        labels[column] = ", ".join(part for part, shown in zip(parts, varies) if shown)
    return labels


def render(columns: Columns, datasets: Sequence[str]) -> str:
    """The table as Markdown: one row per dataset, one column per probe, and their means."""
    lines = [f"| top-1, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for dataset in datasets:
        values = [f"{100 * column[dataset]:.2f}" for column in columns.values()]
        lines.append(f"| {dataset} | {' | '.join(values)} |")
    if len(datasets) > 1:
        means = [sum(column.values()) / len(datasets) for column in columns.values()]
        lines.append(f"| mean | {' | '.join(f'{100 * mean:.2f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, stem: str, columns: Columns, datasets: Sequence[str]) -> tuple[Path, Path]:
    """Write table and chart; returns their paths. Raises UserError."""
    table, chart = folder / f"suite_{stem}.md", folder / f"suite_{stem}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(table, render(columns, datasets))
        draw(chart, columns, datasets)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)}); use --out") from None
    return table, chart


def draw(path: Path, columns: Columns, datasets: Sequence[str]) -> None:
    """A group of bars for each dataset, one bar per column; atomic."""
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the process

    inches = max(2 + 1.6 * len(datasets), 1.5 + 0.09 * max(map(len, columns)))  # for the legend
    figure = Figure(figsize=(inches, 4.5), layout="constrained")
    panel, width = figure.subplots(), 0.8 / len(columns)
    for place, (label, values) in enumerate(columns.items()):
        left = [group - 0.4 + (place + 0.5) * width for group in range(len(datasets))]
        bars = panel.bar(left, [100 * values[name] for name in datasets], width, label=label)
        panel.bar_label(bars, fmt="%.1f", fontsize=7)
    panel.set_xticks(range(len(datasets)), datasets)
    panel.set(ylabel="top-1, %")
    panel.grid(axis="y", alpha=0.3)
    panel.legend()
    save_figure(figure, path, dpi=90)


COMMAND = Command(SuiteConfig, run, "probes on several datasets: a table and a chart")
