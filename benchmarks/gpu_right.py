"""Part 1 of the GPU proof: what runs give is right. Small runs on shapes of 32 px."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import evaluate
import train
from benchmarks.gpu_files import draw
from ffcv_ssl import Loader
from ffcv_ssl.evaluation.encoder import load_encoder
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.run_data import make_loader, open_dataset
from ffcv_ssl.training.world import World

ROOT = Path(__file__).resolve().parent.parent
METHODS = (*train.METHODS, "supervised", "instance_simclr", "moco", "simsiam")
RANKS_METHODS = ("simclr", "byol", "vicreg")
PX, BATCH, QUEUE = 32, 128, 256
NUM_EPOCHS_FLAT = 12
RANKS_TOLERANCE = 1e-3  # of losses, one rank against two
COMPILED_TOLERANCE = 0.02  # of losses in bf16, eager against compiled
NUM_COMPARED = 4  # first losses
FEATURES_TOLERANCE = 0.01  # of features in fp32, whose convolutions use TF32 on a GPU
CPU_TOLERANCE = 0.06  # of accuracies on a few hundred images, a GPU against a CPU


def run(proof: Any) -> None:
    """is it right"""
    case = Right(proof)
    if proof.is_cuda:
        proof.check("tests marked gpu", case.tests)
    methods = METHODS if proof.is_cuda else ("simclr", "byol")
    for method in methods:
        # moco's loss rises while real keys replace the random ones in its queue
        how = "loss below a guess" if method == "moco" else "loss falls"
        proof.check(f"{method}: two epochs, {how}", lambda m=method: case.method(m))
    proof.check("fp16 with clipping", case.half)
    proof.check("chunks and labels", case.chunks)
    proof.check("SIGTERM and resume", case.resume)
    if proof.is_cuda:
        proof.check("compiled", case.compiled)
    proof.check("two ranks on one device equal one", case.ranks)
    proof.check(f"memory over {NUM_EPOCHS_FLAT} epochs", case.memory)
    if proof.is_cuda:
        proof.check("features of the GPU are those of a CPU", case.features)
    protocols = ("knn", "snn", "linear", "mlp", "finetune", "transfer")
    for protocol in (*protocols, "export") if proof.is_cuda else protocols:
        proof.check(f"evaluate.py {protocol}", lambda p=protocol: case.protocol(p))


class Right:
    """The checks, with the files they share."""

    def __init__(self, proof: Any) -> None:
        self.proof, self.folder = proof, proof.folder
        self.device = str(proof.device)
        number = 1024 if proof.is_cuda else 256
        self.train = draw(self.folder / "shapes.beton", "train", number, PX)
        self.val = draw(self.folder / "shapes_val.beton", "val", number // 4, PX)
        self.finished = self.folder / "simclr"

    def arguments(self, name: str, **changes: Any) -> list[str]:
        """A command line of train.py for a run in the folder `name`; `a__b` is the key a.b."""
        settings = {
            "out": self.folder / name, "data.train": self.train, "data.val": self.val,
            "data.batch_size": BATCH if self.proof.is_cuda else 64, "epochs": 2,
            "model.backbone": "resnet18" if self.proof.is_cuda else "tiny",
            "model.stem": "cifar", "model.projector": "128-64", "views.small_images": "true",
            "resolution.min": PX, "resolution.max": PX, "optim.name": "adamw", "optim.lr": 1e-3,
            "optim.lr_scaling": "none", "optim.warmup_epochs": 0, "optim.weight_decay": 1e-4,
            "log.every_steps": 1, "log.tensorboard": "false", "evaluation.knn_bank": 256,
            "evaluation.every_epochs": 100, "system.device": self.device,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in settings.items()]

    def train_run(self, name: str, **changes: Any) -> list[dict[str, Any]]:
        """Train a run to its end; returns its training lines."""
        code = train.main(self.arguments(name, **changes))
        self.proof.expect(code == 0, f"train.py ended with exit code {code}")
        return self.lines(name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A run's training lines; every loss is finite."""
        lines = [line for line in read_metrics(self.folder / name) if "train/loss" in line]
        losses = [line["train/loss"] for line in lines]
        finite = all(loss is not None and math.isfinite(loss) for loss in losses)
        self.proof.expect(finite, f"losses are not finite: {losses}")
        return lines

    def tests(self) -> str:
        """The tests that need a GPU."""
        marked = [
            str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()
        ]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
        command += marked
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1]
        ran = done.returncode == 0 and " passed" in last and "skipped" not in last
        self.proof.expect(ran, last)
        return last.strip("= ")

    def method(self, method: str) -> str:
        """Two epochs of a method; on a GPU no step after the second one waits for the device."""
        recipe = {"supervised": "supervised", "instance_simclr": "instance"}.get(method, "simclr")
        changes = {"method": method, "views__recipe": recipe}
        if method == "moco":
            changes["moco.queue_size"] = QUEUE
        with no_waiting() if self.proof.is_cuda else contextlib.nullcontext():
            losses = [line["train/loss"] for line in self.train_run(method, **changes)]
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        said = f"{first:.3f} -> {last:.3f} in {len(losses)} steps"
        if method == "moco":
            first = math.log(QUEUE + 1)
        self.proof.expect(last < first, said)
        return said + (", no step waits for the device" if self.proof.is_cuda else "")

    def half(self) -> str:
        """fp16 scales its gradients, skips few updates and stays finite."""
        lines = self.train_run("fp16", precision="fp16", optim__clip_norm=1.0)
        steps, updates = lines[-1]["step"], lines[-1]["updates"]
        said = f"{updates} of {steps} updates, loss {lines[-1]['train/loss']:.3f}"
        self.proof.expect(steps - 6 <= updates <= steps, said)
        return said

    def chunks(self) -> str:
        """A batch in parts, with a labelled stream, in bf16."""
        lines = self.train_run(
            "chunks", data__chunk_size=32, labelled__loss="suncet", labelled__labels__fraction=0.5,
            labelled__classes_per_batch=8, labelled__images_per_class=4,
        )  # fmt: skip
        first, last = lines[0]["train/loss"], lines[-1]["train/loss"]
        said = f"loss {first:.3f} -> {last:.3f}"
        self.proof.expect(last < first and "train/loss/suncet" in lines[0], said)
        return said

    def resume(self) -> str:
        """A signal ends a run with a checkpoint; the same command goes on to the same end."""
        epochs = 40 if self.proof.is_cuda else 8
        argv = self.arguments("resumed", epochs=epochs)
        process = subprocess.Popen(
            [sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not read_metrics(self.folder / "resumed"):
                self.proof.expect(process.poll() is None, "it ended before its first step")
                self.proof.expect(time.monotonic() < deadline, "no step in 120 s")
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        self.proof.expect(process.returncode == 75, f"exit {process.returncode}: {printed[-300:]}")
        before = self.lines("resumed")
        self.proof.expect(f"holds step {len(before)}" in printed, printed[-300:])
        after = self.train_run("resumed", epochs=epochs)
        # with their seconds: these steps were not trained again
        self.proof.expect(after[: len(before)] == before, "the lines before the stop have changed")
        steps = [line["step"] for line in after]
        self.proof.expect(steps == list(range(1, len(steps) + 1)), f"steps {steps}")
        self.proof.expect(after[-1]["epoch"] == epochs, f"ended at epoch {after[-1]['epoch']}")
        return f"stopped after step {len(before)}, finished at step {steps[-1]}"

    def compiled(self) -> str:
        """The first losses of a compiled run are those of the same run, not compiled."""
        eager, compiled = (
            [line["train/loss"] for line in lines[:NUM_COMPARED]]
            for lines in (self.lines("simclr"), self.train_run("compiled", system__compile="true"))
        )
        error = max(abs(a - b) / abs(a) for a, b in zip(eager, compiled, strict=True))
        said = f"largest relative difference of {NUM_COMPARED} losses {error:.1e}"
        self.proof.expect(error <= COMPILED_TOLERANCE, said)
        return said

    def ranks(self) -> str:
        """Losses of two ranks, batch-norm synchronised, are those of one rank."""
        same = {
            "precision": "fp32", "system.tf32": "false", "system.sync_batchnorm": "on",
            "optim.name": "sgd", "optim.lr": 0.01, "epochs": 1,
        }  # fmt: skip
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        launch += ["--standalone", "--local_addr", "127.0.0.1"]
        launch += ["train.py", "--system.share_device=true"]
        processes = {}
        for method in RANKS_METHODS if self.proof.is_cuda else RANKS_METHODS[:1]:
            argv = self.arguments(f"{method}_two", method=method, **same)
            processes[method] = subprocess.Popen(
                [*launch, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        said, largest, deadline = [], 0.0, time.monotonic() + 150
        try:
            for method, process in processes.items():
                printed, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
                self.proof.expect(process.returncode == 0, f"{method}: {printed[-500:]}")
                one = self.train_run(f"{method}_one", method=method, **same)[:NUM_COMPARED]
                two = self.lines(f"{method}_two")[:NUM_COMPARED]
                pairs = [(a["train/loss"], b["train/loss"]) for a, b in zip(one, two, strict=True)]
                error = max(abs(a - b) / abs(a) for a, b in pairs)
                said, largest = [*said, f"{method} {error:.1e}"], max(largest, error)
        finally:
            for process in processes.values():
                process.terminate()  # torchrun then ends its ranks
                process.wait(30)
        self.proof.expect(largest < RANKS_TOLERANCE, ", ".join(said))
        return "relative difference of losses: " + ", ".join(said)

    def memory(self) -> str:
        """Memory after the third of twelve epochs is that after the last, of loader and trainer."""
        said = []
        for name, epochs in (("loader", self._loader_memory), ("trainer", self._trainer_memory)):
            if self.proof.is_cuda:  # what earlier checks left in torch's cache would hide growth
                gc.collect()
                torch.cuda.empty_cache()
            mib = epochs()
            said.append(f"{name} {mib[2]} -> {mib[-1]} MiB")
            # torch reserves up to 22 MiB at once; the memory of a process is less exact
            allowed = 22 if self.proof.is_cuda else 64
            self.proof.expect(mib[-1] <= mib[2] + allowed, f"{name}: {mib} MiB by epoch")
        return ", ".join(said)

    def _memory_mib(self) -> int:
        gc.collect()
        if self.proof.is_cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_reserved() >> 20
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    def _loader_memory(self) -> list[int]:
        config = train.read_config(self.arguments("loader"))
        dataset, world = open_dataset(str(self.train)), World(device=self.proof.device)
        ops = train.make_views(config.views.resolve(), PX)
        options: dict[str, Any] = {"batch_size": 64, "drop_last": True, "seed": 0}
        found = []
        loader: Loader = make_loader(dataset, config.data, ops, world, True, **options)
        with loader:
            for _ in range(NUM_EPOCHS_FLAT):
                for batch in loader:
                    batch.view_0.float().mean()
                found.append(self._memory_mib())
        return found

    def _trainer_memory(self) -> list[int]:
        found, train_epoch = [], train.Trainer._train_epoch

        def noting(trainer: train.Trainer, epoch: int) -> None:
            train_epoch(trainer, epoch)
            found.append(self._memory_mib())

        with patch.object(train.Trainer, "_train_epoch", noting):
            self.train_run("flat", epochs=NUM_EPOCHS_FLAT, data__val="null")
        return found

    def features(self) -> str:
        """The trained encoder's features of random images, in fp32."""
        images = torch.randn(64, 3, PX, PX, generator=torch.Generator().manual_seed(0))
        on_gpu, on_cpu = (
            load_encoder(self.finished, device=device).encode(images.to(device))
            for device in (self.device, "cpu")
        )
        errors = {
            depth: ((on_gpu[depth].cpu() - rows).norm() / rows.norm()).item()
            for depth, rows in on_cpu.items()
        }
        said = ", ".join(f"{depth} {error:.1e}" for depth, error in errors.items())
        self.proof.expect(max(errors.values()) < FEATURES_TOLERANCE, said)
        return f"relative difference {said}"

    def protocol(self, protocol: str) -> str:
        """A protocol on the SimCLR run; of frozen features, a CPU finds the same accuracy."""
        if protocol == "export":
            out = self._evaluate(protocol, self.device)
            return f"{len(list(out.iterdir()))} files"
        top1 = self._top1(self._evaluate(protocol, self.device))
        said = f"top-1 {top1:.1%}"
        if self.proof.is_cuda and protocol in ("knn", "snn", "linear", "mlp"):
            of_cpu = self._top1(self._evaluate(protocol, "cpu"))
            said += f", on a CPU {of_cpu:.1%}"
            self.proof.expect(abs(top1 - of_cpu) <= CPU_TOLERANCE, said)
        return said

    def _evaluate(self, protocol: str, device: str) -> Path:
        """The folder of a protocol's result."""
        out = self.folder / f"result_{protocol}_{device.replace(':', '')}"
        settings: dict[str, Any] = {"checkpoint": self.finished, "out": out}
        settings["system.device"] = device
        data = {"data.train": self.train, "data.val": self.val, "data.resolution_px": PX}
        settings |= data if protocol != "export" else {}
        settings |= {
            "linear": {"epochs": 3}, "mlp": {"epochs": 3, "hidden": "[64]"},
            "finetune": {"epochs": 1, "data.batch_size": 64, "log.tensorboard": "false"},
            "transfer": {
                "steps": 4, "data.batch_size": 64, "grid.lrs": "[0.1]", "log.tensorboard": "false",
                "grid.weight_decays": "[0]",
            },
        }.get(protocol, {})  # fmt: skip
        code = evaluate.main([protocol, *(f"--{key}={value}" for key, value in settings.items())])
        self.proof.expect(code == 0, f"exit code {code}")
        return out

    def _top1(self, out: Path) -> float:
        record = json.loads(next(out.rglob("results.jsonl")).read_text().splitlines()[-1])
        found = record["metrics"]
        values = [found] if "top1" in found else list(found.values())
        top1 = max(value["top1"] for value in values if isinstance(value, dict))
        self.proof.expect(0 <= top1 <= 1, f"top1 {top1}")
        return top1


@contextlib.contextmanager
def no_waiting():
    """Within it, a training step that waits for a CUDA device raises, from the third step on."""
    train_step = train.Trainer._train_step

    def guarded(trainer: train.Trainer, data: Any, px: int) -> None:
        mode = "error" if trainer.step >= 2 else "default"
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train_step(trainer, data, px)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with patch.object(train.Trainer, "_train_step", guarded):
        yield
