"""Counter-based random numbers (Philox4x32-10): a draw is a pure function of its key; it does not
depend on the thread or on earlier draws.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); checked against the
authors' known answers. Uniform numbers are multiples of 2**-32 in [0, 1).
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined, kernel

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW32 = np.uint64(0xFFFFFFFF)
_TO_UNIT = 2.0**-32
_DRAWN_AHEAD = 256


@inlined
def philox(key, c0, c1, c2, c3):
    """Four 32-bit words (as uint64) of a 64-bit key and a counter of four 32-bit words."""
    k0, k1 = key & _LOW32, key >> np.uint64(32)
    for _ in range(10):
        p0, p1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & _LOW32,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0 = (k0 + _WEYL_0) & _LOW32
        k1 = (k1 + _WEYL_1) & _LOW32
    return c0, c1, c2, c3


@device
def uniforms(key, epoch, sample, occurrence, block):
    """Four uniform numbers in [0, 1): block number `block` of an op's stream for one sample.

    key: derived from (seed, view, op), uint64. epoch below 2**32, sample (its id) below 2**48,
    occurrence in the epoch below 2**16; all uint64.
    """
    high = ((sample >> np.uint64(32)) << np.uint64(16)) | (occurrence & np.uint64(0xFFFF))
    w0, w1, w2, w3 = philox(key, np.uint64(block), sample & _LOW32, epoch & _LOW32, high & _LOW32)
    return w0 * _TO_UNIT, w1 * _TO_UNIT, w2 * _TO_UNIT, w3 * _TO_UNIT


@inlined
def _partner(key, epoch, last):
    """A number in [0, last]."""
    w0, w1, w2, w3 = philox(
        key, np.uint64(last) & _LOW32, epoch & _LOW32, np.uint64(0), np.uint64(0)
    )
    bound = np.uint64(last + 1)
    return np.int64((w0 * bound + ((w1 * bound) >> np.uint64(32))) >> np.uint64(32))


@kernel("void(uint64, uint64, int64[::1])")
def shuffle_(key, epoch, values):
    """Permute `values` in place (Fisher and Yates), as a function of key and epoch. Every
    permutation is equally likely.

    A bounded number is the high half of a 64-bit word times the bound; the bias is below 2**-32 for
    2**32 values.
    """
    # partners are drawn some ahead: then the processor waits for several places of memory at once
    others = np.empty(_DRAWN_AHEAD, np.int64)
    last = values.size - 1
    while last > 0:
        number = min(_DRAWN_AHEAD, last)
        for i in range(number):
            others[i] = _partner(key, epoch, last - i)
        for i in range(number):
            values[last - i], values[others[i]] = values[others[i]], values[last - i]
        last -= number


@kernel("uint64(uint64, uint64, uint64, uint64)")
def random_word(key, epoch, sample, attempt):
    """A 64-bit word from (key, epoch, sample, attempt). It chooses the replacement of a bad
    sample."""
    w0, w1, w2, w3 = philox(
        key, attempt & _LOW32, sample & _LOW32, epoch & _LOW32, sample >> np.uint64(32)
    )
    return (w0 << np.uint64(32)) | w1


@kernel("void(uint64, uint64, uint64, uint64, float64[:, ::1])")
def fill_uniforms(key, epoch, sample, occurrence, out):
    """Row b of `out` (N, 4) gets `uniforms(..., block=b)`; for tests and for code outside numba."""
    for block in range(out.shape[0]):
        u0, u1, u2, u3 = uniforms(key, epoch, sample, occurrence, block)
        out[block, 0], out[block, 1], out[block, 2], out[block, 3] = u0, u1, u2, u3
