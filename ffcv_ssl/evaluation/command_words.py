"""Settings as words of a command line, and back: several words after a key are a list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, get_origin, get_type_hints

from ffcv_ssl.config.plain import as_words
from ffcv_ssl.errors import UserError


def grouped(words: Iterable[str]) -> list[tuple[str, list[str]]]:
    """[(key, its values)] of `--key A B --other=C`. Raises UserError for a word without a key."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("--"):
            if key == "--checkpoint" and key in dict(groups):
                raise UserError("checkpoint: got it twice, expected one --checkpoint A B ...")
            groups.append((key, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"{word}: got no key before it, expected --key {word}")
    return groups


def with_lists(config_class: type, groups: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Words in which several values of a key, and one value where the dataclass has a list, are a
    YAML list: `--ks 1 20` becomes `--ks=[1, 20]`, for a protocol within a suite too."""
    words = []
    for key, values in groups:
        kind = kind_of(config_class, key)
        is_list = kind is list or (kind is dict and len(values) > 1)
        if is_list and not (values and values[0].startswith("[")):
            words.append(f"{key}=[{', '.join(values)}]")
        else:
            words += [key, *values]
    return words


def kind_of(config_class: type, key: str) -> Any:
    """The generic type of a dotted setting: list; dict for open settings and for all within them;
    None or another type for the rest."""
    kind: Any = config_class
    for name in key.removeprefix("--").split("."):
        if get_origin(kind) is dict:
            break
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return get_origin(kind)


def words_of(settings: dict[str, Any], config_class: type) -> list[str]:
    """A nested dict of settings as words of a command line, one value as a list where the
    dataclass has a list."""
    words = []
    for word in as_words(settings):
        key, _, text = word.partition("=")
        is_list = kind_of(config_class, key) is list and not text.startswith("[")
        words.append(f"{key}=[{text}]" if is_list else word)
    return words
