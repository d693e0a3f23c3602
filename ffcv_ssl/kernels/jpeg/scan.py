"""The entropy-coded bytes of a scan, without the zeros that are stuffed behind each 0xFF and
without restart markers (ITU-T T.81, B.1.1.5 and F.1.2.3)."""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.jpeg.headers import FALLBACK, OK
from ffcv_ssl.kernels.jpeg.memory import U, load8, load64, store8, store64

PADDING = 2048
"""Zeros behind the bytes: more than an MCU can take, whose 6 blocks have at most 63 codes of 26
bits and one of 27 each."""
MAX_RESTARTS = 1 << 14
_ONES, _HIGHS = U(0x0101010101010101), U(0x8080808080808080)
_END = np.uint8(0xD9)


@device
def unstuff(data, begin, out, restarts):
    """Copy a scan to `out`, PADDING + 16 bytes longer than `data`. restarts, int64 (MAX_RESTARTS,):
    where the bytes behind each restart marker begin. Returns (status, bytes, number of restarts).

    The scan must end with the image's end marker, and restart markers must count from 0 to 7.
    """
    size, source, target = U(data.size), U(data.ctypes.data), U(out.ctypes.data)
    i, o, count = U(begin), U(0), 0
    while True:
        while i + U(8) <= size:
            word = load64(source + i)
            store64(target + o, word)
            if (~word - _ONES) & word & _HIGHS:  # a byte of it is 0xFF
                break
            i += U(8)
            o += U(8)
        stop = min(i + U(8), size)
        while i < stop:
            byte = load8(source + i)
            if byte != U(0xFF):
                store8(target + o, byte)
                i, o = i + U(1), o + U(1)
                continue
            if i + U(1) >= size:
                return FALLBACK, U(0), 0
            behind = load8(source + i + U(1))
            if behind == U(0):
                store8(target + o, byte)
                i, o = i + U(2), o + U(1)
            elif behind == U(0xD0 + (count & 7)) and count < MAX_RESTARTS:
                restarts[count] = np.int64(o)
                count += 1
                i += U(2)
            elif behind == U(_END):
                for place in range(0, PADDING, 8):
                    store64(target + o + U(place), U(0))
                return OK, o, count
            else:
                return FALLBACK, U(0), 0
        if i >= size:
            return FALLBACK, U(0), 0
