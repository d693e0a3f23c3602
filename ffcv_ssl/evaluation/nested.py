"""Protocols that are called for several checkpoints, or by other protocols: their settings, what is
wrong with the last one before the first is measured, and what is already on record."""

from __future__ import annotations

import json
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_origin, get_type_hints

from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import flatten_as_text
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.common import (
    Architecture,
    open_encoder,
    open_pair,
    results_folder,
    with_fields,
)
from ffcv_ssl.evaluation.encoder import load_encoder, says_architecture
from ffcv_ssl.evaluation.protocols import PROTOCOLS
from ffcv_ssl.evaluation.results import make_record, read_results, settings_key
from ffcv_ssl.evaluation.tuning_run import check_layer, open_task

MAIN_METRICS = ("top1", "map")
RESUMED = ("finetune", "transfer")  # they find out by themselves what is finished


def protocol_config(protocol, settings, where="settings", **fixed):
    """The dataclass of a protocol, filled from `settings` (nested dict), with the fields `fixed`.

    One value where the protocol has a list is a list of it, as on the command line. Raises
    UserError for a setting that it does not have or take, named as one of `where`, and for one that
    is among the fixed.
    """
    for name in fixed:
        if name in settings:
            raise UserError(f"{where}.{name}: set it outside, as --{name}")
    try:
        config_class = PROTOCOLS[protocol][0]
        config, _ = parse_config(config_class, words_of(settings, config_class), protocol, "")
    except UserError as error:
        raise UserError(f"{where} of {protocol}: {error}") from None
    return replace(config, **fixed)


def checked(calls, world):
    """[(configuration, what it measures on)] of several checkpoints, of which none is measured
    before all have been opened. Raises as `load_encoder` and `open_data`.

    What it measures on: {val, val_content, label_field}; None for an export.
    """
    found = []
    for call, encoder in opened(calls):
        measured_on = None
        if hasattr(call, "data"):
            pair = open_data(call, encoder, world)
            measured_on = {
                "val": pair.val.path,
                "val_content": pair.val.describe(),
                "label_field": pair.loading.label_field,
            }
        found.append((call, measured_on))
    return found


def opened(calls):
    """Yield each configuration with its encoder on the CPU; none is kept.

    Of several checkpoints, those that say what they are are taken as that, and `model` holds for
    the others. Raises as `load_encoder`.
    """
    are_several = len({call.checkpoint for call in calls}) > 1
    path = encoder = model = None
    for call in calls:
        if call.checkpoint != path:
            path, encoder, model = call.checkpoint, None, call.model
            if are_several and model.backbone and says_architecture(path):
                model = Architecture()
            encoder = load_encoder(path, model.resolve())
        yield replace(call, model=model), encoder


def open_data(config, encoder, world):
    """The datasets, a Pair, of a probe or a fine-tuning. Raises UserError where they, or the depth
    of the encoder that is asked for, are not there."""
    if hasattr(config, "depths"):
        encoder.check_depths(config.depths)
        return open_pair(config.data, config.labels, encoder)
    check_layer(encoder, config.layer)
    config = replace(config, data=with_fields(config.data, encoder))
    return open_task(config, encoder, world).pair


def call(protocol, config, world, stop):
    """Run a protocol; or return the newest record of the same weights, data, labels and settings,
    as they are in the files now, from its folder or the checkpoint's. Raises as the protocol."""
    folders = dict.fromkeys([run_folder(config.checkpoint), results_folder(config)])
    records = [record for folder in folders for record in read_results(folder)]
    known = [record for record in records if record.get("protocol") == protocol]
    if known and protocol not in RESUMED:
        encoder = open_encoder(config, world)
        data = open_pair(config.data, config.labels, encoder).describe()
        asked = settings_key(make_record(protocol, encoder, data, config, {}))
        same = [record for record in known if settings_key(record) == asked]
        if same:
            world.say(f"{protocol} on {encoder.name}: on record since {same[-1]['time']}")
            return same[-1]
    return PROTOCOLS[protocol][1](config, world, stop)


def main_metric(metrics, name=None):
    """(name, value) of one number of nested metrics: `name`, its parts joined by dots, or the first
    top1 or map. Raises UserError where it is not there."""
    flat = {
        key: value
        for key, value in flatten_as_text(metrics).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if name is None:
        name = next((key for key in flat if key.rsplit(".", 1)[-1] in MAIN_METRICS), None)
    if name not in flat:
        known = ", ".join(key for key in flat if "per_class" not in key) or "none"
        raise UserError(f"metric: got {name!r}, expected one of {known}")
    return name, flat[name]


def accuracies(metrics, prefix=""):
    """{name, its parts joined by dots: value} of every top1 and map of nested metrics, each once.

    k-NN and inference have their settings by name within a depth, and the first one's accuracy as
    the depth's own: of one setting the depth's is taken, of several their own.
    """
    settings = {key: value for key, value in metrics.items() if isinstance(value, dict)}
    inner = {}
    for key, value in settings.items():
        inner |= accuracies(value, f"{prefix}{key}.")
    own = {prefix + key: metrics[key] for key in MAIN_METRICS if metrics.get(key) is not None}
    return own if own and len(settings) < 2 else inner or own


def run_folder(checkpoint):
    """The folder of the run that a checkpoint belongs to."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def check_paths(checkpoints):
    """Raise UserError for a checkpoint that is not there: the folder around it may be a run too."""
    for path in checkpoints:
        if not Path(path).exists():
            raise UserError(f"checkpoint: no file or folder '{path}'; give a run's folder or file")


def kind_of(config_class, key):
    """What a dotted setting of a dataclass is: list, dict where it is left open or within one that
    is, or another or no generic type."""
    kind = config_class
    for name in key.removeprefix("--").split("."):
        if get_origin(kind) is dict:
            break
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return get_origin(kind)


def words_of(settings, config_class=None):
    """A nested dict of settings as words of a command line, one value as a list where the
    dataclass has one."""
    words = []
    for key, value in flatten_as_text(settings).items():
        text = value if isinstance(value, str) else json.dumps(value)
        if kind_of(config_class, key) is list and not text.startswith("["):
            text = f"[{text}]"
        words.append(f"--{key}={text}")
    return words
