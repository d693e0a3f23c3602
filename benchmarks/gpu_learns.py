"""Part 3 of the GPU proof: SimCLR learns, minute by minute."""

from __future__ import annotations

import json
from typing import Any

import train
from benchmarks.gpu_checks import LeftOut
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.run_data import open_dataset

CONFIG = "configs/imagenette/gpu_simclr.yaml"
TRAIN_S = 180
"""For the training proper: timing it first, start-up and evaluations take another minute."""
NUM_EVALUATIONS = 4
LEAST_GAIN = 0.05  # of k-NN's accuracy over the untrained network, on a GPU
QUICK = {"model.backbone": "tiny", "resolution.min": 32, "resolution.max": 32}
KNN, PROBE = "val/knn/top1", "val/backbone/top1"


def run(proof: Any) -> None:
    """does it learn"""
    learns = Learns(proof)
    proof.check("speed of the run", learns.measure_speed)
    proof.check(f"SimCLR, {CONFIG}", learns.learn)
    proof.check("hours of ImageNet's 100 epochs, from part 2", learns.hours)


class Learns:
    """The runs; `found` goes into the record."""

    def __init__(self, proof: Any) -> None:
        self.proof, self.found = proof, proof.found
        self.found["config"] = CONFIG
        self.num_samples = open_dataset(str(proof.files.train)).num_samples
        self.rate = 0.0

    def _train(self, name: str, epochs: int, every: int) -> list[dict[str, Any]]:
        """Train to the end; returns the lines of the metrics."""
        out = self.proof.folder / name
        settings = {
            "config": CONFIG, "out": out, "epochs": epochs, "evaluation.every_epochs": every,
            "data.train": self.proof.files.train, "data.val": self.proof.files.val,
            "evaluation.knn_k": 20, "log.tensorboard": "false", "log.every_steps": 20,
            "data.batch_size": 256 if self.proof.is_cuda else 64,
            "system.device": self.proof.device, **({} if self.proof.is_cuda else QUICK),
        }  # fmt: skip
        code = train.main([f"--{key}={value}" for key, value in settings.items()])
        self.proof.expect(code == 0, f"train.py ended with exit code {code}")
        return read_metrics(out)

    def measure_speed(self) -> str:
        """images/s of a short run after its first epoch, with a checkpoint after each epoch."""
        epochs = 12 if self.proof.is_cuda else 3
        lines = [r for r in self._train("short", epochs, epochs) if "train/images_per_s" in r]
        first, last = next(r for r in lines if r["epoch"] >= 1), lines[-1]
        self.rate = (last["images"] - first["images"]) / (last["seconds"] - first["seconds"])
        return f"{self.rate:,.0f} images/s"

    def learn(self) -> str:
        """As many epochs as there is time for, with k-NN and probe a few times on the way."""
        epochs = 2
        if self.proof.is_cuda:
            epochs = max(NUM_EVALUATIONS, int(TRAIN_S * self.rate / self.num_samples))
        lines = self._train("long", epochs, max(1, epochs // NUM_EVALUATIONS))
        curve = [
            {
                "minutes": round(r["seconds"] / 60, 2), "epoch": r["epoch"],
                "knn": round(r[KNN], 4), "probe": round(r[PROBE], 4),
            }
            for r in lines if KNN in r
        ]  # fmt: skip
        speed = [r["train/images_per_s"] for r in lines if "train/images_per_s" in r]
        self.found.update(
            images=self.num_samples, epochs=epochs, curve=curve,
            images_per_s=sorted(speed)[len(speed) // 2],
        )  # fmt: skip
        said = "; ".join(
            f"{at['minutes']:.1f} min k-NN {at['knn']:.1%} probe {at['probe']:.1%}" for at in curve
        )
        gain = curve[-1]["knn"] - curve[0]["knn"]
        if self.proof.is_cuda:
            self.proof.expect(gain >= LEAST_GAIN, said)
        return f"{epochs} epochs of {self.num_samples} images: {said}"

    def hours(self) -> str:
        """What part 2 has reckoned, if it has left its results in the same folder."""
        path = self.proof.out / "gpu_fast.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if "imagenet" not in record:
            raise LeftOut("part 2 has not left them in the folder of the results")
        self.found["imagenet"] = record["imagenet"]
        return f"{record['imagenet']['hours']} hours"
