"""Compiling and caching kernels: one signature each, cached on disk, safe when many processes start
at once.

Guarantees: a kernel is compiled once; every later process with the same sources, numba and CPU
loads it. The cache folder's name is a digest of *all* kernel sources, so an edited callee is never
missed (numba itself checks only the caller's file). When processes start together, one compiles;
the others wait for a file lock and then load.

Folder: `$FFCV_SSL_CACHE`, else `$XDG_CACHE_HOME/ffcv_ssl`, else `~/.cache/ffcv_ssl`, else a folder
of this user in the temporary folder. Nothing is written elsewhere, and no environment variable is
set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from ffcv_ssl.files import locked

_log = logging.getLogger(__name__)

# Flags that do not change values: no reassociation of sums, no reciprocal for a division, NaN
# stays NaN. "contract" allows a fused multiply-add, "nsz" ignores the sign of zero.
SAFE_MATH = {"contract", "nsz"}

# error_model="numpy": a division by zero gives inf instead of raising, which would forbid vector
# code.
device = numba.njit(nogil=True, fastmath=SAFE_MATH, error_model="numpy")
inlined = numba.njit(
    nogil=True, fastmath=SAFE_MATH, error_model="numpy", forceinline=True
)  # for tiny functions inside pixel loops, where a call would forbid vector code

_SOURCE_FOLDERS = ("kernels", "transforms", "pipeline", "traversal_order")


def _digest_sources() -> str:
    """Digest of all kernel sources, the versions of Python, numba and LLVM, and the CPU's
    features."""
    digest = hashlib.sha256(sys.implementation.cache_tag.encode())
    root = Path(__file__).resolve().parent.parent
    for folder in _SOURCE_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\0".encode())
            digest.update(path.read_bytes())
    machine = (numba.__version__, llvm.llvm_version_info, llvm.get_host_cpu_name())
    digest.update(repr(machine).encode())
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()[:20]


# Computed at import. If a file is edited between its import and the first call, the old code must
# not be stored under the digest of the new sources.
_SOURCES_DIGEST = _digest_sources()


@functools.cache
def _cache_root() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (os.environ.get("FFCV_SSL_CACHE"), os.path.join(home, "ffcv_ssl")):
        if folder and _is_usable(folder):
            return folder
    folder = os.path.join(tempfile.gettempdir(), f"ffcv_ssl-{os.getuid()}")
    # Cached kernels are pickles: never load them from a folder that another user can write to.
    if _is_usable(folder, mode=0o700) and os.stat(folder).st_uid == os.getuid():
        os.chmod(folder, 0o700)
        return folder
    return tempfile.mkdtemp(prefix="ffcv_ssl-")


def _is_usable(folder: str, mode: int = 0o777) -> bool:
    try:
        os.makedirs(folder, mode, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def cache_folder() -> str:
    """The folder with this process's cached kernels; it may not exist yet."""
    return os.path.join(_cache_root(), f"kernels-{_SOURCES_DIGEST}")


class _Locator:
    """Tells numba where the files of one function are. The folder's name already identifies the
    sources."""

    def __init__(self, py_func: Callable) -> None:
        path = Path(inspect.getfile(py_func))
        self.stamp = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def get_cache_path(self) -> str:
        return cache_folder()

    def ensure_cache_path(self) -> None:
        os.makedirs(cache_folder(), exist_ok=True)

    def get_source_stamp(self) -> str:
        return self.stamp


class _CacheImpl(CompileResultCacheImpl):
    def __init__(self, py_func: Callable) -> None:
        self._locator = _Locator(py_func)
        self._lineno = py_func.__code__.co_firstlineno
        self._filename_base = f"{py_func.__module__}.{py_func.__qualname__}"


class _FunctionCache(FunctionCache):
    """numba's cache of one function. A damaged file or a full disk only costs a compilation."""

    _impl_class = _CacheImpl

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        """numba's key without the hash of a closure's variables, because that hash differs between
        processes. The names of folder and file already identify the sources."""
        return sig, codegen.magic_tuple()

    def is_complete(self) -> bool:
        """Whether both the index and the code are on disk; numba writes them one after the
        other."""
        return all(
            os.path.exists(os.path.join(self.cache_path, self._impl.filename_base + suffix))
            for suffix in (".nbi", ".1.nbc")
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a truncated pickle may raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def _one_process_at_a_time(kernel: str) -> contextlib.AbstractContextManager:
    """Hold a kernel's lock, which ends with the process; others may compile other kernels."""
    os.makedirs(cache_folder(), exist_ok=True)
    return locked(os.path.join(cache_folder(), f"{kernel}.lock"))


def _take_unique_names() -> None:
    """Number the functions that are compiled from now on as no other process numbers its own.

    numba counts functions from 1 in every process, and the number is all that tells two functions
    of one qualified name apart: the dispatch of two sets of ops, an op before and after an edit.
    Kernels from different processes that are loaded into one would then share one symbol, and the
    second kernel would call the first one's function.
    """
    FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "little"))


@functools.cache
def _announce() -> None:
    """Print once per process why the first batch takes long."""
    _log.warning("compiling kernels into %s, once (up to 40 s)", cache_folder())


class Kernel:
    """A compiled entry point: `kernel(*arrays)`. It is loaded or compiled at the first call, or at
    `load()`.

    It accepts only its one signature: other dtypes or layouts raise TypeError and are never
    compiled.
    """

    def __init__(self, py_func: Callable, signature: str) -> None:
        functools.update_wrapper(self, py_func)
        self.signature = signature
        self.dispatcher: Any = device(py_func)
        self._ready = False
        self._lock = threading.Lock()

    def load(self) -> bool:
        """Make the kernel ready; True when it had to be compiled, False when it came from disk."""
        with self._lock:
            if self._ready:
                return False
            cache = self.dispatcher._cache = _FunctionCache(self.dispatcher.py_func)
            if cache.is_complete():
                self.dispatcher.compile(self.signature)  # loads it
            else:
                _announce()
                with _one_process_at_a_time(self.dispatcher.py_func.__qualname__):
                    _take_unique_names()
                    self.dispatcher.compile(self.signature)
            self.dispatcher.disable_compile()
            self._ready = True
            return bool(self.dispatcher.stats.cache_misses)

    def __call__(self, *args: Any) -> Any:
        if not self._ready:
            self.load()
        return self.dispatcher(*args)


def kernel(signature: str) -> Callable[[Callable], Kernel]:
    """Decorator: a nogil, unchecked, disk-cached entry point for one explicit numba signature."""
    return functools.partial(Kernel, signature=signature)
