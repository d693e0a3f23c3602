"""What a command of evaluate.py is, and how it is found: by the name of its file.

Every module in the folders `protocols/` and `studies/` holds one command, called as the module, in
its constant `COMMAND`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command of evaluate.py: a protocol, or a study that calls protocols."""

    config_class: type
    """Frozen dataclass of its settings; the texts of its fields are the command's --help."""
    run: Callable[..., dict[str, Any]]
    """run(config, world, stop) -> record. Raises UserError for a user's mistake."""
    summary: str
    """One line for `evaluate.py --help`."""
    open_data: Callable[..., Any] | None = None
    """open_data(config, encoder, world) -> EvalDatasets, with which several checkpoints are checked
    before the first is measured. Raises UserError. None: the command opens no data."""
    resumes: bool = False
    """Whether the command finds out by itself what is finished, and goes on where it stopped."""


def find_commands(package: str, folders: Iterable[str]) -> dict[str, Command]:
    """The command of each module of a package (its name and its `__path__`), by the module's name,
    in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    return {name: importlib.import_module(f"{package}.{name}").COMMAND for name in names}
