"""Renamed settings: the old name works for one release, with a note on stderr.

A configuration dataclass lists its old names in `RENAMED`, and `parse_config` applies the list:

    RENAMED: ClassVar[Table] = {"layer": NewName("depth", depth_of_layer), "a.b": "a.c"}

    rename(["--layer", "1"], RENAMED)   # (["--depth", "projector_1"], ["layer is now depth; ..."])
    rename({"layer": 1}, RENAMED)       # ({"depth": "projector_1"}, ["layer is now depth; ..."])
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ffcv_ssl.errors import UserError


class NewName(NamedTuple):
    """A setting's new dotted name, and how to convert an old value."""

    name: str
    convert: Callable[[Any], Any]
    """Converts a value from YAML, or its text on a command line. Groups are left alone."""


Table = Mapping[str, NewName | str]
"""Old dotted name -> new name. The name of a group stands for all settings in it."""


def rename(settings: Any, table: Table) -> tuple[Any, list[str]]:
    """Settings under their new names, and a note for each old name that was found.

    settings: nested dict, or list of words of a command line (`--a.b 1`, `--a.b=1`); not modified.
    Raises UserError for a dict that has both names of a setting.
    """
    change = _rename_keys if isinstance(settings, dict) else _rename_words
    notes = []
    for old, new in table.items():
        name, convert = new if isinstance(new, NewName) else (new, _same)
        settings, is_found = change(settings, old, name, convert)
        if is_found:
            notes.append(f"{old} is now {name}; the old name works for one release")
    return settings, notes


@functools.cache
def say_once(line: str) -> None:
    """Print a line on stderr, once per process and only in the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def say_notes(notes: Iterable[str], where: str = "") -> None:
    """Print the notes of `rename`. where: the file of the settings; empty for a command line."""
    for note in notes:
        say_once(f"note: {where}: {note}" if where else f"note: --{note}")


def _rename_words(words, old, new, convert):
    renamed, is_found, is_value = [], False, False
    for word in words:
        key, equals, value = word.partition("=")
        if is_value and not word.startswith("--"):
            word = convert(word)
        is_value = key == f"--{old}" and not equals
        if key == f"--{old}" or key.startswith(f"--{old}."):
            is_found = True
            word = f"--{new}{key.removeprefix(f'--{old}')}"
            word += f"={convert(value)}" if equals else ""
        renamed.append(word)
    return renamed, is_found


def _rename_keys(settings, old, new, convert):
    *groups, last = old.split(".")
    settings, group = _copied(settings, groups)
    if group is None or last not in group:
        return settings, False
    if isinstance(group[last], dict) and convert is not _same:
        return settings, False  # another setting's group, for example of another command
    value = convert(group.pop(last))
    *groups, last = new.split(".")
    settings, target = _copied(settings, groups, missing={})
    if target is None or last in target:
        raise UserError(f"{old}: got both {old} and its new name {new}; leave out {old}")
    target[last] = value
    return settings, True


def _copied(settings, groups, missing=None):
    """(a copy of a nested dict, the dict at `groups` in that copy, or None).

    missing: used in place of a missing group.
    """
    settings = dict(settings)
    group = settings
    for name in groups:
        if not isinstance(group.get(name, missing), dict):
            return settings, None
        group[name] = dict(group.get(name, missing))
        group = group[name]
    return settings, group


def _same(value):
    return value
