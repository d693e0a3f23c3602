"""The markers and tables before a JPEG's scan (ITU-T T.81, annex B), strictly.

Only what every encoder of photographs writes is taken: one frame of 8-bit baseline (SOF0), one scan
of all its components, YCbCr in 4:2:0, 4:2:2 or 4:4:4, or grey. All else is FALLBACK.
"""

import numpy as np

from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.jpeg.inverse_dct import PLACE_OF

OK, FALLBACK = 0, 1
NATURAL = np.array(
    [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27,
        20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
        58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ]
)  # fmt: skip
"""Numbers, by rows, of the coefficients in the order of the scan (zigzag)."""
PLACES = PLACE_OF[NATURAL]
"""Where they are kept in a block."""

# What is found, int64 (HEADER_SIZE,): sides (px), number of components, luma samples for a chroma
# sample in each direction, MCUs between restarts (0: none), first byte of the scan; then for each
# of the three components its quantization table, DC table, AC table and name.
HEIGHT, WIDTH, COMPONENTS, ACROSS, DOWN, INTERVAL, SCAN = range(7)
QUANTIZATION, DC_TABLE, AC_TABLE, NAME = 7, 10, 13, 16
HEADER_SIZE = 19
TABLE_BYTES = 16 + 256
"""Of a Huffman table: the number of codes of each length, and the symbols."""

_APP0, _APP14, _APP15, _COMMENT = 0xE0, 0xEE, 0xEF, 0xFE
_QUANTIZATION, _HUFFMAN, _FRAME, _RESTARTS, _SCAN = 0xDB, 0xC4, 0xC0, 0xDD, 0xDA
_JFIF = np.frombuffer(b"JFIF\0", np.uint8)
_ADOBE = np.frombuffer(b"Adobe", np.uint8)
_ADOBE_YCC = 1


@device
def _word(data, at):
    return (np.int64(data[at]) << 8) | np.int64(data[at + 1])


@device
def _begins_with(data, at, name):
    for i in range(name.size):
        if data[at + i] != name[i]:
            return False
    return True


@device
def _read_quantization(data, at, end, quantization):
    """A bit for each table that is read; -1: FALLBACK."""
    found = 0
    while at < end:
        table = np.int64(data[at])  # with its precision: 0, 8 bits
        if table > 3 or at + 65 > end:
            return -1
        for i in range(64):
            quantization[table, PLACES[i]] = data[at + 1 + i]
        found |= 1 << table
        at += 65
    return found


@device
def _read_huffman(data, at, end, tables):
    """A bit for each table that is read; -1: FALLBACK. Rows: DC 0, DC 1, AC 0, AC 1."""
    found = 0
    while at < end:
        if at + 17 > end:
            return -1
        kind, slot = np.int64(data[at]) >> 4, np.int64(data[at]) & 15
        if kind > 1 or slot > 1:
            return -1
        size = 16
        for i in range(16):
            size += np.int64(data[at + 1 + i])
        if size > TABLE_BYTES or at + 1 + size > end:
            return -1
        row = 2 * kind + slot
        for i in range(TABLE_BYTES):
            tables[row, i] = data[at + 1 + i] if i < size else np.uint8(0)
        found |= 1 << row
        at += 1 + size
    return found


@device
def _read_frame(data, at, size, header):
    """The frame header of `size` bytes; a status."""
    if size < 6 or data[at] != 8:
        return FALLBACK
    count = np.int64(data[at + 5])
    header[HEIGHT], header[WIDTH] = _word(data, at + 1), _word(data, at + 3)
    if (count != 1 and count != 3) or size != 6 + 3 * count:
        return FALLBACK
    for c in range(count):
        place = at + 6 + 3 * c
        across, down = np.int64(data[place + 1]) >> 4, np.int64(data[place + 1]) & 15
        if c == 0:
            header[ACROSS], header[DOWN] = across, down
        elif across != 1 or down != 1:
            return FALLBACK
        if data[place + 2] > 3:
            return FALLBACK
        header[NAME + c], header[QUANTIZATION + c] = data[place], data[place + 2]
    across, down = header[ACROSS], header[DOWN]
    if across < 1 or across > 2 or down < 1 or down > across:
        return FALLBACK
    if count == 1:  # its factors mean nothing
        header[ACROSS], header[DOWN] = 1, 1
    header[COMPONENTS] = count
    return OK


