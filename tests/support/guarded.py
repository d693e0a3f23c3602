"""Arrays whose memory ends, or begins, at a page that nobody may touch: one byte too far ends the
process with SIGSEGV."""

import ctypes
import mmap

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE


class Guarded:
    """Memory for arrays of at most `size` bytes, between two such pages."""

    def __init__(self, size):
        self.size = -(-size // _PAGE) * _PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * _PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        for page in (0, self.size + _PAGE):
            address = ctypes.c_void_p(self.bytes.ctypes.data + page)
            if _LIBC.mprotect(address, _PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def at_end(self, size):
        """`size` bytes before the page behind."""
        return self.bytes[_PAGE + self.size - size : _PAGE + self.size]

    def at_begin(self, size):
        """`size` bytes behind the page before."""
        return self.bytes[_PAGE : _PAGE + size]
