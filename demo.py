"""The main job on generated images, with a table of what was learnt: minutes on two cores.

    python demo.py [--out runs/demo]

Draws shapes of ten classes that only their outlines tell apart. Pretrains a ResNet-18 on them with
SimCLR (`configs/demo.yaml`), without labels. Then compares the trained encoder with the same
encoder at step 0: probe data, optimiser, steps and evaluation are the same for both.

A few training steps are timed first. They decide how much is trained (`PLANS`), in which precision
and with how many threads, so that all is done within four minutes on two free cores. Two lines say
what was chosen and why; the losses are a function of that choice. The folder is made anew each
time. The last line on stdout is JSON; exit code 1 if the gain is below 15 points.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import train
from ffcv_ssl.config.messages import one_line
from ffcv_ssl.config.parsers import OneLineParser
from ffcv_ssl.config.stdout import has_told, say
from ffcv_ssl.cores import usable_cores
from ffcv_ssl.errors import UserError
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.training import checkpoint
from ffcv_ssl.training.command import EXIT_USER_ERROR
from ffcv_ssl.training.machine import has_bf16, idle_cores, thread_counts
from ffcv_ssl.training.models import Model
from ffcv_ssl.training.optimizers import make_optimizer
from ffcv_ssl.training.probes import knn_scores, topk_correct
from ffcv_ssl.training.report import REPORT_FILE
from ffcv_ssl.training.run_data import RunData, make_loader, open_dataset
from ffcv_ssl.training.world import World

ROOT = Path(__file__).resolve().parent
NUM_TRAIN, NUM_VAL, SIZE_PX = 5000, 1000, 64
NUM_PROBE = 2500  # training images that the offline probes learn from
PROBE_STEPS, PROBE_PENALTY = 60, 1e-3
LEAST_GAIN_POINTS = 15
TRAIN_FILE, VAL_FILE = "train.beton", "val.beton"
CLEAN_PX = 48  # side of the centre crops that are evaluated


def clear_folder(out: Path) -> None:
    """Make the demo's folder anew. Raises UserError for what is not a demo's folder."""
    try:
        if out.exists():
            if any(out.iterdir()) and not (out / TRAIN_FILE).exists():
                raise UserError(f"{out}: holds files that are not the demo's; use another --out")
            shutil.rmtree(out)
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); use another --out") from None


# ---- What this machine can do, and what it gets to do --------------------------------------------


def batch_size_at(px: int) -> int:
    """Images per step. Small plans take half as many and so make twice the steps: 3 epochs at 32 px
    gain 20.0 points with 32 images per step, 14.5 with 64."""
    return 64 if px >= CLEAN_PX else 32


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured; what is not said here is in `configs/demo.yaml`."""

    px: int
    """Side of the training views."""
    epochs: int
    """Passes over the training images."""
    evaluations: int
    """Evaluations by the training run itself, at step 0 and later."""
    knn_bank: int
    """Images that each of them searches."""

    def seconds(self, rate: float, clean_rate: float) -> float:
        """What the plan takes at so many images per second, at `px` and at CLEAN_PX. A view that is
        only encoded takes a sixth of an image: two views, and a backward pass of twice a forward
        pass."""
        encoded = self.evaluations * (self.knn_bank + NUM_VAL) + 2 * (NUM_PROBE + NUM_VAL)
        return self.epochs * NUM_TRAIN / rate + encoded / 6 / clean_rate

    def arguments(self) -> list[str]:
        """The plan as arguments of train.py."""
        return [
            f"--epochs={self.epochs}", f"--data.batch_size={batch_size_at(self.px)}",
            f"--resolution.min={self.px}", f"--resolution.max={self.px}",
            f"--evaluation.resolution={CLEAN_PX}",
            f"--evaluation.every_epochs={-(-self.epochs // (self.evaluations - 1))}",
            f"--evaluation.knn_bank={self.knn_bank}", f"--checkpoint.keep_every={self.epochs}",
        ]  # fmt: skip