@device
def _read_scan(data, at, size, header, quantizations, codes):
    """The scan header; a status. quantizations, codes: a bit for each table that is known."""
    count = header[COMPONENTS]
    if count == 0 or size != 4 + 2 * count or data[at] != count:
        return FALLBACK
    for c in range(count):
        tables = np.int64(data[at + 2 + 2 * c])
        dc, ac = tables >> 4, tables & 15
        if data[at + 1 + 2 * c] != header[NAME + c] or dc > 1 or ac > 1:
            return FALLBACK
        known = (codes >> dc) & (codes >> (2 + ac)) & (quantizations >> header[QUANTIZATION + c])
        if known & 1 == 0:
            return FALLBACK
        header[DC_TABLE + c], header[AC_TABLE + c] = dc, ac
    last = at + size - 3  # first and last coefficient of the scan, and bits of precision
    if data[last] != 0 or data[last + 1] != 63 or data[last + 2] != 0:
        return FALLBACK
    header[SCAN] = at + size
    return OK


@device
def _is_ycc(header, is_jfif, is_adobe_ycc):
    """Whether three components are YCbCr, as libjpeg decides it."""
    if is_jfif or is_adobe_ycc or header[COMPONENTS] == 1:
        return True
    return header[NAME] == 1 and header[NAME + 1] == 2 and header[NAME + 2] == 3


@device
def read_headers(data, header, quantization, tables):
    """Fill header, int64 (HEADER_SIZE,), quantization, int16 (4, 64) at PLACES, and tables, uint8
    (4, TABLE_BYTES). data: uint8 (N,), the whole file. Returns a status."""
    size = data.size
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return FALLBACK
    header[COMPONENTS], header[INTERVAL] = 0, 0
    quantizations, codes, is_jfif, is_adobe_ycc = 0, 0, False, False
    marker_at = 2
    while True:
        if marker_at + 4 > size or data[marker_at] != 0xFF:
            return FALLBACK
        marker, at = data[marker_at + 1], marker_at + 4
        end = marker_at + 2 + _word(data, marker_at + 2)
        length = end - at
        if length < 0 or end > size:
            return FALLBACK
        found, status = 0, OK
        if marker == _SCAN:
            status = _read_scan(data, at, length, header, quantizations, codes)
            if status == OK and not _is_ycc(header, is_jfif, is_adobe_ycc):
                return FALLBACK
            return status
        if marker == _QUANTIZATION:
            found = _read_quantization(data, at, end, quantization)
            quantizations |= found
        elif marker == _HUFFMAN:
            found = _read_huffman(data, at, end, tables)
            codes |= found
        elif marker == _FRAME:
            status = FALLBACK
            if header[COMPONENTS] == 0:
                status = _read_frame(data, at, length, header)
        elif marker == _RESTARTS:
            if length != 2:
                return FALLBACK
            header[INTERVAL] = _word(data, at)
        elif marker == _APP0:
            is_jfif = is_jfif or (length >= 14 and _begins_with(data, at, _JFIF))
        elif marker == _APP14:
            if length >= 12 and _begins_with(data, at, _ADOBE):
                is_adobe_ycc = data[at + 11] == _ADOBE_YCC
                if not is_adobe_ycc:
                    return FALLBACK
        elif marker != _COMMENT and not _APP0 <= marker <= _APP15:
            return FALLBACK
        if found < 0 or status != OK:
            return FALLBACK
        marker_at = end
