"""A user's own code, named in settings as `path/to/file.py:Class` or `package.module:Class`.

It finds its own modules before the project's scripts: a user's train.py, evaluate.py or pipelines/,
or another library of such a name, is what `import` finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import ModuleType

from ffcv_ssl.config.app_files import app_folder, load_file

_NAMES = ("train", "evaluate", "write_dataset", "demo", "pipelines")


def load_module(place: str) -> ModuleType:
    """The module before the colon: a file whose name ends in `.py`, or a module to import.

    A file runs once per process, with its folder first on the import path; a module may also lie
    below the current folder. Raises what the user's code and Python's own import raise.
    """
    if place.endswith(".py"):
        path = os.path.realpath(place)
        name = f"user_code_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
        return load_file(name, path, _own_modules_first)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python train.py` puts only train.py's folder there
    with _own_modules_first():
        return importlib.import_module(place)


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
