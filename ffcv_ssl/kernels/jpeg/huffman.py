"""Coefficients from Huffman codes (ITU-T T.81, annexes C and F), up to two for each look into a
table.

A table of AC codes is looked up by the next 11 bits. An entry has all coefficients that these bits
hold entirely: code and value of one, often of two. Fields of an entry, from the lowest bits: length
of both (8 bits), length of the first (8), values (16 each), places to go on by (8 each). An end of
block goes on by END places and a code that the bits do not hold by LONG, so that one comparison
ends the loop for all that is special. Values are stored through a table of places, whose tail leads
to a place behind the block.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device, inlined
from ffcv_ssl.kernels.jpeg import headers
from ffcv_ssl.kernels.jpeg.headers import FALLBACK, OK, TABLE_BYTES
from ffcv_ssl.kernels.jpeg.memory import U, load8, load32, load64, store16, swap_bytes

BITS = 11
SIZE = 1 << BITS
"""Entries of a table."""
LENGTHS = 18
END, LONG = 128, 255
WRONG = U(255)
_MAX_DC_BITS, _MAX_AC_BITS = 11, 10
_ZERO_RUN = 0xF0

PLACES = np.full(512, 64, np.uint8)
"""Where the k-th coefficient of a scan stands in its block, uint8 (512,); 64: nowhere."""
PLACES[:64] = headers.PLACES


@device
def _extended(bits, size):
    """The signed number that `size` bits mean (figure F.12)."""
    if size > 0 and bits < 1 << (size - 1):
        return bits - (1 << size) + 1
    return bits


@device
def _make_codes(raw, is_dc, codes, limits):
    """Canonical codes of a table, uint8 (TABLE_BYTES,): codes, uint32 (SIZE,), length << 8 | symbol
    of what 11 bits begin with (0: longer); limits, int64 (2, LENGTHS): the largest code of each
    length, and what to add to a code for its symbol's number. Returns a status."""
    code, number = 0, 0
    codes[:] = 0
    for length in range(1, 17):
        count = np.int64(raw[length - 1])
        if code + count > 1 << length:
            return FALLBACK
        limits[1, length] = number - code
        for _ in range(count):
            symbol = np.int64(raw[16 + number])
            if is_dc and symbol > _MAX_DC_BITS:
                return FALLBACK
            if length <= BITS:
                first = code << (BITS - length)
                codes[first : first + (1 << (BITS - length))] = (length << 8) | symbol
            code, number = code + 1, number + 1
        limits[0, length] = code - 1 if count else -1
        code <<= 1
    return OK


@device
def make_dc_table(raw, codes, limits, table):
    """uint32 (SIZE,): difference (16 bits) and its length; 0 where 11 bits do not hold it."""
    if _make_codes(raw, True, codes, limits) != OK:
        return FALLBACK
    for bits in range(SIZE):
        length, size = np.int64(codes[bits]) >> 8, np.int64(codes[bits]) & 255
        table[bits] = 0
        if length and length + size <= BITS:
            value = _extended((bits >> (BITS - length - size)) & ((1 << size) - 1), size)
            table[bits] = (value & 0xFFFF) | ((length + size) << 16)
    return OK


@device
def _symbol(bits, held, codes):
    """(places, value, length) of the AC symbol that the first `held` of 11 bits begin with."""
    length, symbol = np.int64(codes[bits]) >> 8, np.int64(codes[bits]) & 255
    run, size = symbol >> 4, symbol & 15
    if length == 0 or length > held:
        return LONG, 0, 0
    if symbol == 0:
        return END, 0, length
    if symbol == _ZERO_RUN:
        return 16, 0, length
    if size == 0 or length + size > held:
        return LONG, 0, 0
    value = _extended((bits >> (BITS - length - size)) & ((1 << size) - 1), size)
    return run + 1, value, length + size


@device
def make_ac_table(raw, codes, limits, table):
    """uint64 (SIZE,): entries as above."""
    if _make_codes(raw, False, codes, limits) != OK:
        return FALLBACK
    for bits in range(SIZE):
        places, value, length = _symbol(bits, BITS, codes)
        more, second, both = 0, value, length  # none: the first is stored twice
        if places < END:
            rest = (bits << length) & (SIZE - 1)
            found, value_behind, length_behind = _symbol(rest, BITS - length, codes)
            if found != LONG:
                more, second, both = found, value_behind, length + length_behind
        table[bits] = (
            U(both) | (U(length) << U(8)) | (U(value & 0xFFFF) << U(16))
            | (U(second & 0xFFFF) << U(32)) | (U(places) << U(48)) | (U(more) << U(56))
        )  # fmt: skip
    return OK


