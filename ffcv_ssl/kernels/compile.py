"""Compiling and caching kernels: one signature each, cached on disk, safe when many processes start
at once.

Guarantees: a kernel is compiled once; every later process with the same sources, numba and CPU
loads it. The cache folder's name is a digest of *all* kernel sources, so an edited callee is never
missed (numba itself checks only the caller's file). When processes start together, one compiles;
the others wait for a file lock and then load. A damaged file costs one compilation
(kernels/cache_files.py); kernels/cache_folders.py says which folders are used.

`NUMBA_BOUNDSCHECK=1` compiles kernels that check every index, into a cache of their own.
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
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import config
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from ffcv_ssl.files import locked
from ffcv_ssl.kernels.cache_files import CheckedCacheFile
from ffcv_ssl.kernels.cache_folders import cache_folders, make_folder

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

# Held while any kernel is loaded or compiled, and while this process is forked: so a fork waits for
# the kernel in hand. Else the child would inherit this lock, or one of numba's and LLVM's, from a
# thread that it does not have, and would wait for ever for kernels of its own. A thread takes file
# locks first: they have a rule of their own for forks, which must not wait for this one.
_loading = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_loading.acquire,
        after_in_parent=_loading.release,
        after_in_child=_loading.release,
    )

# numba's settings, from NUMBA_... in the environment, that change the code.
_NUMBA_SETTINGS = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")
_SOURCE_FOLDERS = ("kernels", "kernels/jpeg", "transforms", "pipeline", "traversal_order")


def _digest_sources() -> str:
    """Digest of all kernel sources, the versions of Python, numba and LLVM, the CPU's features,
    and numba's settings that change the code."""
    digest = hashlib.sha256(sys.implementation.cache_tag.encode())
    root = Path(__file__).resolve().parent.parent
    for folder in _SOURCE_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\0".encode())
            digest.update(path.read_bytes())
    machine = (numba.__version__, llvm.llvm_version_info, llvm.get_host_cpu_name())
    digest.update(repr(machine).encode())
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    digest.update(repr([str(getattr(config, name)) for name in _NUMBA_SETTINGS]).encode())
    return digest.hexdigest()[:20]


# Computed at import. If a file is edited between its import and the first call, the old code must
# not be stored under the digest of the new sources.
_SOURCES_DIGEST = _digest_sources()


def _cache_folders() -> tuple[str, ...]:
    return cache_folders(f"kernels-{_SOURCES_DIGEST}")


def cache_folder() -> str:
    """The folder that this process writes its kernels to; it may not exist yet."""
    return _cache_folders()[-1]


class _Locator:
    """Tells numba where the files of one function are. The folder's name already identifies the
    sources."""

    def __init__(self, py_func: Callable, folder: str) -> None:
        path = Path(inspect.getfile(py_func))
        self.stamp = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.folder = folder

    def get_cache_path(self) -> str:
        return self.folder

    def ensure_cache_path(self) -> None:
        make_folder(self.folder)

    def get_source_stamp(self) -> str:
        return self.stamp


class _CacheImpl(CompileResultCacheImpl):
    def __init__(self, py_func: Callable, folder: str) -> None:
        self._locator = _Locator(py_func, folder)
        self._lineno = py_func.__code__.co_firstlineno
        self._filename_base = f"{py_func.__module__}.{py_func.__qualname__}"


class _FunctionCache(FunctionCache):
    """numba's cache of one function: loaded from the first of `folders` that has it, written to the
    last. A damaged file or a full disk only costs a compilation."""

    def __init__(self, py_func: Callable, folders: Sequence[str]) -> None:
        self._impl_class: Any = functools.partial(_CacheImpl, folder=folders[-1])
        super().__init__(py_func)
        base, stamp = self._impl.filename_base, self._impl.locator.get_source_stamp()
        self._places = [CheckedCacheFile(folder, base, stamp) for folder in folders]
        self._cache_file = self._places[-1]

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        """numba's key without the hash of a closure's variables, because that hash differs between
        processes. The names of folder and file already identify the sources."""
        return sig, codegen.magic_tuple()

    def is_on_disk(self) -> bool:
        """Whether the kernel can be loaded: index and code are there, and sound."""
        return any(place.is_sound() for place in self._places)

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        key = self._index_key(sig, target_context.codegen())
        for place in self._places:
            with contextlib.suppress(Exception):  # a pickle may raise anything
                data = place.load(key)
                if data is not None:
                    return self._impl.rebuild(target_context, data)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@contextlib.contextmanager
def _one_process_at_a_time(kernel: str) -> Iterator[None]:
    """Hold a kernel's lock, which ends with the process; others may compile other kernels. Where
    no lock can be made, as on a full disk, each process compiles for itself."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            make_folder(cache_folder())
            held.enter_context(locked(os.path.join(cache_folder(), f"{kernel}.lock")))
        yield


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

    def load(self) -> bool:
        """Make the kernel ready; True when it had to be compiled, False when it came from disk."""
        with _loading:
            if self._ready:
                return False
            cache = _FunctionCache(self.dispatcher.py_func, _cache_folders())
            self.dispatcher._cache = cache
            if cache.is_on_disk():
                return self._make_ready()  # loads it
        _announce()
        with _one_process_at_a_time(self.dispatcher.py_func.__qualname__), _loading:
            _take_unique_names()
            return self._make_ready()

    def _make_ready(self) -> bool:
        if self._ready:  # by another thread
            return False
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
