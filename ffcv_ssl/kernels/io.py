"""Checked reads without Python: many samples' bytes from one file into private memory, each
verified by its XXH3-64.

`pread` is looked up by name in the running process, so the kernel can be cached on disk (a ctypes
pointer could not).
"""

import numpy as np
from numba import types

from ffcv_ssl.kernels.compile import kernel
from ffcv_ssl.kernels.hash import xxh3

_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)

OK, IO_ERROR, TRUNCATED, ALTERED = 0, 1, 2, 3
_TRIES = 100  # of a read that a signal interrupted


@kernel(
    "void(int32, uint64[::1], uint64[::1], uint64[::1], boolean, "
    "int64[::1], uint8[::1], int64[::1])"
)
def read_samples(fd, pointers, sizes, checksums, verify, offsets, buffer, status):
    """Read sample i's sizes[i] bytes at file position pointers[i] to buffer[offsets[i]:]; all
    arrays but buffer are (N,).

    status[i]: OK, IO_ERROR (ask the system again from Python for the reason), TRUNCATED (the file
    ends too early) or ALTERED (the bytes do not have their checksum; only with `verify`). Nothing
    outside the N ranges is written.
    """
    base = np.uint64(buffer.ctypes.data)
    for i in range(pointers.size):
        status[i] = OK
        done, size, tries = np.uint64(0), sizes[i], 0
        while done < size:
            target = base + np.uint64(offsets[i]) + done
            got = _pread(fd, target, size - done, np.int64(pointers[i] + done))
            if got > 0:
                done += np.uint64(got)
            elif got == 0:
                status[i] = TRUNCATED
                break
            else:
                tries += 1
                if tries == _TRIES:
                    status[i] = IO_ERROR
                    break
        if status[i] == OK and verify and xxh3(buffer, offsets[i], np.int64(size)) != checksums[i]:
            status[i] = ALTERED
