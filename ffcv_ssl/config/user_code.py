"""A user's own code, named in settings as `path/to/file.py:Class` or `package.module:Class`.

It finds its own modules before the project's scripts: a user's train.py, evaluate.py or pipelines/,
or another library of such a name, is what `import` finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import ModuleType

from ffcv_ssl.config.app_files import app_folder

_NAMES = ("train", "evaluate", "write_dataset", "demo", "pipelines")


def load_module(place: str) -> ModuleType:
    """The module before the colon: a file whose name ends in `.py`, or a module to import.

    A file runs once per process, with its folder first on the import path; a module may also lie
    below the current folder. Raises what the user's code and Python's own import raise.
    """
    if place.endswith(".py"):
        return _load_file(os.path.realpath(place))
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python train.py` puts only train.py's folder there
    with _own_modules_first():
        return importlib.import_module(place)


def _load_file(path: str) -> ModuleType:
    name = f"user_code_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    # in sys.modules before it runs: there dataclasses look up the types of their fields
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(path)
    sys.path.insert(0, folder)
    try:
        with _own_modules_first():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module


@contextlib.contextmanager
def _own_modules_first() -> Iterator[None]:
    """Within the block the user's modules win over the project's scripts of the same names."""
    folder = str(app_folder())
    if folder in sys.path:
        sys.path.remove(folder)
        sys.path.append(folder)
    others = [path for path in sys.path if path != folder]
    hidden: dict[str, ModuleType] = {}
    for name in _NAMES:
        spec = PathFinder.find_spec(name, others) if name in sys.modules else None
        if spec is not None and spec.origin not in (None, sys.modules[name].__file__):
            hidden |= _pop(name)
    try:
        yield
    finally:
        for name in {module.partition(".")[0] for module in hidden}:
            _pop(name)
        sys.modules.update(hidden)


def _pop(name: str) -> dict[str, ModuleType]:
    """Take a module and all below it out of the loaded ones."""
    names = [key for key in sys.modules if key == name or key.startswith(f"{name}.")]
    return {key: sys.modules.pop(key) for key in names}
