"""Calls of protocols for several checkpoints, or from a study.

A call's settings are checked, and every checkpoint is opened, before the first one is measured;
what is on record with the same settings is not measured again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.renamed import rename, say_notes
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.command_words import words_of
from ffcv_ssl.evaluation.encoder import Encoder, load_encoder, says_architecture
from ffcv_ssl.evaluation.former_names import RENAMED
from ffcv_ssl.evaluation.protocol_run import open_encoder
from ffcv_ssl.evaluation.protocol_settings import Architecture
from ffcv_ssl.evaluation.protocols import PROTOCOLS
from ffcv_ssl.evaluation.results import (
    checkpoint_folder,
    make_record,
    read_results,
    results_folder,
    settings_key,
)
from ffcv_ssl.training.command import StopSignal
from ffcv_ssl.training.world import World


def protocol_config(
    protocol: str, settings: dict[str, Any], where: str = "settings", **fixed: Any
) -> Any:
    """The dataclass of a protocol, filled from `settings` (nested dict), with the fields `fixed`.

    One value where the protocol has a list is a list of it, as on the command line. Raises
    UserError, naming the setting as one of `where`, for a setting that the protocol does not have
    or take, and for one that is among the fixed.
    """
    settings, notes = rename(settings, RENAMED)
    say_notes(notes, f"{where} of {protocol}")
    for name in fixed:
        if name in settings:
            raise UserError(f"{where}.{name}: got it here, expected it as --{name}")
    try:
        config: Any
        config_class = PROTOCOLS[protocol].config_class
        config, _ = parse_config(config_class, words_of(settings, config_class), protocol, "")
    except UserError as error:
        raise UserError(f"{where} of {protocol}: {error}") from None
    return replace(config, **fixed)


def checked(protocol: str, calls: Iterable[Any], world: World) -> list[tuple[Any, dict | None]]:
    """[(configuration, what it measures on)] of several checkpoints, of which none is measured
    before all have been opened. Raises as `load_encoder` and the protocol's `open_data`.

    What it measures on: {val, val_content, label_field}; None for a command without data.
    """
    found = []
    open_data = PROTOCOLS[protocol].open_data
    for call, encoder in opened(calls):
        measured_on = None
        if open_data is not None:
            datasets = open_data(call, encoder, world)
            measured_on = {
                "val": datasets.val.path,
                "val_content": datasets.val.describe(),
                "label_field": datasets.loading.label_field,
            }
        found.append((call, measured_on))
    return found


def opened(calls: Iterable[Any]) -> Iterator[tuple[Any, Encoder]]:
    """Yield each configuration with its encoder on the CPU; none is kept.

    Among several checkpoints, `model` holds for those that do not say what they are; the others
    have it removed. Raises as `load_encoder`.
    """
    calls = list(calls)
    are_several = len({call.checkpoint for call in calls}) > 1
    for path, same in itertools.groupby(calls, key=lambda call: call.checkpoint):
        first, *more = same
        model = first.model
        if are_several and model.backbone and says_architecture(path):
            model = Architecture()
        encoder = load_encoder(path, model.resolve())
        for call in (first, *more):
            yield replace(call, model=model), encoder


def call_protocol(
    protocol: str, config: Any, world: World, stop: StopSignal | None
) -> dict[str, Any]:
    """Run a protocol, or return the newest record of the same weights, data, labels and settings,
    as they are in the files now, from its folder or the checkpoint's. Raises as the protocol."""
    command = PROTOCOLS[protocol]
    folders = dict.fromkeys([checkpoint_folder(config.checkpoint), results_folder(config)])
    records = [record for folder in folders for record in read_results(folder)]
    known = [record for record in records if record.get("protocol") == protocol]
    if known and command.open_data is not None and not command.resumes:
        encoder = open_encoder(config, world)
        data = command.open_data(config, encoder, world).describe()
        asked = settings_key(make_record(protocol, encoder, data, config, {}))
        same = [record for record in known if settings_key(record) == asked]
        if same:
            world.say(f"{protocol} on {encoder.name}: measured before, at {same[-1]['time']}")
            return same[-1]
    return command.run(config, world, stop)


def check_paths(checkpoints: Iterable[str]) -> None:
    """Raise UserError for a checkpoint that is not there: the folder around it may be a run too."""
    for path in checkpoints:
        if not Path(path).exists():
            raise UserError(f"checkpoint: no file or folder '{path}'; give a run's folder or file")
