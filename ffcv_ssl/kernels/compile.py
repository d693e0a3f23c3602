"""How kernels are compiled and kept: one signature each, cached on disk, safe with many processes
starting at once.

Guarantees: a kernel compiled once is loaded, not compiled, by every later process with the same
sources, numba and CPU. The cache folder's name is a digest of *all* kernel sources, so an edited
callee is never missed (numba itself looks only at the file of the caller). Processes that start
together compile once: the others wait for a file lock and then load.

Folder: `$FFCV_SSL_CACHE`, else `$XDG_CACHE_HOME/ffcv_ssl`, else `~/.cache/ffcv_ssl`, else one of
this user below the temporary folder. Nothing outside it is written, and no environment variable is
set.
"""

import contextlib
import fcntl
import functools
import hashlib
import inspect
import os
import tempfile
import threading
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

# Flags that keep values what they are: no reassociation of sums, no reciprocal for a division, NaN
# stays NaN. "contract" allows a fused multiply-add, "nsz" ignores the sign of zero.
SAFE_MATH = {"contract", "nsz"}

# error_model="numpy": a division by zero gives inf instead of raising, which would forbid vector
# code.
device = numba.njit(nogil=True, fastmath=SAFE_MATH, error_model="numpy")
inlined = numba.njit(
    nogil=True, fastmath=SAFE_MATH, error_model="numpy", forceinline=True
)  # for tiny functions inside pixel loops, where a call would forbid vector code

_SOURCE_FOLDERS = ("kernels", "transforms", "pipeline", "traversal_order")


@functools.cache
def _sources_digest():
    """Digest of every kernel source, numba's and llvmlite's versions and the CPU with its
    features."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in _SOURCE_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\0".encode())
            digest.update(path.read_bytes())
    machine = (numba.__version__, llvm.llvm_version_info, llvm.get_host_cpu_name())
    digest.update(repr(machine).encode())
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()[:20]


@functools.cache
def _cache_root():
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    user = f"ffcv_ssl-{os.getuid()}"
    for folder in (os.environ.get("FFCV_SSL_CACHE"), os.path.join(home, "ffcv_ssl")):
        if not folder:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError:
            continue
    return os.path.join(tempfile.gettempdir(), user)


def cache_folder():
    """The folder that this process's kernels are kept in; it may not exist yet."""
    return os.path.join(_cache_root(), f"kernels-{_sources_digest()}")


class _Locator:
    """Tells numba where one function's files lie; the folder's name already says which sources they
    belong to."""

    def __init__(self, py_func):
        path = Path(inspect.getfile(py_func))
        self.stamp = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def get_cache_path(self):
        return cache_folder()

    def ensure_cache_path(self):
        os.makedirs(cache_folder(), exist_ok=True)

    def get_source_stamp(self):
        return self.stamp


class _CacheImpl(CompileResultCacheImpl):
    def __init__(self, py_func):
        self._locator = _Locator(py_func)
        self._lineno = py_func.__code__.co_firstlineno
        self._filename_base = f"{py_func.__module__}.{py_func.__qualname__}"


class _FunctionCache(FunctionCache):
    _impl_class = _CacheImpl


@contextlib.contextmanager
def _one_process_at_a_time():
    """Hold the cache folder's lock, which the system frees when a process dies. Without locks on
    this file system: none."""
    os.makedirs(cache_folder(), exist_ok=True)
    descriptor = os.open(os.path.join(cache_folder(), "lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Kernel:
    """A compiled entry point: `kernel(*arrays)`. Loads or compiles at the first call, or at
    `load()`.

    Only its one signature is accepted: other dtypes or layouts raise TypeError and never compile
    anew.
    """

    def __init__(self, py_func, signature):
        functools.update_wrapper(self, py_func)
        self.signature = signature
        self.dispatcher = device(py_func)
        self._ready = False
        self._lock = threading.Lock()

    def load(self):
        """Make the kernel ready; returns True when it had to be compiled, False when it came from
        the disk."""
        with self._lock:
            if self._ready:
                return False
            cache = _FunctionCache(self.dispatcher.py_func)
            self.dispatcher._cache = cache
            compiled = not self._load_cached(cache) and self._compile()
            self.dispatcher.disable_compile()
            self._ready = True
            return compiled

    def _load_cached(self, cache):
        """True when the disk holds this kernel; then numba's own compile() only loads it."""
        key_file = os.path.join(cache.cache_path, f"{cache._impl.filename_base}.nbi")
        if not os.path.exists(key_file):
            return False
        self.dispatcher.compile(self.signature)
        return True

    def _compile(self):
        with _one_process_at_a_time():
            self.dispatcher.compile(self.signature)
        return bool(self.dispatcher.stats.cache_misses)

    def __call__(self, *args):
        if not self._ready:
            self.load()
        return self.dispatcher(*args)


def kernel(signature):
    """Decorator: a nogil, unchecked, disk-cached entry point for one explicit numba signature."""
    return functools.partial(Kernel, signature=signature)
