"""The main job on generated images, with a table of what was learnt: a few minutes on two cores.

    python demo.py [--out runs/demo]

Draws shapes of ten classes that only their outlines tell apart, pretrains a ResNet-18 on them with
SimCLR (`configs/demo.yaml`), without labels, and then compares the trained encoder with the run's
own weights at step 0: the same probe data, optimiser, steps and evaluation for both. The folder is
made anew each time. The last line on stdout is JSON; exit code 1 if the gain is below 15 points.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from ffcv_ssl import OrderOption
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.errors import UserError
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import EXIT_USER_ERROR
from ffcv_ssl.training.probes import hits, knn_scores
from ffcv_ssl.training.report import REPORT_FILE
from ffcv_ssl.training.run_data import make_loader, open_dataset
from ffcv_ssl.training.world import World

ROOT = Path(__file__).resolve().parent
NUM_TRAIN, NUM_VAL, SIZE_PX = 5000, 1000, 64
NUM_PROBE = 4000  # training images that the offline probes learn from
PROBE_STEPS, PROBE_PENALTY = 60, 1e-3
LEAST_GAIN_POINTS = 15
TRAIN_FILE, VAL_FILE = "train.beton", "val.beton"


def clear_folder(out):
    """Make the demo's folder anew. Raises UserError for a folder that is not a demo's."""
    if out.exists():
        if any(out.iterdir()) and not (out / TRAIN_FILE).exists():
            raise UserError(f"{out}: holds files that are not the demo's; use another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)


def native_precision():
    """bf16 where the processor computes in it, 1.7x faster there; elsewhere it is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def run_step(title, *command):
    """Run one of the project's commands, showing its lines; returns its JSON summary."""
    print(f"\n-- {title}\n   python {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    summary = {}
    for line in process.stdout:
        if line.startswith("{"):
            summary = json.loads(line)
        else:
            print("   " + line, end="", flush=True)
    if process.wait() != 0:
        raise UserError(f"demo: {command[0]} ended with exit code {process.returncode}")
    return summary


def write_shapes(out, split, num_samples):
    """Write one split of the generated images."""
    options = [f"--split={split}", f"--num_samples={num_samples}", f"--size_px={SIZE_PX}"]
    path = out / f"{split}.beton"
    command = ["write_dataset.py", "--source=shapes", *options, "--mode=raw", f"--out={path}"]
    run_step(f"{num_samples} images: {split}", *command)


@torch.no_grad()
def encode(model, dataset, config, world, indices=None):
    """Clean centre crops through the model: ({depth or "pixels": (N, D) float32}, labels (N,))."""
    parts, labels = [], []
    options = {"batch_size": config.evaluation.batch_size, "seed": config.seed, "drop_last": False}
    loader = make_loader(
        dataset, config.data, train.clean_view(config), world, config.channels_last,
        indices=indices, order=OrderOption.SEQUENTIAL, **options,
    )  # fmt: skip
    with loader:
        for batch in loader:
            valid = torch.as_tensor(batch.valid)
            features = {**model.encode(batch.view_0), "pixels": batch.view_0.flatten(1)}
            parts.append({name: x[valid].float() for name, x in features.items()})
            labels.append(batch.label.view(-1)[valid])
    names = parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in names}, torch.cat(labels)


def linear_probe(features, labels, val_features, val_labels, num_classes):
    """Accuracy in % of softmax regression on standardised features: L-BFGS on all of the data."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, val_features = (features - mean) / std, (val_features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + PROBE_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return accuracy(val_features @ weight.T + bias, val_labels)


def knn(features, labels, val_features, val_labels, num_classes):
    """Accuracy in % of k-NN (k 20, t 0.1) on unit features."""
    bank, queries = F.normalize(features, dim=1), F.normalize(val_features, dim=1)
    return accuracy(knn_scores(queries, bank, labels, num_classes, 20, 0.1), val_labels)


def accuracy(scores, labels):
    """Top-1 in %."""
    return 100 * int(hits(scores, labels, 1)) / len(labels)


def measure(checkpoint_path, config, train_set, val_set):
    """All rows of the table for the encoder of a checkpoint: {row: accuracy in %}."""
    model = train.Model(config.model)
    model.load_state_dict(checkpoint.load(checkpoint_path)["model"])
    model.eval()
    world, indices = World(), np.arange(min(NUM_PROBE, train_set.num_samples))
    features, labels = encode(model, train_set, config, world, indices)
    val_features, val_labels = encode(model, val_set, config, world)
    classes = train_set.num_classes
    rows = {
        f"linear probe, {name}": linear_probe(
            features[name], labels, val_features[name], val_labels, classes
        )
        for name in model.widths
    }
    for name, what in (("backbone", "k-NN, backbone"), ("pixels", "k-NN, pixels")):
        rows[what] = knn(features[name], labels, val_features[name], val_labels, classes)
    return rows


def show_table(start, trained, chance):
    """The comparison, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy on new images, %")
    table.add_column("")
    for title in ("step 0", "trained", "gain"):
        table.add_column(title, justify="right")
    for row in start:
        if row == "k-NN, pixels":
            table.add_row(row, f"{start[row]:.1f}", "", "")
        else:
            gain = trained[row] - start[row]
            table.add_row(row, f"{start[row]:.1f}", f"{trained[row]:.1f}", f"{gain:+.1f}")
    table.add_row("chance", f"{chance:.1f}", "", "")
    Console().print(table)


def run(out):
    """The demo: returns (exit code, summary)."""
    started = time.perf_counter()
    clear_folder(out)
    write_shapes(out, "train", NUM_TRAIN)
    write_shapes(out, "val", NUM_VAL)
    given = [f"--data.train={out / TRAIN_FILE}", f"--data.val={out / VAL_FILE}", f"--out={out}"]
    given.append(f"--precision={native_precision()}")
    run_step("SimCLR", "train.py", "--config=configs/demo.yaml", *given)
    config = train.read_config([f"--config={out / 'config.yaml'}"])
    torch.set_num_threads(config.system.torch_threads or torch.get_num_threads())
    train_set, val_set = (open_dataset(out / name) for name in (TRAIN_FILE, VAL_FILE))
    ends = [out / f"checkpoint_epoch_{epoch:04d}.pt" for epoch in (0, config.epochs)]
    print("\n-- probes on the frozen encoder, at step 0 and trained", flush=True)
    start, trained = (measure(path, config, train_set, val_set) for path in ends)
    chance = 100 / train_set.num_classes
    show_table(start, trained, chance)
    print(f"picture of the run: {out / REPORT_FILE}")
    probe = "linear probe, backbone"
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "gain_points": round(trained[probe] - start[probe], 2),
        "step_0": start,
        "trained": {row: trained[row] for row in trained if row != "k-NN, pixels"},
        "chance": chance,
        "report": str(out / REPORT_FILE),
    }
    return int(summary["gain_points"] < LEAST_GAIN_POINTS), summary


def main(argv=None):
    """Run the demo and return its exit code; the last line on stdout is the summary as JSON."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder to make anew")
    out = (ROOT / parser.parse_args(argv).out).resolve()
    try:
        code, summary = run(out)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_USER_ERROR
    if code:
        got = f"{summary['gain_points']} points"
        print(f"demo: the probe gained {got}, expected {LEAST_GAIN_POINTS}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
