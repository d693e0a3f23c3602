"""A digest of an op class: of its file, and of all compiled code that its functions reach.

Kernels with users' ops are cached on disk under this digest. So an edited op, an edited helper in
another file, or another value of a constant that numba has frozen into the code gives another
digest, and never an old kernel. The library's own sources are digested in kernels/compile.py.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from ffcv_ssl.transforms.base import FUNCTION_ARGUMENTS, ImageOp

_DIGESTS: dict[type[ImageOp], str] = {}


def digest_of(op_class: type[ImageOp]) -> str:
    """16 hexadecimal digits, the same in every process that has the same code."""
    if op_class not in _DIGESTS:
        _DIGESTS[op_class] = _digest_class(op_class)
    return _DIGESTS[op_class]


def _digest_class(op_class: type[ImageOp]) -> str:
    digest = hashlib.sha256(op_class.__qualname__.encode())
    for base in op_class.__mro__:
        digest.update(vars(base).get("source_digest", "").encode() + b"\0")
    for kind in FUNCTION_ARGUMENTS:
        digest.update(f"{kind}\0".encode())
        for part in _parts(getattr(op_class, kind), set()):
            digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Bytes that stand for a value that compiled code refers to, functions with all they reach."""
    if isinstance(value, Dispatcher):
        for name, option in sorted(value.targetoptions.items()):
            # A set, as of fastmath's flags, has another order in every process.
            flags = sorted(option) if isinstance(option, (set, frozenset)) else option
            yield f"{name}={flags!r}".encode()
        value = value.py_func
    value = getattr(value, "_defn", value)  # what numba's `intrinsic` decorates
    if isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        if id(value) not in seen and not value.__module__.startswith("ffcv_ssl."):
            seen.add(id(value))
            yield from _code_parts(value.__code__)
            for name, other in _references(value):
                yield name.encode()
                yield from _parts(other, seen)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, (int, float, complex, str, bytes, type(None))):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()


def _code_parts(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_parts(constant)
        elif isinstance(constant, frozenset):  # its order differs from process to process
            yield repr(sorted(map(repr, constant))).encode()
        else:
            yield repr(constant).encode()


def _references(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a function takes from its module, from other modules and closures."""
    names = function.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            for attribute in names:
                if hasattr(value, attribute):
                    yield f"{name}.{attribute}", getattr(value, attribute)
        elif value is not None:
            yield name, value
    cells = function.__closure__ or ()
    yield from zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells))
