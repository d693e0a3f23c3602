"""A user's image ops in the settings of a view: `{op: my_ops.py:Posterize, args: {prob: 0.3}}`.

`op` is `path/to/file.py:Class` (relative to the working directory) or `package.module:Class`. A
file runs once per process, even if several views name it. Every mistake is a ValueError that starts
with `extra_ops[i]` and says what is expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffcv_ssl.config.user_code import load_module
from ffcv_ssl.transforms import ImageOp
from ffcv_ssl.transforms.base import check_op

_KEYS = ("op", "args", "before")


@dataclass(frozen=True)
class ExtraOp:
    """One entry: the class, its arguments, and the built-in op after it; None: it acts last."""

    op_class: type[ImageOp]
    arguments: Mapping[str, Any]
    before: str | None

    def make(self) -> ImageOp:
        return self.op_class(**self.arguments)


def parse_extra_ops(entries: Any, view_ops: tuple[str, ...]) -> list[ExtraOp]:
    """Parse a view's `extra_ops`; each op is made once as a check. view_ops: names for `before`."""
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"extra_ops: got {entries!r}, expected a list of {{op: file.py:Class}}")
    return [_parse(f"extra_ops[{i}]", entry, view_ops) for i, entry in enumerate(entries)]


def _parse(where: str, entry: Any, view_ops: tuple[str, ...]) -> ExtraOp:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("op"), str):
        raise ValueError(f"{where}: got {entry!r}, expected {{op: file.py:Class, args: {{...}}}}")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}, expected one of {', '.join(_KEYS)}")
    before, arguments = entry.get("before"), entry.get("args") or {}
    if before is not None and before not in view_ops[1:]:
        known = ", ".join(view_ops[1:])
        raise ValueError(f"{where}.before: got {before!r}, expected one of {known}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.args: got {arguments!r}, expected the op's arguments by name")
    extra = ExtraOp(_load_class(where, entry["op"]), arguments, before)
    try:
        check_op(extra.make())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {entry['op']}: {error}") from error
    return extra


def _load_class(where: str, target: str) -> type[ImageOp]:
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            f"{where}.op: got {target!r}, expected path/to/file.py:Class or package.module:Class"
        )
    try:
        module = load_module(place)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{where}.op: {place} cannot be imported: {reason}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, ImageOp):
        raise ValueError(f"{where}.op: {place} has no class {name} derived from ImageOp; define it")
    return found
