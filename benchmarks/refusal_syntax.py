"""Questions about pieces of Python's syntax, for `refusals.py`: what is called, bound, shown."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

# What stands in a message is shown by its name between these two.
OPEN, CLOSE = "\x01", "\x02"
_TEXT_OF = ("str", "repr", "one_line", "list", "tuple", "sorted", "map", "set", "float", "int")


def loop_values(node: ast.AST | None, name: str) -> list[ast.expr]:
    """The values of a name of a loop over a literal list or tuple; else nothing."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Tuple | ast.List):
        return []
    values: dict[str, list[ast.expr]] = defaultdict(list)
    for row in node.iter.elts:
        bind(values, node.target, row)
    return values.get(name, [])


def blocks(node: ast.AST | None) -> list[list]:
    """The lists of statements in a statement."""
    parts = (getattr(node, part, None) for part in ("body", "orelse", "finalbody"))
    return [part for part in parts if isinstance(part, list)]


def bind(values: dict[str, list[ast.expr]], target: ast.expr, value: ast.expr) -> None:
    """Add to `values` what an assignment gives each name of its target, part by part of a tuple."""
    if isinstance(target, ast.Name):
        values[target.id].append(value)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for part, its_value in zip(target.elts, value.elts):
            bind(values, part, its_value)
    elif isinstance(target, ast.Tuple):
        for index, part in enumerate(target.elts):
            item = ast.Subscript(value, ast.Constant(index), ast.Load())
            bind(values, part, item)


def is_text(node: ast.AST) -> bool:
    """Whether an expression is a literal text."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def called(node: ast.Call) -> str:
    """The name of the function or method that is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def is_name(node: ast.AST, name: str) -> bool:
    """Whether an expression is that name."""
    return isinstance(node, ast.Name) and node.id == name


def has_words(text: str) -> bool:
    """Whether a template has a fixed word of three letters."""
    return bool(re.search("[A-Za-z]{3}", re.sub(f"{OPEN}.*?{CLOSE}", "", text)))


def placeholder(node: ast.expr) -> str:
    """A short name for a part of a message: of what is shown there."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return "type" if node.attr == "__name__" else node.attr.strip("_")
    if isinstance(node, ast.BinOp):
        return _in_short(node)
    if isinstance(node, ast.Call):
        name = called(node)
        if name == "len":
            return "number"
        if name == "getattr" and is_text(node.args[1]):
            return node.args[1].value
        if name in (*_TEXT_OF, "join", "removeprefix") and (node.args or name == "removeprefix"):
            base = node.func.value if name == "removeprefix" else node.args[-1]
            return placeholder(base)
        return name.strip("_").removesuffix("_for") or "..."
    if isinstance(node, ast.Starred | ast.FormattedValue | ast.Subscript):
        return placeholder(node.value)
    return "..."


def _in_short(node: ast.BinOp) -> str:
    """A sum or the like, if it is of names and numbers: `num_samples - 1`."""
    parts = {ast.Sub: "-", ast.Add: "+", ast.Mult: "*"}
    sides = [
        str(side.value) if isinstance(side, ast.Constant) else placeholder(side)
        for side in (node.left, node.right)
    ]
    sign = parts.get(type(node.op))
    return "..." if sign is None or "..." in sides else f"{sides[0]} {sign} {sides[1]}"
