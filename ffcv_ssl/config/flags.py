"""Settings that are true or false may stand alone on a command line: `--extend`, for true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass


def with_true(argv: Sequence[str], config_class: type) -> list[str]:
    """The words of a command line, with `=true` behind each setting of a dataclass that is a bool
    and has no value: the last word, or one before another `--key`."""
    flags = {f"--{name}" for name in _bool_settings(config_class)}
    following = [*argv[1:], "--"]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(argv, following)
    ]


def _bool_settings(config_class: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of type bool, those of groups included."""
    for field in fields(config_class):  # type: ignore[arg-type]
        if field.type in (bool, "bool"):
            yield prefix + field.name
        elif isinstance(field.default_factory, type) and is_dataclass(field.default_factory):
            yield from _bool_settings(field.default_factory, f"{prefix}{field.name}.")
