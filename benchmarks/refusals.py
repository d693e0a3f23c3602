"""Finds, in the sources, every line with which the project refuses something, as a template.

A refusal is a `raise` of one of the classes below, a function that returns one, or a call that ends
a command with EXIT_USER_ERROR. Its template is the message with placeholders: `<path>: not a
regular file`. A local name, a parameter or a function of the project that stands in a message is
replaced by the texts that it may have, so that one `raise` may have several templates. A `raise`
that only passes on the text of another error has none.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.refusal_syntax import (
    CLOSE,
    OPEN,
    bind,
    blocks,
    called,
    has_words,
    is_name,
    is_text,
    loop_values,
    placeholder,
)

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("ffcv_ssl", "pipelines", "train.py", "evaluate.py", "write_dataset.py", "demo.py")
# Python's own classes that the library raises, beside those of ffcv_ssl/errors.py
OTHER_CLASSES = (
    "ValueError", "TypeError", "IndexError", "RuntimeError", "OSError", "ImportError",
    "AttributeError", "SampleError", "ArgumentTypeError", "ConstructorError",
)  # fmt: skip
ENDING = "EXIT_USER_ERROR"  # a call with this argument ends a command, its first argument is said
MAX_TEXTS = 40  # templates of one message
MAX_DEPTH = 4  # functions and names within one another
OPAQUE = ("in_words",)  # functions with too many answers


class Refusal(NamedTuple):
    """One template of one message."""

    template: str
    """With OPEN and CLOSE around the names of its placeholders."""
    file: str
    """Relative to the repository."""
    line: int
    """Where the error is made."""
    function: str
    """`Class.method` or the function's name."""
    error: str
    """The class's name; empty where a command ends without an exception."""
    condition: str
    """The nearest condition above it, as code; empty if there is none."""

    def shown(self) -> str:
        """The template for people: `<path>: not a regular file`."""
        return self.template.replace(OPEN, "<").replace(CLOSE, ">")

    def pieces(self) -> list[str]:
        """The fixed texts of the template that have a word, stripped."""
        parts = re.split(f"{OPEN}.*?{CLOSE}", self.template)
        return [part.strip() for part in parts if re.search(r"\w", part)]


