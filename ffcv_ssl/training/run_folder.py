"""A run's folder: its configuration, checkpoint, kept copies and metrics.

Every rank reads the folder; only the first rank writes, and raises CheckpointError where it cannot
(disk full...). A killed run may leave metrics of steps after its checkpoint; resuming removes them.

Besides the checkpoint, the folder keeps the one before it until the run is finished, to go back to
if the disk loses the last one. A folder with files that a new run would destroy is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffcv_ssl.config.plain import config_differences
from ffcv_ssl.config.renamed import Table, rename
from ffcv_ssl.config.settings import LogConfig
from ffcv_ssl.config.yaml_layers import yaml_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.files import StrPath, explained, write_text
from ffcv_ssl.training import checkpoint, wandb_log
from ffcv_ssl.training.checkpoint import PREVIOUS
from ffcv_ssl.training.metrics_log import EVENTS_FOLDER, METRICS_FILE, MetricsLog
from ffcv_ssl.training.report import REPORT_FILE, draw_report

CHECKPOINT, BACKBONE, CONFIG, FORMAT = "checkpoint.pt", "backbone.safetensors", "config.yaml", 1
VIEWS_PICTURE, VIEWS_FILE = "views.png", "views.json"


class RunFolder:
    """The folder at `path`.

    config (dict of plain types) and datasets (dict of RunData or None) identify the run. Settings
    in `free_keys`, or starting with one of `free_groups`, may differ from the saved settings.
    renamed: table of old and new names of settings, as `config.renamed.rename` takes it. complete:
    writes out what settings leave to a name, such as a recipe's views; both sides of a comparison
    are completed, so that a checkpoint may say less.
    """

    def __init__(
        self,
        path: StrPath,
        config: dict[str, Any],
        datasets: Mapping[str, Any],
        free_keys: tuple[str, ...],
        free_groups: tuple[str, ...],
        writes: bool = True,
        renamed: Table | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.writes = Path(path), writes
        self.renamed = renamed or {}
        self.complete = complete or (lambda settings: settings)
        self.config = self.complete(config)
        self.datasets = {name: data and data.describe() for name, data in datasets.items()}
        self.free_keys, self.free_groups = free_keys, free_groups
        self.log: MetricsLog | None = None
        self.remarks: list[str] = []
        """What has happened to the run, a line each: in the checkpoint, and in config.yaml."""

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint's state, or None. Raises UserError, naming both sides, for a checkpoint of
        another run, or files of something else, and CheckpointError for an unreadable
        checkpoint."""
        path = self.path / CHECKPOINT
        if not path.exists():
            self._check_free()
            return None
        saved = checkpoint.load(path)
        if saved.get("format") != FORMAT:
            raise UserError(
                f"{path}: got format {saved.get('format')!r}, expected {FORMAT}; use another --out"
            )
        with self.restoring():
            differences = self._differences(saved)
        if differences:
            raise UserError(
                f"{path}: made by another run: {'; '.join(differences)}; restore what has changed, "
                f"or use another --out{self._longer(saved)}"
            )
        self.remarks = list(saved.get("remarks", ()))
        return saved

    def _longer(self, saved):
        """How a finished run gets more epochs, where the command asks for more and has a way."""
        epochs, now = saved["config"].get("epochs"), self.config.get("epochs")
        is_longer = type(epochs) is int and type(now) is int and epochs < now
        return "; --extend gives a finished run more epochs" * (
            is_longer and "epochs" not in self.free_keys and "extend" in self.config
        )

    def _differences(self, saved):
        """What this run has in other words than a checkpoint, whose settings get today's names."""
        saved["config"], _ = rename(saved["config"], self.renamed)
        with contextlib.suppress(ValueError):  # of a recipe that is gone: the two differ as named
            saved["config"] = self.complete(saved["config"])
        sides = (saved["config"], self.config)
        differences = config_differences(*sides, self.free_keys, self.free_groups)
        for name in {**self.datasets, **saved["datasets"]}:
            before, now = saved["datasets"].get(name, "not on record"), self.datasets.get(name)
            if before != now:
                differences.append(f"{name} data {before} in the checkpoint, {now} now")
        return differences

    def begin(
        self,
        saved: dict[str, Any] | None,
        start: Callable[[], object],
        restore: Callable[[dict[str, Any]], object],
    ) -> None:
        """Start a run, or restore it from its checkpoint. Raises CheckpointError where that lacks
        what `restore` needs."""
        if saved is None:
            start()
            return
        with self.restoring():
            restore(saved)

    def restoring(self) -> contextlib.AbstractContextManager[None]:
        """A checkpoint that lacks a part which is used in the block, or has another one, is a
        CheckpointError."""
        return checkpoint.needing(self.path / CHECKPOINT, "what the run goes on from")

    def _check_free(self):
        """Raise UserError where a run that begins here would destroy files: those of a run whose
        checkpoint is gone, or files of the same names that no run of ours wrote."""
        kept = sorted(file.name for file in self.path.glob("checkpoint*.pt"))
        backbone = [BACKBONE] if (self.path / BACKBONE).exists() else []
        if names := [*kept, *backbone, *_foreign(self.path)]:
            back = checkpoint.way_back(self.path / CHECKPOINT)
            raise UserError(
                f"{self.path}: got {', '.join(names)} but no {CHECKPOINT}, expected a run's folder "
                f"or a new one; {back + ', or ' if back else ''}move them away, or use another "
                "--out"
            )

    def open_log(self, last_step: int | None, settings: LogConfig) -> None:
        """Begin the metrics anew (`last_step` None), or continue after `last_step`. Raises
        UserError where wandb is asked for and cannot be imported."""
        if not self.writes:
            return
        follow = None
        if settings.wandb is not None:
            follow = wandb_log.opener(self.path, settings.wandb, self.config)
        pictures, step = {}, step_of_views(self.path)
        if step is not None:
            pictures["views"] = self.path / VIEWS_PICTURE, step
        if self.is_finished and last_step is not None:
            pictures["report"] = self.path / REPORT_FILE, last_step
        with self._explained_log():
            about = yaml_text(self.config)
            self.log = MetricsLog(
                self.path, last_step, settings.tensorboard, about, pictures, follow
            )

    def show_picture(self, tag: str, path: Path, step: int) -> None:
        """Show a picture of the run, a PNG, beside its metrics."""
        if self.log is not None:
            with self._explained_log():
                self.log.picture(tag, path, step)

    def write_config(self) -> None:
        """Write the resolved configuration to `config.yaml`."""
        if self.writes:
            text, path = yaml_text(self.config), self.path / CONFIG
            text = "".join(f"# {remark}\n" for remark in self.remarks) + text
            with explained(path):
                write_text(path, text)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record to the metrics."""
        if self.log is not None:
            with self._explained_log():
                self.log.write(record)

    def _explained_log(self):
        return explained(self.path / METRICS_FILE)

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold the evaluation after `step` steps; False without a log."""
        return self.log is not None and self.log.has_evaluation(step)

    def latest(self, *prefixes: str) -> dict[str, Any]:
        """The newest values of the keys that start with one of the prefixes."""
        records = [self.log.latest(prefix) for prefix in prefixes] if self.log else []
        found = {key: value for record in records for key, value in record.items()}
        return {key: value for key, value in found.items() if key.startswith(prefixes)}

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, once the metrics are on disk."""
        if self.writes:
            assert self.log is not None, "open_log comes first"
            with self._explained_log():
                self.log.sync()
            about = {"format": FORMAT, "config": self.config, "datasets": self.datasets}
            about["remarks"] = self.remarks
            threads = {"threads": torch.get_num_threads(), "versions": checkpoint.versions()}
            files = self.path / CHECKPOINT, self.path / PREVIOUS
            checkpoint.save(files[0], {**about, **state, **threads}, previous=files[1])

    @property
    def is_finished(self) -> bool:
        """Whether `finish` has nothing to do; always on ranks that do not write."""
        has = {name: (self.path / name).exists() for name in (BACKBONE, REPORT_FILE, PREVIOUS)}
        return not self.writes or (has[BACKBONE] and has[REPORT_FILE] and not has[PREVIOUS])

    def finish(
        self,
        samples: list[np.ndarray],
        backbone: torch.nn.Module,
        about: dict[str, str],
        step: int,
    ) -> None:
        """Leave the backbone of a pretraining run and its picture. samples: views to show, as
        `draw_report` takes them; about: the backbone's metadata; step: the last one."""
        checkpoint.save_weights(self.path / BACKBONE, backbone, about)
        self.show_picture("report", draw_report(self.path, samples), step)
        self.forget_previous()

    def forget_previous(self) -> None:
        """Delete the checkpoint before the last one: the run is finished."""
        if self.writes:
            (self.path / PREVIOUS).unlink(missing_ok=True)

    def keep_copy(self, epoch: int) -> None:
        """Keep a permanent copy of the checkpoint, named after `epoch`."""
        if self.writes:
            kept = self.path / f"checkpoint_epoch_{epoch:04d}.pt"
            with explained(kept):
                checkpoint.keep_copy(self.path / CHECKPOINT, kept)

    def notes(
        self, saved: dict[str, Any], method: str = "", source: str | None = None
    ) -> Iterator[str]:
        """What changed since the checkpoint and may alter the losses, a line each. source: digest
        of a user's method, which the checkpoint has too."""
        if source != saved.get("method_source", source):
            yield (
                f"{self.path}: the source of {method} has changed since the checkpoint; the run "
                "continues with the new source"
            )
        now = {"threads": torch.get_num_threads(), **checkpoint.versions()}
        before = {"threads": saved["threads"], **saved["versions"]}
        if now != before:
            yield f"{self.path}: losses may differ in their last bits: {before} before, {now} now"

    def close(self) -> None:
        """Close the metrics; a second call does nothing."""
        if self.log is not None:
            with self._explained_log():
                self.log.close()


def step_of_views(folder: Path) -> int | None:
    """The step of the pictures of views in a run's folder; None where there are none."""
    try:
        about = json.loads(_text(folder / VIEWS_FILE))
        return int(about["step"]) if (folder / VIEWS_PICTURE).exists() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _foreign(folder: Path) -> list[str]:
    """Names of the files in a folder without a checkpoint that a run would overwrite, but that no
    run wrote."""
    found = []
    settings, metrics = folder / CONFIG, folder / METRICS_FILE
    if settings.exists() and not re.search(r"^out:", _text(settings), re.MULTILINE):
        found.append(CONFIG)
    if metrics.exists() and not re.match(r"\{|$", _text(metrics)):
        found.append(METRICS_FILE)
    if not metrics.exists():  # a run writes its metrics first
        found += [name for name in (EVENTS_FOLDER, REPORT_FILE) if (folder / name).exists()]
    return found


def _text(path: Path) -> str:
    """What a file holds; that of a pipe or a device, which may have no end, is none of ours."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "no file"
