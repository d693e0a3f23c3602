"""Settings as plain data: nested dicts and lists, flat keys `a.b`, and differences of settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration (a dataclass) as nested dicts and lists, the form in YAML and checkpoints."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        for kind in (bool, int, float, str):  # PositiveInt and other types of the parser become int
            if isinstance(value, kind):
                return kind(value)
        return value

    return plain(asdict(config))


def config_differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free_keys: Collection[str] = (),
    free_groups: Collection[str] = (),
) -> list[str]:
    """The differences of two `config_dict`s, each as `key VALUE in the checkpoint, VALUE now`.

    Keys in `free_keys`, and keys that start with one of `free_groups`, may differ. A setting that
    is off now (None, False) and that `before` does not know yet is no difference.
    """
    before, now = flatten(before), flatten(now)
    free_groups = tuple(free_groups)
    return [
        f"{key} {_shown(before, key)} in the checkpoint, {_shown(now, key)} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and (key in before or now.get(key) is not False)
        and key not in free_keys
        and not key.startswith(free_groups)
    ]


def _shown(side: Mapping[str, Any], key: str) -> str:
    return repr(side[key]) if key in side else "not set"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a.b": value}; empty dicts are left out."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def flatten_as_text(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten`, with lists as JSON text, for the cells of a table."""
    flat = flatten(nested).items()
    return {key: json.dumps(v) if isinstance(v, list | tuple) else v for key, v in flat}


def as_words(nested: Mapping[str, Any]) -> list[str]:
    """Nested settings as words of a command line: `--a.b=value`; values other than text as JSON."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in flatten(nested).items()
    ]
