"""Folders of runs as training leaves them, with made-up numbers: for the monitor's tests."""

import json
import math
import struct
import zlib
from pathlib import Path

import yaml

DEPTHS = ("backbone", "layer1", "layer4", "projector_1", "projector_2")


def counters(step, steps_per_epoch=10, batch=32):
    """What each line of the metrics counts."""
    return {
        "epoch": step / steps_per_epoch, "step": step, "updates": step, "images": step * batch,
        "views": 2 * step * batch, "flops": step * 10**10, "seconds": step / 4,
    }  # fmt: skip


def training_record(step, lift=0.0):
    """A line of training figures."""
    loss = 1 + lift + 4 / math.sqrt(step) + 0.1 * math.sin(step)
    return {
        **counters(step), "resolution": 64 if step < 20 else 96, "lr": 0.3 / (1 + step / 50),
        "train/loss": loss, "train/loss/alignment": loss - 3, "train/loss/uniformity": 3.0,
        "train/backbone/top1": 1 - 0.9 / math.sqrt(step), "train/images_per_s": 900.5 + step % 7,
        "train/data_wait": 0.01 + step % 3 / 100, "train/copy_wait": 0.002,
        "train/peak_memory_mib": 1500 + step,
    }  # fmt: skip


def evaluation_record(step, lift=0.0):
    """A line of an evaluation, with the health of the representation."""
    record = counters(step)
    for number, depth in enumerate(DEPTHS):
        top1 = 0.9 - 0.05 * number + lift / 10 - 0.5 / (1 + step / 10)
        record |= {f"val/{depth}/top1": top1, f"val/{depth}/top5": (1 + top1) / 2}
    record |= {"val/knn/top1": 0.8 - 0.5 / (1 + step / 10), "val/knn/top5": 0.95}
    for depth in ("backbone", "projector_2"):
        record |= {
            f"health/{depth}/std": 0.05 + step / 10_000,
            f"health/{depth}/effective_rank": 20 + step / 10,
            f"health/{depth}/rankme": 24 + step / 9,
        }  # fmt: skip
    return record | {"health/alignment": 0.4 - step / 1000, "health/uniformity": -2 - step / 500}


def records_of(num_steps, every=10, lift=0.0):
    """The records of a run: training at each step, an evaluation at every `every`th."""
    for step in range(num_steps + 1):
        if step:
            yield training_record(step, lift)
        if step % every == 0:
            yield evaluation_record(step, lift)


def write_records(folder, records, mode="w"):
    """Write records, or texts as they are, to a run's metrics."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", mode) as file:
        for record in records:
            file.write(record if isinstance(record, str) else json.dumps(record) + "\n")
    return folder


def write_config(folder, **settings):
    """Write a run's settings, with some of their own."""
    config = {"out": str(folder), "epochs": 4, "method": "simclr", "optim": {"lr": 0.3}, "seed": 0}
    (Path(folder) / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))


def write_metric_run(folder, num_steps=40, lift=0.0, is_finished=True, **settings):
    """A run's folder with metrics and settings; returns it."""
    write_records(folder, records_of(num_steps, lift=lift))
    write_config(folder, **settings)
    if is_finished:
        (Path(folder) / "backbone.safetensors").write_bytes(b"")
    return Path(folder)


def write_views(folder, step=40, color=(200, 60, 60)):
    """Current views: a picture of one color, 40 by 20 pixels, and what was drawn for it."""
    rows = b"".join(b"\0" + bytes(color) * 40 for _ in range(20))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 40, 20, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]  # fmt: skip
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    drawn = {"RandomResizedCrop": {"crop": [3, 4, 50, 60]}, "GaussianBlur": {"sigma": 1.25}}
    samples = [{"index": 7, "views": {"view_0": drawn, "view_1": {"flip": True}}}]
    about = {"step": step, "epoch": step / 10, "resolution": 96, "samples": samples}
    (Path(folder) / "views.png").write_bytes(data)
    (Path(folder) / "views.json").write_text(json.dumps(about))
