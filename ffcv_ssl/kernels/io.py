"""Checked reads without Python: the bytes of many samples from one file into private memory, each
verified by its XXH3-64.

`pread` is looked up by name in the running process, so the kernel can be cached on disk (with a
ctypes pointer it could not).
"""

import numpy as np
from numba import types

from ffcv_ssl.kernels.compile import kernel
from ffcv_ssl.kernels.hash import xxh3

_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)

OK, IO_ERROR, TRUNCATED, ALTERED = 0, 1, 2, 3
_TRIES = 100  # attempts, because a signal may interrupt a read


@kernel(
    "void(int32, uint64[::1], uint64[::1], uint64[::1], boolean, "
    "int64[::1], uint8[::1], int64[::1])"
)
def read_samples(fd, pointers, sizes, checksums, verify, offsets, buffer, status):
    """Read sizes[i] bytes of sample i at file position pointers[i] to buffer[offsets[i]:].

    All arrays but buffer are (N,). status[i]: OK, IO_ERROR (repeat the read in Python for the
    reason), TRUNCATED (the file ends too early) or ALTERED (wrong checksum; only with `verify`).
    Nothing outside the N ranges is written.
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
