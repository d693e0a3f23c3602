"""A user's own code, named in settings as `path/to/file.py:Class` or `package.module:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from types import ModuleType


def load_module(place: str) -> ModuleType:
    """The module before the colon: a file whose name ends in `.py`, or a module to import.

    A file runs once per process, with its folder first on the import path; a module may also lie
    below the current folder. Raises what the user's code and Python's own import raise.
    """
    if place.endswith(".py"):
        return _load_file(os.path.realpath(place))
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python train.py` puts only train.py's folder there
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
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