@inlined
def window(scan, bit):
    """The next 57 bits or more of a scan, the first one highest."""
    return swap_bytes(load64(scan + (bit >> U(3)))) << (bit & U(7))


@device
def _long_code(bits, number, codes, limits, raw):
    """(length, symbol) of the code that 64 bits begin with; length 0: there is none. number: of the
    table; codes, limits, raw: addresses of all tables' arrays."""
    found = load32(codes + U(4 * SIZE) * number + ((bits >> U(64 - BITS)) << U(2)))
    if found:
        return found >> U(8), found & U(255)
    limits += U(16 * LENGTHS) * number
    for length in range(BITS + 1, 17):
        code = np.int64(bits >> U(64 - length))
        if code <= np.int64(load64(limits + U(8 * length))):
            place = code + np.int64(load64(limits + U(8 * (LENGTHS + length))))
            return U(length), load8(raw + U(TABLE_BYTES) * number + U(16 + place))
    return U(0), U(0)


@device
def _value(bits, length, size):
    """The signed number in the `size` bits behind the first `length` of 64."""
    if size == U(0):
        return 0
    return _extended(np.int64((bits << length) >> (U(64) - size)), np.int64(size))


@device
def long_difference(scan, bit, number, codes, limits, raw):
    """(bit behind, difference of DC) where the table does not hold it; bit 0: wrong."""
    bits = window(scan, bit)
    length, size = _long_code(bits, number, codes, limits, raw)
    if length == U(0):
        return U(0), 0
    return bit + length + size, _value(bits, length, size)


@device
def _long_coefficient(scan, bit, number, codes, limits, raw):
    """(bit behind, places, value) where the table does not hold it; places LONG: wrong."""
    bits = window(scan, bit)
    length, symbol = _long_code(bits, number, codes, limits, raw)
    run, size = symbol >> U(4), symbol & U(15)
    if length == U(0) or size > U(_MAX_AC_BITS):
        return bit, U(LONG), 0
    if symbol == U(0):
        return bit + length, U(END), 0
    if symbol == U(_ZERO_RUN):
        return bit + length, U(16), 0
    if size == U(0):
        return bit, U(LONG), 0
    return bit + length + size, run + U(1), _value(bits, length, size)


@inlined
def _look(bits, table, places, block, k):
    """(entry, k behind it): store the entry's coefficients."""
    entry = load64(table + ((bits >> U(64 - BITS)) << U(3)))
    k += (entry >> U(48)) & U(255)
    store16(block + (load8(places + k) << U(1)), entry >> U(16))
    k += entry >> U(56)
    store16(block + (load8(places + k) << U(1)), entry >> U(32))
    return entry, k


@inlined
def read_coefficients(scan, bit, bits, table, places, block, number, codes, limits, raw):
    """Store a block's AC coefficients. Returns (bit behind, number of the last one; WRONG).

    bits: the window at `bit`, of which 46 bits or more count: four looks take 44. All else are
    addresses; block: int16, 65 of them, 0 but for the last.
    """
    k = U(0)
    while True:
        while True:
            entry, k = _look(bits, table, places, block, k)
            bit += entry & U(255)
            if k >= U(63):
                break
            bits <<= entry & U(63)
            entry, k = _look(bits, table, places, block, k)
            bit += entry & U(255)
            if k >= U(63):
                break
            bits <<= entry & U(63)
            entry, k = _look(bits, table, places, block, k)
            bit += entry & U(255)
            if k >= U(63):
                break
            bits <<= entry & U(63)
            behind = window(scan, bit)  # while the table is looked up
            entry, k = _look(bits, table, places, block, k)
            bit += entry & U(255)
            if k >= U(63):
                break
            bits = behind << (entry & U(63))
        if k - U(END) < U(63):  # an end of block, the entry's first or second
            return bit, k - U(END)
        first = k - (entry >> U(56))
        if first == U(63):  # the second is of the next block
            return bit - (entry & U(255)) + ((entry >> U(8)) & U(255)), first
        if first < U(63):
            return bit, k if k == U(63) else WRONG
        if first < U(LONG):
            return bit, WRONG
        bit, run, value = _long_coefficient(scan, bit, number, codes, limits, raw)
        k = first - U(LONG)
        if run == U(END):
            return bit, k
        k += run
        if k > U(63):
            return bit, WRONG
        store16(block + (load8(places + k) << U(1)), U(value))
        if k == U(63):
            return bit, k
        bits = window(scan, bit)
