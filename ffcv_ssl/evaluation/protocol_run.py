"""How a protocol begins and ends: its checkpoint is opened, its result is reported."""

from __future__ import annotations

import sys
from typing import Any

from ffcv_ssl.errors import Interrupted, UserError
from ffcv_ssl.evaluation.confusion import draw_confusion
from ffcv_ssl.evaluation.datasets import EvalDatasets, open_datasets
from ffcv_ssl.evaluation.encoder import Encoder, load_encoder
from ffcv_ssl.evaluation.protocol_settings import FrozenConfig, ProtocolConfig
from ffcv_ssl.evaluation.results import make_record, report, results_folder, settings_key
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


def open_encoder(config: ProtocolConfig, world: World) -> Encoder:
    """The checkpoint of a protocol on the rank's device. Raises as `load_encoder`."""
    if not config.checkpoint:
        raise UserError("checkpoint: got none, expected --checkpoint RUN or FILE")
    encoder = load_encoder(config.checkpoint, config.model.resolve(), world.device)
    encoder.precision = config.precision
    return encoder


def refuse_ranks(protocol: str, world: World) -> None:
    """Raise UserError where a protocol that runs on one device was started on several."""
    if world.size > 1:
        raise UserError(
            f"{protocol}: got {world.size} ranks, expected one; start it without torchrun"
        )


def open_frozen(protocol: str, config: FrozenConfig, world: World) -> Encoder:
    """The checkpoint for a protocol that trains none of it.

    Raises UserError where the checkpoint lacks one of the depths, and for several ranks.
    """
    refuse_ranks(protocol, world)
    if config.system.profile:
        got = f"got {config.system.profile}"
        raise UserError(f"system.profile: {got}, but {protocol} trains no network; leave it out")
    encoder = open_encoder(config, world)
    encoder.check_depths(config.depths)
    if config.system.compile:
        encoder.model.backbone.compile(dynamic=False)
    return encoder


def open_frozen_data(config: FrozenConfig, encoder: Encoder, world: World) -> EvalDatasets:
    """The datasets of such a protocol. Raises UserError where they or a depth are missing."""
    encoder.check_depths(config.depths)
    return open_datasets(config.data, config.labels, encoder)


def finish_frozen(
    protocol: str,
    config: FrozenConfig,
    encoder: Encoder,
    datasets: EvalDatasets,
    metrics: dict[str, dict],
    world: World,
) -> dict[str, Any]:
    """Write the record, draw the confusion matrices and return the record.

    metrics: dict by depth; each has top1 and confusion, a ConfusionMatrix, which becomes its
    picture's name. A picture that cannot be drawn costs a line and no result.
    """
    matrices = {depth: result["confusion"] for depth, result in metrics.items()}
    record = make_record(protocol, encoder, datasets.describe(), config, metrics)
    folder, key = results_folder(config), settings_key(record)
    for depth, result in metrics.items():
        result["confusion"] = f"confusion_{protocol}_{depth}_{key}.png"
    record = report(record, folder)
    for depth, result in metrics.items():
        title = f"{protocol} on {encoder.name}, {depth}: {result['top1']:.1%}"
        early = f", early stopping {result['best_top1']:.1%}" if "best_top1" in result else ""
        picture = folder / result["confusion"]
        world.say(f"{title}{early}; {picture}")
        try:
            draw_confusion(matrices[depth], picture, title, datasets.class_names)
        except Exception as error:  # of a full disk, of memory, of fonts: the result counts
            reason = " ".join(str(error).split()) or type(error).__name__
            world.say(f"{picture}: not drawn ({reason}); the result is recorded", sys.stderr)
    return record


def stop_if_asked(stop: StopSignal | None) -> None:
    """Raise Interrupted where a signal asked a command to stop that has nothing to save."""
    if stop is not None and stop.asked:
        raise Interrupted("evaluation: interrupted; run the same command again")
