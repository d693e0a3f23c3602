"""Export: a backbone's weights under torchvision's key names, with a model card.

The file loads with `strict=True` into torchvision's ResNet without classifier and into timm's; what
was measured of the checkpoint is in the card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ffcv_ssl.config import settings
from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.common import Architecture, refuse_ranks
from ffcv_ssl.evaluation.encoder import load_encoder, save_encoder
from ffcv_ssl.evaluation.model_card import write_card
from ffcv_ssl.evaluation.results import read_results
from ffcv_ssl.training.metrics_log import read_metrics
from ffcv_ssl.training.run_folder import BACKBONE, CHECKPOINT

ACCURACIES = ("top1", "top5", "map")


@dataclass(frozen=True)
class ExportConfig:
    """Which weights, and where they go."""

    checkpoint: str = ""
    """A run's folder, a checkpoint, or a file of weights."""
    out: str | None = None
    """Folder of the exported files; null: `export` in the checkpoint's folder."""
    model: Architecture = field(default_factory=Architecture)
    system: settings.SystemConfig = field(default_factory=settings.SystemConfig)


def run(config, world, stop):
    """Write `backbone.safetensors` and `README.md`; returns what they say. Raises UserError."""
    refuse_ranks("export", world)
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
    encoder = load_encoder(config.checkpoint, config.model.resolve())
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


def export_folder(config):
    """Where the files go: `out`, or a folder in the checkpoint's, named after a kept copy."""
    if config.out:
        return Path(config.out)
    path = Path(config.checkpoint)
    if path.is_dir() or path.name in (CHECKPOINT, BACKBONE):
        return (path if path.is_dir() else path.parent) / "export"
    return path.parent / f"export_{path.stem}"


def measured(encoder):
    """What is on record of an encoder: [{protocol, data, metric, value}], value in [0, 1].

    The newest of each, of the run's own evaluations and of those in its folder. A record that says
    other weights, as a file under this name had before, is left out.
    """
    folder, step = Path(encoder.path), encoder.about.get("step")
    folder = folder if folder.is_dir() else folder.parent
    found = {}
    for record in read_metrics(folder) if step is not None else []:
        own = {key: value for key, value in record.items() if key.startswith("val/")}
        if record["step"] == step and own:
            data = Path((encoder.config or {}).get("data", {}).get("val") or "val").stem
            found |= {("online", data, key.removeprefix("val/")): own[key] for key in own}
    for record in read_results(folder):
        is_ours = record.get("weights", encoder.fingerprint) == encoder.fingerprint
        is_ours = is_ours and record.get("name") == encoder.name
        if is_ours and record.get("about", {}).get("step") == step:
            data = Path(str(record.get("data", {}).get("val"))).stem
            for key, value in flatten_as_text(record.get("metrics", {})).items():
                found[record["protocol"], data, key] = value
    return [
        {"protocol": protocol, "data": data, "metric": metric, "value": value}
        for (protocol, data, metric), value in found.items()
        if metric.replace(".", "/").rsplit("/", 1)[-1] in ACCURACIES and value is not None
    ]
