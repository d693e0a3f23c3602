"""The tables of docs/scaling.md, from benchmarks/results/: what was measured, and what follows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import train
from benchmarks.step_record import IMAGENET_IMAGES
from ffcv_ssl.training.optimizers import resolution_at

# ResNet-50 v1.5 in mixed precision at 224 px, images/s of one view: NVIDIA's own training program
# (DeepLearningExamples, PyTorch, container 21.03, A100 80 GB).
A100_VIEWS_PER_S, A100_OF_EIGHT = 2470, 16621 / (8 * 2470)
RAMP = "configs/imagenet/simclr_8gpu.yaml"
BATCHES = (128, 256, 512, 1024)


def tables(results: Path) -> dict[str, str]:
    """{name of its markers: table}."""
    scaling = json.loads((results / "scaling.json").read_text())
    loader = json.loads((results / "loader.json").read_text())
    found = {
        "loader": loader_table(scaling, loader), "memory": memory_table(scaling),
        "hours": hours_table(scaling, loader),
    }  # fmt: skip
    return {**found, "gpu": gpu_tables(results)}


def rate_at(px: int) -> float:
    """images/s of two views on an A100, in proportion to their pixels: reckoned."""
    return A100_VIEWS_PER_S / 2 * (224 / px) ** 2


def quiet_ms(loader: dict[str, Any]) -> float:
    """Milliseconds of a core per image of two views at 224 px, from the table in README.md."""
    row = loader["results"]["ffcv-ssl"]["+ jitter"]
    return 1e3 * loader["machine"]["threads"] / row["images_per_s"]


def loader_table(scaling: dict[str, Any], loader: dict[str, Any]) -> str:
    """Cores that an A100 needs, by resolution."""
    costs, quiet = scaling["loader_cpu_ms"], quiet_ms(loader)
    lines = [
        "| two views at | CPU time per image | images/s of an A100 (reckoned) | "
        "cores it needs here | on the README's machine |",
        "|---|---|---|---|---|",
    ]
    for px, cost in costs["simclr"].items():
        rate = rate_at(int(px))
        there = quiet * cost / costs["simclr"]["224"]
        lines.append(
            f"| {px} px | {cost:.2f} ms | {rate:,.0f} | {rate * cost / 1e3:.1f} | "
            f"{rate * there / 1e3:.1f} |"
        )
    lines += [
        "",
        f"One thread of {scaling['machine']['cpu']}, whose bare decode takes "
        f"{costs['decode']['whole']:.2f} ms; photographs of at most 500 px, SimCLR's views, "
        f"{scaling['date']}.",
    ]
    return "\n".join(lines)


def memory_table(scaling: dict[str, Any]) -> str:
    """GiB of a step, by batch and resolution: reckoned from bytes that were counted."""
    lines = []
    for model, kept in scaling["kept_mib_per_image"].items():
        sides = [px for px in kept if px != "weights_mib"]
        lines += [
            f"| {model}: images per GPU | " + " | ".join(f"{px} px" for px in sides) + " |",
            "|---|" + "---|" * len(sides),
        ]
        for batch in BATCHES:
            cells = [f"{(batch * kept[px] + 3 * kept['weights_mib']) / 1024:.1f}" for px in sides]
            lines.append(f"| {batch} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines[:-1])


def hours_table(scaling: dict[str, Any], loader: dict[str, Any]) -> str:
    """ImageNet's 100 epochs on eight A100, by resolution: reckoned."""
    config = train.read_config([f"--config={RAMP}"])
    epochs = Counter(resolution_at(e, config.resolution) for e in range(config.epochs))
    costs = scaling["loader_cpu_ms"]["simclr"]
    lines = [
        "| resolution | epochs | images/s of eight A100 | hours | cores on the README's machine |",
        "|---|---|---|---|---|",
    ]
    total = 0.0
    for px, number in sorted(epochs.items()):
        rate = 8 * A100_OF_EIGHT * rate_at(px)
        hours = number * IMAGENET_IMAGES / rate / 3600
        total += hours
        cores = rate * quiet_ms(loader) * costs[str(px)] / costs["224"] / 1e3
        lines.append(f"| {px} px | {number} | {rate:,.0f} | {hours:.2f} | {cores:.0f} |")
    lines.append(f"| all | {sum(epochs.values())} |  | {total:.1f} |  |")
    return "\n".join(lines)


def gpu_tables(results: Path) -> str:
    """What `make gpu` has measured, or that it has not been run on a GPU."""
    records = {
        name: json.loads((results / f"{name}.json").read_text())
        for name in ("gpu_right", "gpu_fast", "gpu_learns")
        if (results / f"{name}.json").exists()
    }
    if not records:
        return "Not measured yet: `make gpu` has not run on a GPU."
    lines = []
    for name, record in records.items():
        wrong = [check for check, found in record["checks"].items() if found["right"] is False]
        left = [check for check, found in record["checks"].items() if found["right"] is None]
        end = f"; wrong: {', '.join(wrong)}" if wrong else ", none wrong"
        end += f"; left out: {', '.join(left)}" if left else ""
        where = f"{record['machine']['gpu']}, torch {record['machine']['torch']}, {record['date']}"
        lines.append(f"- `{name}`: {len(record['checks'])} checks{end} ({where}).")
    if "steps" in records.get("gpu_fast", {}):
        lines += ["", *_step_lines(records["gpu_fast"])]
    if "curve" in records.get("gpu_learns", {}):
        lines += ["", "| minutes | epoch | k-NN | linear probe |", "|---|---|---|---|"]
        for at in records["gpu_learns"]["curve"]:
            lines.append(
                f"| {at['minutes']:.1f} | {at['epoch']:.0f} | {at['knn']:.1%} | {at['probe']:.1%} |"
            )
    return "\n".join(lines)


def _step_lines(record: dict[str, Any]) -> list[str]:
    lines = [
        "| | images/s | of tensors on the device | extras | of matrix products | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in record["steps"].items():
        lines.append(
            f"| {name} px | {entry['loop_images_per_s']:,.0f} | {entry['of_synthetic']:.1%} | "
            f"{format(entry['extras'], '.1%') if 'extras' in entry else ''} | "
            f"{entry['of_matrix_products']:.0%} | "
            f"{entry['peak_memory_mib']:,} |"
        )
    for px, rates in record["loader"].items():
        said = ", ".join(f"{threads}: {rate:,}" for threads, rate in rates.items())
        lines += ["", f"Loader at {px} px, images/s by threads: {said}."]
    if "imagenet" in record:
        lines += ["", f"ImageNet, 100 epochs: {record['imagenet']['hours']} hours, reckoned."]
    return lines
