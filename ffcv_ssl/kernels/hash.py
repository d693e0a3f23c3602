"""XXH3-64 (seed 0, default secret), equal to the reference for every length; checked against the
package `xxhash`.

Specification: the XXH3 algorithm description of the xxHash project. All arithmetic is modulo 2**64.
"""

from typing import Any

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined, kernel
from ffcv_ssl.kernels.vectors import accumulate

_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
# The 64-bit words of the secret by byte offset. Some offsets are odd, so an aligned table would not
# work.
_S = np.array(
    [int.from_bytes(_SECRET[i : i + 8].tobytes(), "little") for i in range(185)], np.uint64
)

_PRIME32_1, _PRIME32_2, _PRIME32_3 = (
    np.uint64(0x9E3779B1),
    np.uint64(0x85EBCA77),
    np.uint64(0xC2B2AE3D),
)
_PRIME64_1, _PRIME64_2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME64_3, _PRIME64_4 = np.uint64(0x165667B19E3779F9), np.uint64(0x85EBCA77C2B2AE63)
_PRIME64_5 = np.uint64(0x27D4EB2F165667C5)
_AVALANCHE, _RRMXMX = np.uint64(0x165667919E3779F9), np.uint64(0x9FB21C651E98DF25)
_LOW32 = np.uint64(0xFFFFFFFF)
_STRIPE_BYTES, _BLOCK_STRIPES = 64, 16
_SECRET_WORDS = _S[:192:8].copy()
_SECRET_LAST = _S[121:185:8].copy()
_START = np.array(
    [
        _PRIME32_3,
        _PRIME64_1,
        _PRIME64_2,
        _PRIME64_3,
        _PRIME64_4,
        _PRIME32_2,
        _PRIME64_5,
        _PRIME32_1,
    ],
    np.uint64,
)


@inlined
def _read64(data, at):
    return data[at : at + 8].view(np.uint64)[0]


@inlined
def _read32(data, at):
    return np.uint64(data[at : at + 4].view(np.uint32)[0])


@inlined
def _xorshift(value, bits):
    return value ^ (value >> np.uint64(bits))


@inlined
def _rotl(value, bits):
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@inlined
def _swap64(value):
    value = ((value & np.uint64(0x00FF00FF00FF00FF)) << np.uint64(8)) | (
        (value >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    )
    value = ((value & np.uint64(0x0000FFFF0000FFFF)) << np.uint64(16)) | (
        (value >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    )
    return _rotl(value, 32)


@inlined
def _multiply_fold(a, b):
    """Low half xor high half of the 128-bit product."""
    a_low, a_high = a & _LOW32, a >> np.uint64(32)
    b_low, b_high = b & _LOW32, b >> np.uint64(32)
    low_low, high_low = a_low * b_low, a_high * b_low
    low_high, high_high = a_low * b_high, a_high * b_high
    cross = (low_low >> np.uint64(32)) + (high_low & _LOW32) + low_high
    upper = (high_low >> np.uint64(32)) + (cross >> np.uint64(32)) + high_high
    return upper ^ ((cross << np.uint64(32)) | (low_low & _LOW32))


@inlined
def _avalanche(value):
    return _xorshift(_xorshift(value, 37) * _AVALANCHE, 32)


@inlined
def _avalanche_xxh64(value):
    return _xorshift(_xorshift(_xorshift(value, 33) * _PRIME64_2, 29) * _PRIME64_3, 32)


@inlined
def _mix16(data, at, secret_at):
    return _multiply_fold(
        _read64(data, at) ^ _S[secret_at], _read64(data, at + 8) ^ _S[secret_at + 8]
    )


@device
def _hash_up_to_16(data, at, size):
    length = np.uint64(size)
    if size > 8:
        low = _read64(data, at) ^ (_S[24] ^ _S[32])
        high = _read64(data, at + size - 8) ^ (_S[40] ^ _S[48])
        return _avalanche(length + _swap64(low) + high + _multiply_fold(low, high))
    if size >= 4:
        first, last = _read32(data, at), _read32(data, at + size - 4)
        value = (last + (first << np.uint64(32))) ^ (_S[8] ^ _S[16])
        value ^= _rotl(value, 49) ^ _rotl(value, 24)
        value *= _RRMXMX
        value ^= (value >> np.uint64(35)) + length
        return _xorshift(value * _RRMXMX, 28)
    if size > 0:
        first, middle, last = data[at], data[at + (size >> 1)], data[at + size - 1]
        value = (np.uint64(first) << np.uint64(16)) | (np.uint64(middle) << np.uint64(24))
        value |= np.uint64(last) | (length << np.uint64(8))
        return _avalanche_xxh64(value ^ ((_S[0] & _LOW32) ^ (_S[0] >> np.uint64(32))))
    return _avalanche_xxh64(_S[56] ^ _S[64])


@device
def _hash_up_to_128(data, at, size):
    value = np.uint64(size) * _PRIME64_1
    for pair in range((size - 1) // 32, -1, -1):
        value += _mix16(data, at + 16 * pair, 32 * pair)
        value += _mix16(data, at + size - 16 * (pair + 1), 32 * pair + 16)
    return _avalanche(value)


@device
def _hash_up_to_240(data, at, size):
    value = np.uint64(size) * _PRIME64_1
    for i in range(8):
        value += _mix16(data, at + 16 * i, 16 * i)
    value = _avalanche(value)
    for i in range(8, size // 16):
        value += _mix16(data, at + 16 * i, 16 * (i - 8) + 3)
    return _avalanche(value + _mix16(data, at + size - 16, 136 - 17))


@device
def _hash_long(data, at, size):
    acc = _START.copy()
    block_bytes = _STRIPE_BYTES * _BLOCK_STRIPES
    num_blocks = (size - 1) // block_bytes
    for block in range(num_blocks):
        accumulate(data, at + block * block_bytes, _BLOCK_STRIPES, _SECRET_WORDS, acc)
        for lane in range(8):
            acc[lane] = (_xorshift(acc[lane], 47) ^ _SECRET_WORDS[16 + lane]) * _PRIME32_1
    tail = at + num_blocks * block_bytes
    num_stripes = (size - 1 - num_blocks * block_bytes) // _STRIPE_BYTES
    accumulate(data, tail, num_stripes, _SECRET_WORDS, acc)
    accumulate(data, at + size - _STRIPE_BYTES, 1, _SECRET_LAST, acc)
    value = np.uint64(size) * _PRIME64_1
    for pair in range(4):
        low = acc[2 * pair] ^ _S[11 + 16 * pair]
        value += _multiply_fold(low, acc[2 * pair + 1] ^ _S[19 + 16 * pair])
    return _avalanche(value)


@device
def xxh3(data, at, size):
    """XXH3-64 of `size` bytes of the uint8 array `data` from byte `at`, as uint64. Nothing is
    checked."""
    if size <= 16:
        return _hash_up_to_16(data, at, size)
    if size <= 128:
        return _hash_up_to_128(data, at, size)
    if size <= 240:
        return _hash_up_to_240(data, at, size)
    return _hash_long(data, at, size)


@kernel("uint64(Array(uint8, 1, 'C', readonly=True))")
def _xxh3_of(data):
    return xxh3(data, 0, data.size)


def xxh3_64(data: Any) -> int:
    """XXH3-64 of bytes-like `data` or of a contiguous array's bytes, as a Python int."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    view = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    return int(_xxh3_of(view))