def error_classes(root: Path = ROOT) -> set[str]:
    """Names of the classes whose `raise` is a refusal."""
    tree = ast.parse((root / "ffcv_ssl/errors.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | set(OTHER_CLASSES)


def find_refusals(root: Path = ROOT) -> list[Refusal]:
    """All refusals, in the order of files and lines."""
    project = Project(root)
    found = (refusal for module in project.modules for refusal in module.refusals())
    return sorted(dict.fromkeys(found), key=lambda refusal: (refusal.file, refusal.line))


class Project:
    """All modules, and their functions by name."""

    def __init__(self, root: Path) -> None:
        self.errors = error_classes(root)
        paths = [path for place in PLACES for path in _sources(root / place)]
        self.modules = [Module(self, path, str(path.relative_to(root))) for path in paths]
        self.functions: dict[str, list[Scope]] = defaultdict(list)
        for module in self.modules:
            for scope in module.scopes.values():
                if scope.node is not module.tree:
                    self.functions[scope.node.name].append(scope)


def _sources(place: Path) -> Iterable[Path]:
    return [place] if place.suffix == ".py" else sorted(place.rglob("*.py"))


class Module:
    """One file: its tree with parents, and a scope per function."""

    def __init__(self, project: Project, path: Path, name: str) -> None:
        self.project, self.name, self.tree = project, name, ast.parse(path.read_text())
        self.parents: dict[ast.AST, ast.AST] = {}
        self.scopes: dict[ast.AST, Scope] = {self.tree: Scope(self, self.tree)}
        self._scope_of: dict[ast.AST, Scope] = {}
        self._add(self.tree, self.scopes[self.tree])
        self.imported = {
            alias.asname or alias.name
            for node in self._scope_of
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ffcv_ssl")
            for alias in node.names
        }

    def _add(self, node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            self.parents[child], self._scope_of[child] = node, scope
            scope.own_nodes.append(child)
            if isinstance(child, ast.FunctionDef):
                self.scopes[child] = Scope(self, child)
                self._add(child, self.scopes[child])
            else:
                self._add(child, scope)

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self._scope_of if isinstance(node, ast.Call)]

    def scope_of(self, node: ast.AST) -> Scope:
        """The innermost function, or the module, that a node stands in."""
        return self._scope_of[node]

    def refusals(self) -> Iterator[Refusal]:
        for node in self._scope_of:
            for error, message in self._said(node):
                scope = self.scope_of(node)
                for text in scope.texts(message):
                    template = " ".join(text.split())
                    if has_words(template):
                        yield Refusal(
                            template, self.name, node.lineno, scope.name(), error,
                            self._condition(node),
                        )  # fmt: skip

    def _said(self, node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
        """(class or "", message) if this node refuses."""
        made = None
        if isinstance(node, ast.Raise):
            made = node.exc
        if isinstance(node, ast.Return):
            made = node.value
        if isinstance(made, ast.Call) and made.args:
            error = getattr(made.func, "attr", getattr(made.func, "id", ""))
            if error in self.project.errors:
                yield error, made.args[2 if error == "ConstructorError" else 0]
        if isinstance(node, ast.Call) and any(is_name(a, ENDING) for a in node.args[1:]):
            yield "", node.args[0]

    def _condition(self, node: ast.AST) -> str:
        """The code of the nearest `if`, `except` or `assert`-like test around a node."""
        child, above = node, self.parents.get(node)
        while above is not None and above not in self.scopes:
            if isinstance(above, ast.If):
                test = ast.unparse(above.test)
                return test if child in above.body else f"not ({test})"
            if isinstance(above, ast.ExceptHandler):
                return f"except {ast.unparse(above.type)}" if above.type else "except"
            child, above = above, self.parents.get(above)
        return ""


class Scope:
    """A function, or the top of a module: which texts its names and expressions may have."""

    def __init__(self, module: Module, node: ast.AST) -> None:
        self.module, self.node = module, node
        self.own_nodes: list[ast.AST] = []  # but not those in functions within it
        self.active: set[str] = set()  # names that are being looked up

    def name(self) -> str:
        """`Class.method`, or the name of a function."""
        parts, node = [], self.node
        while node is not self.module.tree:
            if hasattr(node, "name"):
                parts.append(node.name)
            node = self.module.parents[node]
        return ".".join(reversed(parts))

    @cached_property
    def parameters(self) -> list[str]:
        given = getattr(self.node, "args", None)
        return (
            [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]] if given else []
        )

    @cached_property
    def assigned(self) -> dict[str, list[ast.expr]]:
        """{name: expressions assigned to it}; of a tuple, those that are known one by one. Names of
        loops and of `except ... as` have none."""
        values: dict[str, list[ast.expr]] = defaultdict(list)
        for node in self.own_nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value:
                for target in getattr(node, "targets", None) or [node.target]:
                    bind(values, target, node.value)
            if isinstance(node, ast.For | ast.comprehension):
                for name in ast.walk(node.target):
                    if isinstance(name, ast.Name):
                        values.setdefault(name.id, [])
            if isinstance(node, ast.ExceptHandler) and node.name:
                values.setdefault(node.name, [])
        return values

    def values_at(self, name: ast.Name) -> list[ast.expr]:
        """The expressions that a name may have where it is used: back to the last assignment
        without a condition, if there is one."""
        values, found = self.assigned[name.id], []
        child: ast.AST | None = name
        while child not in (self.node, None):
            above = self.module.parents.get(child)
            if given := loop_values(above, name.id):
                return given
            block = next((b for b in blocks(above) if child in b), [])
            for before in reversed(block[: block.index(child)] if block else []):
                inside = set(ast.walk(before))
                found += [value for value in values if value in inside]
                if found and isinstance(before, ast.Assign) and found[-1] in inside:
                    return found
            child = above
        return values

    def texts(self, node: ast.expr, depth: int = 0) -> list[str]:
        """The texts that an expression may have, with placeholders."""
        if is_text(node):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values, depth)
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            texts = self._joined([node.left, node.right], depth)
            return texts if any(map(has_words, texts)) else [f"{OPEN}{placeholder(node)}{CLOSE}"]
        if isinstance(node, ast.BinOp) and is_text(node.left):  # `"s" * (count > 1)`
            return ["", *self.texts(node.left, depth)]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, depth) + self.texts(node.orelse, depth)
        if isinstance(node, ast.BoolOp):
            found = [text for value in node.values for text in self.texts(value, depth)]
            return found if any(map(has_words, found)) else found[:1]
        if depth < MAX_DEPTH:
            found = [text for text in self._looked_up(node, depth + 1) if text is not None]
            if any(map(has_words, found)):
                return list(dict.fromkeys(found))
        return [f"{OPEN}{placeholder(node)}{CLOSE}"]

    def _joined(self, parts: list[ast.expr], depth: int) -> list[str]:
        codes = [ast.dump(part) for part in parts]
        choices = {code: self.texts(part, depth) for code, part in zip(codes, parts)}
        picked = (dict(zip(choices, pick)) for pick in product(*choices.values()))
        texts = ["".join(pick[code] for code in codes) for pick, _ in zip(picked, range(MAX_TEXTS))]
        return texts

    def _looked_up(self, node: ast.expr, depth: int) -> list[str]:
        if isinstance(node, ast.Name):
            return self._of_name(node, depth)
        if isinstance(node, ast.Call):
            return self._of_returns(node, None, depth)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return self._of_item(node.value, node.slice.value, depth)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            return [text for value in node.value.values for text in self.texts(value, depth)]
        return []

    def _of_name(self, node: ast.Name, depth: int) -> list[str]:
        if node.id in self.active:
            return []
        self.active.add(node.id)
        try:
            if node.id in self.assigned:
                values = self.values_at(node)
                return [text for value in values for text in self.texts(value, depth)]
            if node.id in self.parameters:
                return self._of_parameter(node.id, depth)
        finally:
            self.active.remove(node.id)
        is_top = self.node is self.module.tree or node not in self.module.parents
        return [] if is_top else self.module.scope_of(self.node)._of_name(node, depth)

    def _of_parameter(self, name: str, depth: int) -> list[str]:
        """What callers in the same module pass for it, and its default."""
        place, texts = self.parameters.index(name), self._default(name)
        is_method = self.parameters[0] in ("self", "cls")
        for node in self.module.calls:
            # `library.decode(...)` is not the function `decode` of this module
            is_meant = is_method or isinstance(node.func, ast.Name)
            if is_meant and called(node) == getattr(self.node, "name", None):
                given = [k.value for k in node.keywords if k.arg == name]
                given = given or node.args[place - is_method :][:1]
                for value in given:
                    texts += self.module.scope_of(node).texts(value, depth)
        return texts

    def _default(self, name: str) -> list[str]:
        """The words that a parameter has by default; one word is a value, such as 'raise'."""
        given = self.node.args
        names = [a.arg for a in [*given.posonlyargs, *given.args]]
        pairs = [
            *zip(reversed(names), reversed(given.defaults)),
            *zip([a.arg for a in given.kwonlyargs], given.kw_defaults),
        ]
        texts = [node.value for key, node in pairs if key == name and node and is_text(node)]
        return [text for text in texts if " " in text]

    def _of_item(self, node: ast.expr, item: object, depth: int) -> list[str]:
        """One item of a tuple that a function of the project returns."""
        if isinstance(node, ast.Name):
            values = self.assigned.get(node.id, [])
            return [text for value in values for text in self._of_item(value, item, depth)]
        return self._of_returns(node, item, depth) if isinstance(node, ast.Call) else []

    def _of_returns(self, call: ast.Call, item: object, depth: int) -> list[str]:
        """What the project's functions of that name return, or one item of the tuples."""
        texts = []
        for scope in self._functions(call):
            for node in scope.own_nodes:
                if isinstance(node, ast.Return) and node.value is not None:
                    value = node.value
                    if isinstance(value, ast.Tuple) and isinstance(item, int):
                        value = value.elts[item]
                    if not isinstance(value, ast.Tuple):
                        texts += scope.texts(value, depth)
        return [text for text in texts if has_words(text)]

    def _functions(self, call: ast.Call) -> list[Scope]:
        """The functions that a call may mean: of this file, or else of any file."""
        name = called(call)
        found = [] if name in OPAQUE else self.module.project.functions.get(name, [])
        own = [scope for scope in found if scope.module is self.module]
        is_known = isinstance(call.func, ast.Attribute) or name in self.module.imported
        return own or (found if is_known else [])
