"""Export: a backbone's weights under torchvision's key names, with a model card.

The file loads with `strict=True` into torchvision's ResNet without classifier and into timm's. The
card lists what was measured of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffcv_ssl.config import settings
from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.commands import Command
from ffcv_ssl.evaluation.encoder import Encoder, load_encoder, save_encoder
from ffcv_ssl.evaluation.model_card import write_card
from ffcv_ssl.evaluation.protocol_run import refuse_ranks
from ffcv_ssl.evaluation.protocol_settings import Architecture
from ffcv_ssl.evaluation.results import checkpoint_folder, read_results
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT
from ffcv_ssl.training.world import World

ACCURACIES = ("top1", "top5", "map")


@dataclass(frozen=True)
class ExportConfig:
    """Which weights, and where the files go."""

    checkpoint: str = ""
    """A run's folder, a checkpoint, or a file of weights."""
    out: str | None = None
    """Folder of the exported files; null: `export` in the checkpoint's folder."""
    model: Architecture = field(default_factory=Architecture)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)


def run(config: ExportConfig, world: World, stop: StopSignal | None) -> dict[str, Any]:
    """Write `backbone.safetensors` and `README.md`; returns a summary. Raises UserError."""
    from torchvision.models import ResNet  # slow to import

    refuse_ranks("export", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
    encoder = load_encoder(config.checkpoint, config.model.resolve())
    if not isinstance(encoder.model.backbone, ResNet):
        raise UserError(
            f"{encoder.path}: got a backbone '{encoder.architecture.backbone}', expected a ResNet "
            "of torchvision, whose weights' names others know; use the run's backbone.safetensors"
        )
    folder = export_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); use another --out") from None
    save_encoder(folder / BACKBONE, encoder.model.backbone, encoder, encoder.about)
    metrics = measured(encoder)
    architecture = encoder.architecture
    names = (architecture.backbone, architecture.stem, BACKBONE)
    write_card(folder, *names, encoder.config, encoder.about, metrics)
    world.say(f"{folder}: {BACKBONE}, README.md")
    weights = sum(value.numel() for value in encoder.model.backbone.parameters())
    return {
        "protocol": "export", "checkpoint": encoder.path, "out": str(folder),
        "backbone": architecture.backbone, "stem": architecture.stem, "weights": weights,
        "metrics": metrics,
    }  # fmt: skip


def export_folder(config: ExportConfig) -> Path:
    """Where the files go: `out`, or `export` in the checkpoint's folder, `export_NAME` for a kept
    copy."""
    if config.out:
        return Path(config.out)
    path = Path(config.checkpoint)
    if path.is_dir() or path.name in (CHECKPOINT, BACKBONE):
        return checkpoint_folder(path) / "export"
    return path.parent / f"export_{path.stem}"


def measured(encoder: Encoder) -> list[dict[str, Any]]:
    """What is on record of an encoder: [{protocol, data, metric, value}], value in [0, 1].

    The newest value of each metric, from the run's online evaluations and from the results in its
    folder. A record of other weights, which this file held before, is left out.
    """
    folder, step = checkpoint_folder(encoder.path), encoder.about.get("step")
    found: dict[tuple[str, str, str], Any] = {}
    for record in read_metrics(folder) if step is not None else []:
        online = {key: value for key, value in record.items() if key.startswith("val/")}
        if record["step"] == step and online:
            data = Path((encoder.config or {}).get("data", {}).get("val") or "val").stem
            found |= {("online", data, key.removeprefix("val/")): online[key] for key in online}
    for record in read_results(folder):
        is_same = record.get("weights", encoder.fingerprint) == encoder.fingerprint
        is_same = is_same and record.get("name") == encoder.name
        if is_same and record.get("about", {}).get("step") == step:
            data = Path(str(record.get("data", {}).get("val"))).stem
            for key, value in flatten_as_text(record.get("metrics", {})).items():
                found[record["protocol"], data, key] = value
    return [
        {"protocol": protocol, "data": data, "metric": metric, "value": value}
        for (protocol, data, metric), value in found.items()
        if metric.replace(".", "/").rsplit("/", 1)[-1] in ACCURACIES and value is not None
    ]


COMMAND = Command(ExportConfig, run, "weights for torchvision and timm, and a model card")
