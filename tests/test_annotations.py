"""Public functions and methods say the types of what they take and return."""

import ast
from pathlib import Path

import pytest
from support.small_files import REPOSITORY

FOLDERS = ("ffcv_ssl", "pipelines")
SCRIPTS = ("train.py", "evaluate.py", "write_dataset.py", "demo.py")
# numba finds out the types of what these decorate
NUMBA = {"device", "inlined", "kernel", "njit", "jit", "vectorize", "intrinsic", "overload"}


def source_files():
    """Every module of the library and of the view recipes, and the scripts."""
    folders = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    return sorted([*folders, *(REPOSITORY / name for name in SCRIPTS)])


def decorator_name(node):
    """`kernel` of @kernel, @compile.kernel and @kernel(...)."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def public_functions(tree):
    """(qualified name, function, whether it is a method) of a module's public functions, and of the
    public methods and `__init__` of its public classes."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, functions) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if not isinstance(member, functions):
                    continue
                if member.name == "__init__" or not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member, True


def missing_annotations(function, is_method):
    """Names of the arguments without a type, and "return"."""
    names = {decorator_name(node) for node in function.decorator_list}
    if names & NUMBA:
        return []
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    if is_method and "staticmethod" not in names:
        positional = positional[1:]  # self or cls
    rest = [argument for argument in (spec.vararg, spec.kwarg) if argument is not None]
    arguments = [*positional, *spec.kwonlyargs, *rest]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing + ["return"] * (function.returns is None and function.name != "__init__")


def find_missing(path, root=REPOSITORY):
    """["file:line: name: arguments without a type", ...] of one file."""
    lines = []
    for name, function, is_method in public_functions(ast.parse(Path(path).read_text())):
        if missing := missing_annotations(function, is_method):
            where = f"{Path(path).relative_to(root)}:{function.lineno}"
            lines.append(f"{where}: {name}: {', '.join(missing)}")
    return lines


def test_public_functions_have_types():
    missing = [line for path in source_files() for line in find_missing(path)]
    assert not missing, "\n".join([f"{len(missing)} without types:", *missing])


@pytest.mark.parametrize(
    "text, missing",
    [
        ("def f(a: int, *, b): ...", "f: b, return"),
        ("def f(a, /, *args, **kwargs) -> None: ...", "f: a, args, kwargs"),
        ("class A:\n    def __init__(self, a): ...", "A.__init__: a"),
        ("class A:\n    @staticmethod\n    def f(a) -> int: ...", "A.f: a"),
        ("class A:\n    @property\n    def f(self): ...", "A.f: return"),
        ("def _f(a): ...\nclass _A:\n    def f(self): ...", None),
        ("@numba.njit(nogil=True)\ndef f(a): ...\n@kernel\ndef g(a): ...", None),
        ("class A:\n    def __init__(self): ...\n    def __len__(self): ...", None),
    ],
)
def test_what_has_no_type_is_named(tmp_path, text, missing):
    (tmp_path / "a.py").write_text(text)
    found = [line.split(": ", 1)[1] for line in find_missing(tmp_path / "a.py", tmp_path)]
    assert found == ([] if missing is None else [missing])
