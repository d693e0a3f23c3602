"""Part 2 of the GPU proof: how fast the loader and the training step are."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import train
from benchmarks import step_case, train_step
from benchmarks.gpu_files import Samples, write_samples
from benchmarks.step_case import StepCase
from benchmarks.step_record import IMAGENET_IMAGES
from ffcv_ssl.training.optimizers import resolution_at
from ffcv_ssl.training.run_data import make_loader, open_dataset
from ffcv_ssl.training.world import World

LEAST_OF_SYNTHETIC = 0.97  # the loop with its loader, of the step on tensors on the device
COMPILE_S = 70  # for compiling a ResNet-50 and measuring it: an estimate
MOST_EXTRAS = 0.03  # probes, averages, LARS and logging, of the bare forward and backward pass
EXTRAS = (
    step_case.AVERAGE, step_case.OPTIMIZER, step_case.PROBES, step_case.AVERAGES, step_case.WATCH,
    step_case.REST,
)  # fmt: skip
RAMP = str(train_step.CONFIGS / "imagenet/simclr.yaml")
"""Its resolutions count for the hours of ImageNet."""


def run(proof: Any) -> None:
    """is it fast"""
    fast = Fast(proof)
    proof.check("bare matrix products", fast.matrix_products)
    for px in fast.sides:
        proof.check(f"loader, two views at {px} px", lambda px=px: fast.loader(px))
    cases = [("simclr", px, False) for px in fast.sides]
    middle = fast.sides[len(fast.sides) // 2]
    cases += [(method, middle, False) for method in fast.methods]
    if proof.is_cuda:  # compiling takes longest, so that it comes last
        cases += [("simclr", px, True) for px in sorted(fast.sides, key=lambda px: px != middle)]
    for method, px, compiled in cases:
        how = ", compiled" if compiled else ""
        proof.check(
            f"{method} at {px} px{how}", lambda m=method, p=px, c=compiled: fast.step(m, p, c)
        )
    if len(fast.sides) > 1:
        proof.check("hours of ImageNet's 100 epochs, reckoned", fast.hours)


class Fast:
    """The measurements; `found` goes into the record."""

    def __init__(self, proof: Any) -> None:
        self.proof = proof
        is_cuda = proof.is_cuda
        self.sides = (224, 160, 96) if is_cuda else (32,)
        self.methods = ("byol", "vicreg", "barlow") if is_cuda else ("byol",)
        self.steps, self.runs = (8, 3) if is_cuda else (1, 1)
        batch, loop_steps = (256, 10) if is_cuda else (8, 2)
        self.options = SimpleNamespace(
            batch=batch, backbone="resnet50" if is_cuda else "tiny", device=str(proof.device),
            threads=0, path=proof.folder / "repeated.beton", loop_steps=loop_steps,
        )  # fmt: skip
        count = (train_step.WARM_STEPS + loop_steps) * batch
        labelled = [(image, i % 10) for i, (image, _) in enumerate(proof.files.photographs)]
        write_samples(self.options.path, Samples(labelled, count), [str(i) for i in range(10)])
        self.found: dict[str, Any] = proof.found
        self.found |= {"loader": {}, "steps": {}}

    def matrix_products(self) -> str:
        """The yardstick of the device: bf16 products of large matrices."""
        size = 8192 if self.proof.is_cuda else 512
        a = torch.randn(size, size, device=self.proof.device, dtype=torch.bfloat16)
        clock = step_case.Clock(self.proof.device)
        rates = []
        for _ in range(6):
            clock.wait()
            began = time.perf_counter()
            for _ in range(10):
                a @ a
            clock.wait()
            rates.append(10 * 2 * size**3 / (time.perf_counter() - began) / 1e12)
        self.found["matrix_tflops_per_s"] = round(max(rates[1:]), 3)
        return f"{max(rates[1:]):.3g} TFLOP/s in bf16, the best of five"

    def loader(self, px: int) -> str:
        """images/s to the device by the number of threads, as the trainer loads them."""
        config, _ = train_step.read_config("simclr", px, self.options, [], self.proof.folder)
        dataset, world = open_dataset(str(self.options.path)), World(device=self.proof.device)
        ops = train.make_views(config.views.resolve(), px)
        cores = len(os.sched_getaffinity(0))
        rates = {}
        for threads in [n for n in (1, 2, 4, 8, 16) if n <= max(cores, 1)]:
            data = replace(config.data, num_workers=threads)
            options: dict[str, Any] = {"batch_size": 64, "drop_last": False, "seed": 0}
            options["indices"] = list(range(min(dataset.num_samples, 256 * threads)))
            with make_loader(dataset, data, ops, world, True, **options) as loader:
                rates[str(threads)] = round(self._rate(loader, 1.0 if self.proof.is_cuda else 0.1))
        self.found["loader"][str(px)] = rates
        said = ", ".join(f"{threads}: {rate:,}" for threads, rate in rates.items())
        return f"images/s by threads {said}"

    def _rate(self, loader: Any, seconds: float) -> float:
        clock = step_case.Clock(self.proof.device)
        for _ in loader:  # kernels are loaded, slots are made
            pass
        clock.wait()
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for batch in loader:
                images += len(batch.indices)
        clock.wait()
        return images / (time.perf_counter() - began)

    def step(self, method: str, px: int, compiled: bool) -> str:
        """A method's loop against the step on noise, and that against the bare model."""
        if compiled:
            self.proof.leave_out_if_late(COMPILE_S)
        rest = ["--system.compile=true"] if compiled else []
        config, file = train_step.read_config(method, px, self.options, rest, self.proof.folder)
        name = f"{method} {px}" + (" compiled" if compiled else "")
        with contextlib.closing(StepCase(config, World(device=self.proof.device))) as case:
            memory_mib = case.peak_memory_mib(train_step.WARM_STEPS, self.options.loop_steps)
            case.prepare(bare=not compiled)
            cases = {
                "step": lambda: case.step(self.steps),
                "loop": lambda: case.loop(train_step.WARM_STEPS, self.options.loop_steps),
            }
            if not compiled:  # the bare pass would be compiled too, which takes a minute more
                cases |= {
                    "bare": lambda: case.bare(self.steps),
                    "parts": lambda: case.parts(self.steps),
                    "line": case.log_line,
                }
            runs = train_step.interleave(cases, self.runs, name)
            operations = config.data.batch_size * case.trainer.flops_by_px[px][0]
        entry = self._entry(runs, config, operations)
        entry |= {"config": file, "peak_memory_mib": memory_mib and round(memory_mib)}
        self.found["steps"][name] = entry
        said = (
            f"{entry['loop_images_per_s']:,.0f} images/s, {entry['of_synthetic']:.3f} of tensors "
            f"on the device; {entry['of_matrix_products']:.0%} of matrix products; "
            f"{entry['peak_memory_mib']} MiB"
        )
        if "extras" in entry:
            said += f"; extras {entry['extras']:.1%} of the bare pass"
        loader = max(self.found["loader"][str(px)].values())
        if loader < entry["step_images_per_s"]:
            said += f"; the loader alone makes {loader:,} images/s on these cores"
        if self.proof.is_cuda:
            self.proof.expect(entry["of_synthetic"] >= LEAST_OF_SYNTHETIC, said)
            self.proof.expect(entry.get("extras", 0) <= MOST_EXTRAS, said)
        return said

    def _entry(self, runs: dict[str, list], config: Any, operations: int) -> dict[str, Any]:
        size, step = config.data.batch_size, statistics.median(runs["step"])
        loop = statistics.median(run["images_per_s"] for run in runs["loop"])
        rate = operations / step / 1e12
        entry = {
            "loop_images_per_s": round(loop, 1),
            "step_images_per_s": round(size / step, 1),
            "of_synthetic": round(
                statistics.median(run["images_per_s"] * step / size for run in runs["loop"]), 4
            ),
            "data_wait": round(statistics.median(run["data_wait"] for run in runs["loop"]), 4),
            "tflops_per_s": round(rate, 3),
            "of_matrix_products": round(rate / self.found["matrix_tflops_per_s"], 4),
            "batch_size": size,
        }
        if "bare" not in runs:
            return entry
        bare = statistics.median(runs["bare"])
        parts = {n: statistics.median(run[n] for run in runs["parts"]) for n in runs["parts"][0]}
        logging = statistics.median(runs["line"]) / config.log.every_steps
        extras = sum(parts.get(name, 0) for name in EXTRAS) + logging
        return entry | {
            "bare_images_per_s": round(size / bare, 1),
            "extras": round(extras / (bare + parts.get(step_case.TEACHER, 0)), 4),
            "parts_ms": {name: round(1e3 * seconds, 3) for name, seconds in parts.items()},
        }

    def hours(self) -> str:
        """Hours of ImageNet's 100 epochs with the resolutions of `RAMP`, from the loop's rates."""
        config = train.read_config([f"--config={RAMP}"])
        epochs = Counter(resolution_at(e, config.resolution) for e in range(config.epochs))
        measured = {
            px: 1 / self.found["steps"][f"simclr {px}"]["loop_images_per_s"] for px in self.sides
        }
        seconds = sum(
            number * IMAGENET_IMAGES * seconds_at(px, measured) for px, number in epochs.items()
        )
        hours = round(seconds / 3600, 2)
        self.found["imagenet"] = {"hours": hours, "epochs_by_px": dict(sorted(epochs.items()))}
        return f"{hours} hours on this device"


def seconds_at(px: int, measured: dict[int, float]) -> float:
    """Seconds per image at a resolution, in proportion to its pixels between measured ones."""
    sides = sorted(measured)
    upper = next((side for side in sides if side >= px), sides[-1])
    lower = max((side for side in sides if side < upper), default=upper)
    if upper == lower:
        return measured[upper]
    share = (px**2 - lower**2) / (upper**2 - lower**2)
    return measured[lower] + share * (measured[upper] - measured[lower])