# The first plan that a machine does in time is taken. Gains of the backbone's probe: docs/log.md.
# What small views teach shows on larger clean crops: a random crop enlarges what it shows, so its
# objects are about as large as in a centre crop of 48 px.
PLANS = (
    Plan(48, 4, 5, 2000), Plan(48, 3, 2, 500),
    Plan(32, 3, 2, 500), Plan(32, 2, 2, 500), Plan(28, 2, 2, 500),
)  # fmt: skip
TARGET_S = 225  # for all of it; the demo promises 240
OTHER_S = 35  # imports and L-BFGS, and what else is neither training nor encoding
QUICK_PX = 32  # side of the views that are timed first
CLEAN_SPEED = 0.43  # of clean images, relative to views of QUICK_PX (measured in fp32)
REAL_SHARE = 0.85  # of the speed of bare steps: a run also loads images and trains probes


@dataclass(frozen=True)
class Choice:
    """What this machine gets to do, and what was measured to find it."""

    plan: Plan
    precision: str
    threads: int
    images_per_s: float
    """At the plan's size of views, or at QUICK_PX for smaller ones."""
    seconds: float
    """What the plan should take from now on."""

    def arguments(self) -> list[str]:
        """The choice as arguments of train.py."""
        return [
            f"--precision={self.precision}",
            f"--system.torch_threads={self.threads}",
            f"--channels_last={is_channels_last(self.precision)}".lower(),
            *self.plan.arguments(),
        ]


def is_channels_last(precision: str) -> bool:
    """fp32 convolutions of small views are faster in torch's default format: 2.2 s of CPU time
    against 2.4 s and 2.4 against 3.2 per step of 64 images of 48 px, two runs."""
    return precision == "bf16"


