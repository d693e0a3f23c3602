"""One-line messages for wrong settings: the key, the value given, what the type expects.

The types come from the dataclasses, so that no message depends on a parser's words.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ffcv_ssl.config.yaml_layers import read_text

_BOUNDS = {
    operator.gt: "above",
    operator.ge: "of at least",
    operator.lt: "below",
    operator.le: "of at most",
}


def one_line(error: BaseException | str) -> str:
    """An error's text on one line. What no terminal can show, as a file's name may hold it, is
    escaped."""
    text = " ".join(str(error).split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_mistake(kind: Any, value: Any, key: str = "") -> str | None:
    """`key: got VALUE, expected ...` for the first value in nested settings that does not fit its
    type, or whose key is unknown; None if all values fit.

    kind: a dataclass, or the type of the setting `key`. A text also fits if YAML would read it as a
    fitting value, as on a command line.
    """
    if get_origin(kind) in (Union, UnionType):  # a group or null
        kind = next(filter(is_group, get_args(kind)), kind) if isinstance(value, dict) else kind
    if value and is_group(kind) and isinstance(value, str):
        value = read_text(value)
    if not is_group(kind) or not isinstance(value, dict):
        if _fits(kind, value):
            return None
        got = repr(read_text(value) if isinstance(value, str) else value)
        return f"{key}: got {'nothing' if value == '' else got}, expected {in_words(kind)}"
    types = setting_types(kind, value)
    for name, item in value.items():
        if name not in types:
            return f"{key}: unknown key {name!r}" if key else f"unknown key {name!r}"
        if mistake := find_mistake(types[name], item, f"{key}.{name}" if key else name):
            return mistake
    return None


def setting_types(group: Any, names: Iterable[str] = ()) -> dict[str, Any]:
    """{name: type} of the settings in a dataclass or TypedDict; for `dict[str, X]`, of `names`."""
    if get_origin(group) is dict:
        return dict.fromkeys(names, get_args(group)[1])
    try:
        types = get_type_hints(group)
    except NameError:  # a dataclass made at run time has types that its module does not know
        types = {}
    if not is_dataclass(group):
        return types
    return {field.name: types.get(field.name, field.type) for field in fields(group)}


def in_words(kind: Any) -> str:
    """A type in words: `a whole number above 0`, `text or null`, `a list, each a number`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, parts))
    if origin is tuple and Ellipsis not in parts:
        each = " and ".join(dict.fromkeys(map(in_words, parts)))
        return f"a list of {len(parts)}, each {each}"
    if origin in (list, tuple):
        return f"a list, each {in_words(parts[0])}"
    if kind is dict or is_group(kind):
        return "a mapping of settings"
    if isinstance(kind, type) and issubclass(kind, int | float) and kind is not bool:
        return _number_in_words(kind)
    names = {bool: "true or false", str: "text", NoneType: "null", Any: "any value"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))


def _number_in_words(kind: type) -> str:
    """A bounded jsonargparse type in words: `a number of at least 0 and of at most 1`."""
    bounds: Iterable[tuple] = getattr(kind, "_restrictions", ())
    limits = [f"{_BOUNDS[compare]} {limit}" for compare, limit in bounds if compare in _BOUNDS]
    words = ["a whole number" if issubclass(kind, int) else "a number", " and ".join(limits)]
    return " ".join(filter(None, words))


def is_group(kind: Any) -> bool:
    """Whether a type is a group of settings: a dataclass, a TypedDict, or `dict[str, X]`."""
    return is_dataclass(kind) or is_typeddict(kind) or get_origin(kind) is dict


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value, or a text as YAML reads it, is of a type. True for types not known here: the
    parser checks them."""
    if isinstance(value, str):
        read = read_text(value)
        return _fits_as_it_is(kind, value) or (read != value and _fits_as_it_is(kind, read))
    return _fits_as_it_is(kind, value)


def _fits_as_it_is(kind: Any, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if origin in (list, tuple):
        if origin is list or Ellipsis in parts:
            parts = parts[:1] * len(value) if isinstance(value, list | tuple) else parts
        same_length = isinstance(value, list | tuple) and len(value) == len(parts)
        return same_length and all(map(_fits, parts, value))
    if is_group(kind):
        return isinstance(value, dict) and find_mistake(kind, value) is None
    return _fits_plain(kind, value)


def _fits_plain(kind: Any, value: Any) -> bool:
    if not isinstance(kind, type):
        return True
    if hasattr(kind, "_restrictions"):
        try:
            return kind(value) is not None
        except (ValueError, TypeError, OverflowError):
            return False
    if kind in (int, float):
        kinds = (int,) if kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return kind not in (bool, str, NoneType) or isinstance(value, kind)
