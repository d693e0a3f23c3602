"""ffcv_ssl/command_line/words.json: all settings of all commands, for completion in a shell.

python -m benchmarks.readme writes it, and --check compares it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import evaluate
import train
import write_dataset
from ffcv_ssl import inspect
from ffcv_ssl.config import settings
from ffcv_ssl.config.messages import is_group, setting_types
from ffcv_ssl.jobs.chain_file import ChainFile
from ffcv_ssl.methods import find
from ffcv_ssl.monitor import __main__ as monitor
from ffcv_ssl.sources import FOLDERS
from pipelines import RECIPES
from pipelines import __main__ as views

FILE = Path(__file__).resolve().parent.parent / "ffcv_ssl/command_line/words.json"
Settings = dict[str, list[str]]


def text() -> str:
    """The content of the file."""
    return json.dumps(table(), indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n"


def table() -> dict[str, dict[str, Any]]:
    """{command: {"settings": {key: [value, ...]}}}; evaluate has "protocols", each with settings,
    and views has "words": the recipes."""
    protocols = {
        name: {"--config": [], **settings_of(command.config_class)}
        for name, command in evaluate.COMMANDS.items()
    }
    write = settings_of_parser(lambda: write_dataset.parse([]))
    write["--source"] = [*FOLDERS, "shapes", "cifar10", "cifar100", "stl10", "svhn"]
    draws = {"--config": [], **settings_of(views.GridConfig)}
    chain = {"--out": [], **settings_of(dict(setting_types(ChainFile))["slurm"], "--slurm.")}
    return {
        "write": {"settings": write},
        "train": {"settings": {"--config": [], "--print_config": [], **settings_of_training()}},
        "evaluate": {"protocols": protocols},
        "chain": {"settings": chain},
        "views": {"settings": draws, "words": [*RECIPES]},
        "inspect": {"settings": settings_of_parser(lambda: inspect.main([]))},
        "monitor": {"settings": settings_of_parser(lambda: monitor.main([]))},
        "demo": {"settings": {"--out": []}},
        "selftest": {"settings": {"--seconds": [], "--device": []}},
    }


def settings_of_training() -> Settings:
    """The trainer's settings, those of all methods here among them."""
    methods = {**train.METHODS, **find.library_methods()}
    config_class: type = train.Config
    for method in methods.values():
        config_class = find.with_settings(config_class, method)
    own = sorted(file.stem for file in settings._BACKBONES.glob("[!_]*.py"))
    return settings_of(config_class) | {
        "--method": [*methods],
        "--views.recipe": [*RECIPES],
        "--model.backbone": [*own, *settings._RESNETS],
    }


def settings_of(group: Any, prefix: str = "--") -> Settings:
    """{key: values it can have, if they are few} of a dataclass or TypedDict, deeply."""
    found: Settings = {}
    for name, kind in setting_types(group).items():
        inner = next((part for part in (kind, *get_args(kind)) if is_group(part)), None)
        if inner is not None and get_origin(inner) is not dict:
            found |= settings_of(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = values_of(kind)
    return found


def values_of(kind: Any) -> list[str]:
    """The values of a type that has few of them."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return [value for part in parts for value in values_of(part)]


def settings_of_parser(parse: Any) -> Settings:
    """The settings of an argparse parser that `parse` makes and calls."""
    made: list[argparse.ArgumentParser] = []

    def remember(parser: argparse.ArgumentParser, argv: Any) -> None:
        made.append(parser)
        raise StopIteration

    with mock.patch.object(argparse.ArgumentParser, "parse_args", remember):
        with contextlib.suppress(StopIteration):
            parse()
    return {
        option: [str(choice) for choice in action.choices or ()]
        for action in made[0]._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