def images_per_second(px: int, threads: int, precision: str, seconds: float = 1.0) -> float:
    """Images per second of a run, from real training steps of the demo's model on random pixels."""
    config = train.read_config([f"--config={ROOT}/configs/demo.yaml"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layout = torch.channels_last if is_channels_last(precision) else torch.contiguous_format
    model = Model(config.model).to(memory_format=layout)
    optimizer = make_optimizer(config.optim, model)
    batch_size = batch_size_at(px)
    views = [torch.randn(batch_size, 3, px, px).to(memory_format=layout) for _ in range(2)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        with autocast:
            outputs = model(views)
        embeddings = torch.stack([features[model.last] for features in outputs])
        train.nt_xent(embeddings, config.simclr.temperature)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the first one chooses torch's kernels
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    torch.set_num_threads(before)
    return REAL_SHARE * steps * batch_size / (time.perf_counter() - began)


def choose(
    speed: Callable[[int, int, str], float], idle: float, bf16: bool, left_s: float
) -> Choice:
    """The best plan that is done in `left_s` seconds, with the fewest threads that do it. If no
    plan is, the smallest one at its highest speed.

    speed(px, threads, precision): images per second; larger views are timed only where they would
    be in time at the speed of smaller ones.
    """
    counts = thread_counts(idle)
    kinds = ("bf16", "fp32") if bf16 else ("fp32",)
    precision = max(kinds, key=lambda kind: speed(QUICK_PX, counts[0], kind))

    def choices(plans: tuple[Plan, ...]) -> Iterator[Choice]:
        for plan, threads in itertools.product(plans, counts):
            rate = quick = speed(QUICK_PX, threads, precision)
            if plan.px > QUICK_PX and plan.seconds(quick, CLEAN_SPEED * quick) <= left_s:
                rate = speed(plan.px, threads, precision)
            seconds = plan.seconds(rate, CLEAN_SPEED * quick)
            yield Choice(plan, precision, threads, rate, seconds)

    in_time = (choice for choice in choices(PLANS) if choice.seconds <= left_s)
    return next(in_time, None) or min(choices(PLANS[-1:]), key=lambda choice: choice.seconds)


def look_at_machine(started: float) -> Choice:
    """Measure this machine, choose, and say both. `started`: the demo's, of time.perf_counter."""
    say("\n-- timing some training steps")
    idle, bf16 = idle_cores(), has_bf16()
    speed = functools.cache(images_per_second)
    elapsed_s = time.perf_counter() - started
    choice = choose(speed, idle, bf16, TARGET_S - OTHER_S - elapsed_s)
    total_s = time.perf_counter() - started + choice.seconds + OTHER_S
    cores, timed_px = len(usable_cores()), max(choice.plan.px, QUICK_PX)
    say(
        f"   this machine: {idle:.1f} of {cores} cores idle, {'' if bf16 else 'no '}bf16; "
        f"{choice.images_per_s:.0f} images/s at {timed_px} px with {choice.threads} "
        f"torch thread{'s' * (choice.threads > 1)} in {choice.precision}"
    )
    plan = choice.plan
    reason = "all of it" if plan == PLANS[0] else f"less than the full {PLANS[0].epochs} epochs"
    say(f"   chosen: {plan.px} px, {plan.epochs} epochs ({reason}): about {total_s:.0f} s in all")
    return choice


# ---- The commands and the comparison -------------------------------------------------------------


def run_step(title: str, *command: str) -> None:
    """Run one of the project's commands and show what it prints for people."""
    say(f"\n-- {title}\n   python {' '.join(command)}")
    words = [sys.executable, *command]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if not line.startswith("{"):  # the summary as JSON
                say("   " + line, end="")
    except BaseException:
        process.kill()  # what it makes is of no use alone
        process.wait()
        raise
    if (code := process.wait()) != 0:
        raise UserError(
            f"demo: {command[0]} ended with exit code {code}; correct what its last line above says"
        )


def write_shapes(out: Path, split: str, num_samples: int) -> None:
    """Write one split of the generated images."""
    size = [f"--num_samples={num_samples}", f"--size_px={SIZE_PX}"]
    given = [f"--split={split}", *size, "--mode=raw", f"--out={out / split}.beton"]
    run_step(f"{num_samples} images: {split}", "write_dataset.py", "--source=shapes", *given)


def compile_kernel(name: str) -> subprocess.Popen:
    """Start to compile one of the loader's kernels, which takes up to 35 s the first time. If that
    fails, the training compiles it, and says so."""
    code = f"from ffcv_ssl.pipeline.dispatch import BUILT_IN; BUILT_IN.{name}.load()"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)


Rows = tuple[torch.Tensor, torch.Tensor]
"""Features (N, D) and labels (N,)."""


@torch.no_grad()
def encode(
    model: Model, dataset: RunData, config: train.Config, indices: np.ndarray | None = None
) -> dict[str, Rows]:
    """Encode clean centre crops: {depth or "pixels": float32 features and labels}."""
    parts, labels = [], []
    loader = make_loader(
        dataset, config.data, train.clean_view(config), World(), config.channels_last,
        indices=indices, order=OrderOption.SEQUENTIAL, drop_last=False,
        batch_size=config.evaluation.batch_size, seed=config.seed,
    )  # fmt: skip
    with loader:
        for batch in loader:
            valid = torch.as_tensor(batch.valid)
            features = {**model.encode(batch.view_0), "pixels": batch.view_0.flatten(1)}
            parts.append({name: x[valid].float() for name, x in features.items()})
            labels.append(batch.label.view(-1)[valid])
    return {name: (torch.cat([x[name] for x in parts]), torch.cat(labels)) for name in parts[0]}


def linear_probe(known: Rows, val: Rows, num_classes: int) -> float:
    """Accuracy in % of softmax regression on standardised features: L-BFGS on all samples."""
    (features, labels), (val_features, val_labels) = known, val
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, val_features = (features - mean) / std, (val_features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        penalty = PROBE_PENALTY * weight.square().sum()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return accuracy(val_features @ weight.T + bias, val_labels)


def knn(known: Rows, val: Rows, num_classes: int) -> float:
    """Accuracy in % of k-NN (k 20, t 0.1) on unit features."""
    bank, queries = (F.normalize(features, dim=1) for features, _ in (known, val))
    return accuracy(knn_scores(queries, bank, known[1], num_classes, 20, 0.1), val[1])


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in %."""
    return 100 * int(topk_correct(scores, labels, 1)) / len(labels)


def measure(
    checkpoint_path: Path, config: train.Config, train_set: RunData, val_set: RunData
) -> dict[str, float]:
    """All rows of the table for the encoder of a checkpoint: {row: accuracy in %}."""
    model = Model(config.model).eval()
    model.load_state_dict(checkpoint.load(checkpoint_path)["model"])
    indices = np.arange(min(NUM_PROBE, train_set.num_samples))
    known, val = encode(model, train_set, config, indices), encode(model, val_set, config)
    classes = train_set.num_classes
    probes = {f"linear probe, {x}": linear_probe(known[x], val[x], classes) for x in model.widths}
    return probes | {f"k-NN, {x}": knn(known[x], val[x], classes) for x in ("backbone", "pixels")}


def show_table(start: dict[str, float], trained: dict[str, float], chance: float) -> None:
    """Print the comparison for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", title="accuracy on new images, %")
    for title in ("step 0", "trained", "gain"):
        table.add_column(title, justify="right")
    for row in start:
        gain = trained[row] - start[row]
        table.add_row(row, f"{start[row]:.1f}", f"{trained[row]:.1f}", f"{gain:+.1f}")
    table.add_row("chance", f"{chance:.1f}", "", "")
    console = Console()
    with console.capture() as text:  # by itself it ends the process where nobody reads
        console.print(table)
    say(text.get(), end="")


def run(out: Path) -> tuple[int, dict]:
    """Run the demo. Returns the exit code and the summary."""
    started = time.perf_counter()
    clear_folder(out)
    with compile_kernel("render_view"), compile_kernel("draw_view"):  # done before steps are timed
        write_shapes(out, "train", NUM_TRAIN)
        write_shapes(out, "val", NUM_VAL)
    given = [f"--data.train={out / TRAIN_FILE}", f"--data.val={out / VAL_FILE}", f"--out={out}"]
    given += look_at_machine(started).arguments()
    run_step("SimCLR", "train.py", "--config=configs/demo.yaml", *given)
    config = train.read_config([f"--config={out / 'config.yaml'}"])
    torch.set_num_threads(config.system.torch_threads or torch.get_num_threads())
    train_set, val_set = (open_dataset(out / name) for name in (TRAIN_FILE, VAL_FILE))
    ends = [out / f"checkpoint_epoch_{epoch:04d}.pt" for epoch in (0, config.epochs)]
    say("\n-- probes on the frozen encoder, at step 0 and trained")
    start, trained = (measure(path, config, train_set, val_set) for path in ends)
    chance = 100 / train_set.num_classes
    show_table(start, trained, chance)
    say(f"picture of the run: {out / REPORT_FILE}")
    probe = "linear probe, backbone"
    summary: dict[str, Any] = {
        "seconds": round(time.perf_counter() - started, 1),
        "gain_points": round(trained[probe] - start[probe], 2),
        "step_0": start, "trained": trained, "chance": chance, "report": str(out / REPORT_FILE),
    }  # fmt: skip
    return int(summary["gain_points"] < LEAST_GAIN_POINTS), summary


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit code; the last line on stdout is the summary as JSON."""
    parser = OneLineParser(prog="demo.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder to make anew")
    try:
        code, summary = run(Path(parser.parse_args(argv).out).resolve())
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # nobody watches any more
        return 1
    if code:
        gained = f"demo: the probe gained {summary['gain_points']} points"
        print(f"{gained}, expected at least {LEAST_GAIN_POINTS}", file=sys.stderr)
    is_told = has_told("demo", "all steps are done", lambda: print(json.dumps(summary)))
    return code if is_told else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
