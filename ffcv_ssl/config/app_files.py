"""Where the project's scripts and configurations are, in a checkout and in an installed package.

In a checkout, and after an editable install, they are at the repository's top: train.py,
evaluate.py, write_dataset.py, demo.py, pipelines/ and configs/. setup.py puts the same files into a
wheel as `ffcv_ssl/app/`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

from ffcv_ssl.errors import UserError

COMMAND = "ffcv-ssl"
_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIXES = (".yaml", ".yml")


def is_installed() -> bool:
    """Whether the scripts are inside the package, as in a wheel."""
    return (_PACKAGE / "app").is_dir()


def app_folder() -> Path:
    """The folder of train.py, evaluate.py, write_dataset.py, demo.py, pipelines/ and configs/."""
    return _PACKAGE / "app" if is_installed() else _PACKAGE.parent


# ---- Scripts -------------------------------------------------------------------------------------


def load_script(name: str) -> ModuleType:
    """One of the scripts as a module, `ffcv_ssl_app_NAME`; it runs once per process.

    A user's own train.py, evaluate.py... and these scripts do not shadow one another: the scripts
    are loaded by their paths, and their folder is behind all others on the import path.
    """
    full_name = f"ffcv_ssl_app_{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    path = app_folder() / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{path}: no such script; run `pip install` for ffcv-ssl again")
    module = load_file(full_name, str(path))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a method of the user's may import from `train`
    return module


def load_file(
    name: str, path: str, within: Callable[[], AbstractContextManager[object]] = nullcontext
) -> ModuleType:
    """A file whose name ends in `.py`, as the module `name`. It runs once per process, with its
    folder first on the import path, in the context that `within` makes. Raises what it raises."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    # in sys.modules before it runs: there dataclasses look up the types of their fields
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(path)
    sys.path.insert(0, folder)
    try:
        with within():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module


def load_pipelines() -> None:
    """Import the package `pipelines`, which the scripts import, from its place."""
    folder = str(app_folder())
    sys.path.insert(0, folder)
    try:
        importlib.import_module("pipelines")
    finally:
        sys.path.remove(folder)


# ---- Configurations ------------------------------------------------------------------------------


def find_config(name: str, folder: str | Path = "") -> str:
    """The path of the YAML file that `name` stands for: a path from `folder`, or else the name of
    one of the project's configurations: `simclr`, `imagenette/cpu_simclr`, `configs/simclr.yaml`.

    A name of neither is returned as a path from `folder`.
    """
    path = os.path.normpath(Path(folder) / name) if folder else name
    if Path(path).is_file() or not name or "\0" in name:
        return path
    relative = Path(name.removeprefix("./").removeprefix("configs/"))
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        return path
    if relative.suffix not in _SUFFIXES:
        relative = relative.with_name(f"{relative.name}.yaml")
    found = _configs() / relative
    return _as_from_here(found) if found.is_file() else path


def similar_configs(name: str) -> str:
    """`; did you mean A or B?` for names of configurations that are like `name`, or nothing."""
    wanted = Path(name).with_suffix("").as_posix().removeprefix("configs/")
    names = config_names()
    same_end = [known for known in names if known.endswith(f"/{Path(wanted).name}")]
    close = same_end or difflib.get_close_matches(wanted, names, cutoff=0.7)
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def config_names() -> list[str]:
    """Names of the project's configurations, sorted: `demo`, `imagenette/cpu_simclr`..."""
    found = _configs().rglob("*.yaml")
    return sorted(path.relative_to(_configs()).with_suffix("").as_posix() for path in found)


def _configs() -> Path:
    return app_folder() / "configs"


def _as_from_here(path: Path) -> str:
    """A path as a user in the current folder would write it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# ---- Names of commands ---------------------------------------------------------------------------

_CALLED = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "write_dataset.py": "write",
    "demo.py": "demo",
    "chain": "chain",
    "python -m ffcv_ssl.inspect": "inspect",
    "python -m pipelines": "views",
    "python -m ffcv_ssl.monitor": "monitor",
    "selftest": "selftest",
}
is_command = [False]
"""Whether this process runs the command `ffcv-ssl`, for `shown_program`."""


def shown_program(script: str) -> str:
    """How the user calls a program, for its usage: `train.py`, or `ffcv-ssl train`."""
    for known, name in _CALLED.items():
        if is_command[0] and (script == known or script.startswith(f"{known} ")):
            return f"{COMMAND} {name}{script.removeprefix(known)}"
    return script
