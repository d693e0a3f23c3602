"""The numbers of a run in short: the last value of every key, and the best accuracies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ffcv_ssl.monitor.table import MAX_COLUMNS, MAX_KEY_CHARACTERS, as_number

ACCURACY = re.compile(r"val/(?:[^/]+/)?(?:top1|map)")
HEADLINES = ("val/backbone/top1", "val/top1", "val/map")
"""The accuracy that stands for a run: of pretraining, or of fine-tuning."""
KNN = "val/knn/top1"


class Summary:
    """What a run's records say in short; `add` each of them, in order."""

    def __init__(self) -> None:
        self.num_records = 0
        self._last: dict[str, Any] = {}
        self._best: dict[str, tuple[float, float]] = {}  # (value, epoch)

    def add(self, record: Mapping[str, Any], is_evaluation: bool) -> None:
        """Take a record in."""
        self.num_records += 1
        self._last.update(record)
        for key, value in record.items() if is_evaluation else ():
            if key.startswith("val/") and ACCURACY.fullmatch(key):
                value = as_number(value)
                if value > self._best.get(key, (-math.inf, 0))[0]:
                    self._best[key] = value, as_number(record.get("epoch"))

    def number(self, key: str) -> float | None:
        """The last value of a key; None where it has none that is finite."""
        value = as_number(self._last.get(key))
        return None if math.isnan(value) else value

    def finals(self) -> dict[str, dict[str, float | None]]:
        """{key: {last, and of accuracies best and epoch}} of all keys with numbers."""
        found: dict[str, dict[str, float | None]] = {}
        for key, value in self._last.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            if len(found) < MAX_COLUMNS and len(key) <= MAX_KEY_CHARACTERS:
                found[key] = {"last": self.number(key), **self._best_of(key)}
        return found

    def _best_of(self, key: str) -> dict[str, float | None]:
        if key not in self._best:
            return {}
        value, epoch = self._best[key]
        return {"best": value, "epoch": None if math.isnan(epoch) else epoch}

    def headline(self, epochs: float | None, is_running: bool) -> dict[str, Any]:
        """The few numbers that stand first. epochs: that the run is going to have, if known."""
        key = next((key for key in HEADLINES if key in self._last), HEADLINES[0])
        epoch, seconds = self.number("epoch"), self.number("seconds")
        left = None
        if is_running and epochs and epoch and seconds:
            left = max(0.0, seconds / epoch * (epochs - epoch))
        return {
            "epoch": epoch, "epochs": epochs, "step": self.number("step"),
            "accuracy": {"key": key, "last": self.number(key), **self._best_of(key)},
            "knn": {"key": KNN, "last": self.number(KNN), **self._best_of(KNN)},
            "images_per_s": self.number("train/images_per_s"), "loss": self.number("train/loss"),
            "seconds": seconds, "seconds_left": left,
        }  # fmt: skip
