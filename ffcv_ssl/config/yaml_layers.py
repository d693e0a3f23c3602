"""YAML files that build on one another.

`base: other.yaml`, or a list of files, names the files that a file builds on. Paths are relative to
the file that names them; a name that is no file there may be one of the project's configurations
(`base: simclr`). A later base overrides an earlier base; the file overrides all its bases.
Mappings are merged key by key, everything else is replaced. Numbers follow YAML 1.2: 1e-6 is a
number, 72:00:00 is text. `a.b: 1` means `a: {b: 1}`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from ffcv_ssl.config.app_files import find_config, similar_configs

BASE = "base"
MAX_DEPTH, MAX_VALUES = 32, 100_000
_TOO_DEEP = f"got more than {MAX_DEPTH} levels, one in another; expected fewer"
_TOO_MANY = f"got more than {MAX_VALUES} values, counting those of aliases; expected fewer"


def read_layers(path: str, builders: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A file and all files that it builds on: [(file, its own settings)]; later ones win.

    path: of a file, or the name of one of the project's configurations. builders: the chain of
    files that led to this file, in order. Raises ValueError, on one line, with the file and this
    chain.
    """
    path = path if builders else find_config(path)
    chain = (*builders, path)
    where = " (base of ".join(reversed(chain)) + ")" * len(builders)
    if any(Path(path).resolve() == Path(builder).resolve() for builder in builders):
        steps = " -> ".join(chain)
        raise ValueError(f"{builders[-1]}: base: {steps} is a circle; remove one of these bases")
    try:
        settings = _load(path)
        bases = _pop_bases(settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    paths = [os.path.normpath(find_config(base, Path(path).parent)) for base in bases]
    return [layer for base in paths for layer in read_layers(base, chain)] + [(path, settings)]


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings key by key into a new one; the last value of a key counts."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            if isinstance(value, dict):
                value = merge(before if isinstance(before, dict) else {}, value)
            merged[key] = value
    return merged


def _pop_bases(settings: dict[str, Any]) -> list[str]:
    bases = settings.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ValueError(f"base: got {bases!r}, expected a file or a list of files")
    return bases


def _load(path: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        raise ValueError(f"no such configuration file{similar_configs(path)}")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ValueError(f"got {got}, expected a mapping of settings")
    return nested(settings)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, with YAML 1.2's numbers. Raises ValueError, on one line."""
    try:
        return _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("got bytes that are not UTF-8, expected YAML") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_text(text: str) -> Any:
    """A single value from the text of a YAML file or command line; the text itself if it is not
    YAML."""
    try:
        return _parse(text)
    except yaml.YAMLError:
        return text


def _parse(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError, also where it is not of a sane size: a few
    lines of aliases can stand for billions of values."""
    try:
        content = yaml.load(text, _Loader)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # `!!int a`, 5,000 digits
        raise yaml.YAMLError(f"got a value that cannot be read ({error})") from None
    number, rest = 0, [(content, 0)]
    while rest:
        value, depth = rest.pop()
        number += 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(_TOO_DEEP)
        if number > MAX_VALUES:
            raise yaml.YAMLError(_TOO_MANY)
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            rest.extend((item, depth + 1) for item in inner)
    return content


def yaml_text(settings: dict[str, Any]) -> str:
    """Settings as YAML text. `read_yaml`, and readers of YAML 1.1, return the same settings."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings: `a.b: 1` becomes `a: {b: 1}`."""
    merged: dict[str, Any] = {}
    for key, value in settings.items():
        value = nested(value) if isinstance(value, dict) else value
        *groups, last = str(key).split(".")
        for name in (last, *reversed(groups)):
            value = {name: value}
        merged = merge(merged, value)
    return merged


class _Dumper(yaml.SafeDumper):
    """Safe YAML. Text that looks like a number of YAML 1.1 or 1.2 is quoted."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2's numbers, without dates; duplicate keys are errors."""

    depth = 0

    def compose_node(self, parent, index):
        """Parse a value and all in it; a deep one is refused before its inner parts are read."""
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise yaml.YAMLError(_TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_flow_collection_start(self, TokenClass):
        """Take a [ or {. It may begin a key, so up to 1,024 of them are taken before the first is
        composed, each at a cost that grows with the depth."""
        if self.flow_level > MAX_DEPTH:
            raise yaml.YAMLError(_TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected a word before ':'", key.start_mark
                )
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node):
        """Put the pairs of `<<: *other` into a mapping."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:  # before it multiplies once more
            raise yaml.YAMLError(_TOO_MANY)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)\Z",
    "tag:yaml.org,2002:float": r"([-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)"
    r"|\.nan)\Z",
}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
