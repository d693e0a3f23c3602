"""The record of benchmarks/train_step.py, and its tables."""

import json
import os
import platform
import statistics
from importlib import metadata

import torch
from rich.table import Table

from benchmarks.record import cpu_name
from benchmarks.step_case import CLIPPING, OPTIMIZER, WHOLE
from ffcv_ssl.errors import UserError

IMAGENET_IMAGES = 1281167
PAPER = {"hours": 35, "device": "one A100", "source": "FFCV-SSL (Bordes et al. 2023)"}


def summarize(values):
    """{"median", "spread": half of the range over the median} of numbers."""
    values = list(values)
    median = statistics.median(values)
    spread = (max(values) - min(values)) / 2 / abs(median) if median else 0.0
    return {"median": float(f"{median:.4g}"), "spread": round(spread, 3)}


def describe(case, found, loops):
    """The measured numbers, with runs in the order of measurement; times are ms per step.

    found: lists of results by name as `train_step.cases_of` has them; loops: StepCase by side.
    """
    size = case.config.unlabelled_batch_size
    operations = size * case.trainer.flops_by_px[case.px][0]
    bare, step, plain = found["bare"], found["step"], found["step without extras"]
    lars, sgd = ([parts[OPTIMIZER] for parts in found[name]] for name in ("lars", "sgd"))
    return {
        "views": len(case.trainer.views),
        "optimizer": case.config.optim.name,
        "bare_ms": _ms(bare),
        "bare_images_per_s": summarize(size / s for s in bare),
        "step_ms": _ms(step),
        "step_images_per_s": summarize(size / s for s in step),
        "step_tflops_per_s": summarize(operations / s / 1e12 for s in step),
        "share_of_bare": summarize(b / s for b, s in zip(bare, step)),
        "parts_ms": {n: _ms(parts[n] for parts in found["parts"]) for n in found["parts"][0]},
        "log_line_ms": _ms(found["log line"]),
        "log_every_steps": case.config.log.every_steps,
        "extras_by_difference_ms": _ms(s - p for s, p in zip(step, plain)),
        "lars_ms": _ms(lars),
        "sgd_ms": _ms(sgd),
        "lars_against_sgd_ms": _ms(a - b for a, b in zip(lars, sgd)),
        "clipping_ms": _ms(parts[CLIPPING] for parts in found["lars"]),
        "share_of_synthetic": summarize(
            run["images_per_s"] * s / size for run, s in zip(found["loop", case.px], step)
        ),
        "loop": {
            str(px): {n: summarize(run[n] for run in found["loop", px]) for n in _LOOP}
            for px in loops
        },
    }


_LOOP = ("images_per_s", "data_wait")


def _ms(seconds):
    return summarize(1e3 * value for value in seconds)


def hours_of(loop, epochs):
    """Computed hours on ImageNet. epochs: {side in pixels: epochs}; loop: the measured rates by
    side (as text). None without epochs."""
    if not epochs:
        return None
    rates = {px: loop[str(px)]["images_per_s"]["median"] for px in epochs}
    seconds = sum(number * IMAGENET_IMAGES / rates[px] for px, number in epochs.items())
    return {
        "hours": round(seconds / 3600, 2),
        "epochs_by_px": epochs,
        "measured_images_per_s_by_px": rates,
        "images_an_epoch": IMAGENET_IMAGES,
    }


def machine(world):
    """The machine of the measurement."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    packages = ("numba", "numpy", "simplejpeg", "torch", "torchvision")
    return {
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def read_earlier(path):
    """The record in a file, {} without a file. Raises UserError where the file holds no record."""
    if path is None or not os.path.exists(path):
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"--results: {path}: no such folder")
        return {}
    try:
        with open(path) as file:
            record = json.load(file)
        return record if record["methods"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--results: {path}: not a record of this benchmark") from None


def with_earlier(record, earlier):
    """The record, with further methods of an earlier record if machine, settings and images are the
    same."""
    if any(earlier.get(key) != record[key] for key in ("machine", "settings", "images")):
        return record
    return {**record, "methods": {**earlier["methods"], **record["methods"]}}


def step_table(method, entry):
    """A method's rows: milliseconds, spread, and the ratio to the bare pass."""
    table = Table(title=f"{method} ({entry['config']})", title_justify="left")
    table.add_column("a step")
    for name in ("ms", "spread", "of bare"):
        table.add_column(name, justify="right")
    rows = {"bare forward and backward": entry["bare_ms"], "whole step": entry["step_ms"]}
    for name, numbers in entry["parts_ms"].items():
        title = f"{name} ({entry['optimizer']})" if name == OPTIMIZER else name
        rows["timed in parts" if name == WHOLE else f"  {title}"] = numbers
    line, every = entry["log_line_ms"], entry["log_every_steps"]
    rows[f"a log line, each of {every} steps"] = {**line, "median": line["median"] / every}
    rows["extras off and SGD, by difference"] = entry["extras_by_difference_ms"]
    rows["LARS"], rows["LARS against SGD"] = entry["lars_ms"], entry["lars_against_sgd_ms"]
    rows["gradient clipping"] = entry["clipping_ms"]
    for name, numbers in rows.items():
        share = numbers["median"] / entry["bare_ms"]["median"]
        table.add_row(name, f"{numbers['median']:.3f}", f"{numbers['spread']:.0%}", f"{share:.2%}")
    return table


def summary_table(record):
    """A table with one row per method."""
    settings = record["settings"]
    paper = f"{PAPER['source']}: {PAPER['hours']} on {PAPER['device']}"
    table = Table(title=f"images/s at {settings['px']} px, batch {settings['batch']}")
    names = ["noise", "of bare", "loader", "of noise", "data wait", "peak MiB"]
    if settings["ramp"]:
        names.append("hours")
        table.caption = f"hours: of ImageNet, by arithmetic from measured rates; {paper}"
    table.add_column("method")
    for name in names:
        table.add_column(name, justify="right")
    for method, entry in record["methods"].items():
        loop, hours = entry["loop"][str(settings["px"])], entry["imagenet"]
        table.add_row(
            method,
            f"{entry['step_images_per_s']['median']:,.0f}",
            f"{entry['share_of_bare']['median']:.1%}",
            f"{loop['images_per_s']['median']:,.0f}",
            f"{entry['share_of_synthetic']['median']:.1%}",
            f"{loop['data_wait']['median']:.1%}",
            f"{entry['peak_memory_mib']:,}",
            *([f"{hours['hours']:.1f}"] if hours else []),
        )
    return table
