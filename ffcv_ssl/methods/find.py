"""Methods by name: a file of this folder, or a class of the user's.

    find_method("moco")                              # ffcv_ssl/methods/moco.py
    find_method("path/to/mine.py:MyMethod")
    find_method("my_package.my_module:MyMethod")     # importable from the current folder, too

Guarantees: a mistake in a name or in a user's file is a UserError of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from ffcv_ssl import methods
from ffcv_ssl.config import user_code
from ffcv_ssl.config.parsing import given_value
from ffcv_ssl.errors import UserError
from ffcv_ssl.methods.base import Method

_FOLDER = Path(methods.__file__).parent
_FORMS = "path/to/file.py:Class, or package.module:Class"


@functools.cache
def library_methods() -> dict[str, type[Method]]:
    """The methods of this folder by name."""
    found = {}
    for file in sorted(_FOLDER.glob("[!_]*.py")):
        module = importlib.import_module(f"{methods.__name__}.{file.stem}")
        classes = _methods_in(module)
        if len(classes) == 1 and Method not in classes:
            found[file.stem] = classes[0]
    return found


@functools.cache
def find_method(name: str, others: tuple[str, ...] = ()) -> type[Method]:
    """The class of a method. others: names that are known elsewhere, for the error's list. Raises
    UserError for a name without a method, and for a class that cannot be used."""
    if ":" not in name:
        found = library_methods()
        if name not in found:
            known = ", ".join([*others, *found])
            raise UserError(f"method: got {name!r}, expected one of {known}; or {_FORMS}")
        return found[name]
    place, _, class_name = name.rpartition(":")
    module = _load(place)
    method = getattr(module, class_name, None)
    if method is None:
        there = ", ".join(c.__name__ for c in _methods_in(module)) or "none"
        raise UserError(f"{place}: no class {class_name!r}; methods in it: {there}")
    _check(name, method)
    return method


def source_digest(method: type[Method]) -> str:
    """A digest (16 hex digits) of the file with a method's class: equal for equal source."""
    text = Path(inspect.getfile(method)).read_bytes()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def with_settings(config_class: type, method: type[Method]) -> type:
    """A configuration's dataclass, with the method's group of settings, which is added if missing.
    Raises UserError where the group's name is taken."""
    if method.Settings is None:
        return config_class
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if method.group in fields:
        if fields[method.group].default_factory is method.Settings:
            return config_class
        where = f"{inspect.getfile(method)}: {method.__name__}.group"
        raise UserError(f"{where}: got {method.group!r}, a name that is taken; choose another")
    group = (method.group, method.Settings, dataclasses.field(default_factory=method.Settings))
    namespace = {"__doc__": config_class.__doc__, "__module__": config_class.__module__}
    return dataclasses.make_dataclass(
        config_class.__name__, [group], bases=(config_class,), namespace=namespace, frozen=True
    )


def groups_of_others(method: type[Method], others: Mapping[str, type[Method]]) -> set[str]:
    """Names of the groups of settings that a method does not read: the groups of `others` and of
    all methods here."""
    known = [*others.values(), *library_methods().values()]
    return {other.group for other in known if other.Settings is not None} - {method.group}


def settings_for(
    argv: Sequence[str], config_class: Any, known: Mapping[str, type[Method]]
) -> tuple[Any, set[str]]:
    """(the dataclass with the group of the method that a command line names, names of the groups of
    other plugins, which its files may have and nobody reads). known: methods besides those here.
    Raises UserError, naming the file at fault."""
    name, file = given_value(argv, "method", config_class.method)
    try:
        method = known.get(str(name)) or find_method(str(name), tuple(known))
        config_class = with_settings(config_class, method)
    except UserError as error:
        raise UserError(f"{file}: {error}" if file else f"{error}") from None
    read = {group.name for group in dataclasses.fields(config_class)}
    return config_class, groups_of_others(method, known) - read


def _methods_in(module: ModuleType) -> list[type[Method]]:
    """Method classes that a module defines itself."""
    return [
        value
        for value in vars(module).values()
        if _is_method(value) and value.__module__ == module.__name__
    ]


def _is_method(value: Any) -> TypeGuard[type[Method]]:
    """Whether a value is a class of methods. issubclass fails for `list[int]`, which Python 3.10
    takes for a class."""
    return Method in getattr(value, "__mro__", ())


def _load(place: str) -> ModuleType:
    """The module that a user's method stands in. Raises UserError."""
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UserError(f"method: no file '{place}'; expected {_FORMS}")
    try:
        return user_code.load_module(place)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and not is_file else None
        if missing is not None and f"{place}.".startswith(f"{missing}."):
            raise UserError(f"method: no module '{place}'; expected {_FORMS}") from None
        raise UserError(_import_error(place, error)) from error


def _import_error(where: str, error: Exception) -> str:
    """`FILE:LINE: what` of an error in a user's file. The line is the last one outside Python's own
    import code."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = (__file__, user_code.__file__)
    outside = [f for f in frames if "importlib" not in f.filename and f.filename not in own]
    return f"{outside[-1].filename}:{outside[-1].lineno}: {what}" if outside else f"{where}: {what}"


def _check(name: str, method: type) -> None:
    """Raise UserError for a class that is no method, or whose settings cannot be read."""
    if not _is_method(method):
        raise UserError(f"{name}: got no Method, expected a subclass of ffcv_ssl.methods.Method")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise UserError(f"{name}: got a Method without {missing}; define it")
    settings = method.Settings
    if settings is None:
        return
    if not method.group.isidentifier():
        raise UserError(f"{name}: group: got {method.group!r}, expected a name such as 'mine'")
    parameters = getattr(settings, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise UserError(f"{name}: Settings: got {settings!r}, expected a frozen dataclass")
    try:
        settings()
    except TypeError as error:
        raise UserError(f"{name}: Settings: {error}; give every field a default") from None
