"""A plain baseline JPEG decoder, bit by bit and block by block: the twin of kernels/jpeg.

Follows ITU-T T.81 for the scan, and libjpeg for what the standard leaves open: its accurate integer
transform, its triangle filter for chroma, and 16 bits of fraction for colour.
"""

import numpy as np

ZIGZAG = sorted(
    ((i, j) for i in range(8) for j in range(8)),
    key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
)
"""(row, column) of the k-th coefficient."""


def segments(data):
    """[(marker, content)] up to the scan's, whose content is followed by all bytes behind it."""
    at, found = 2, []
    while True:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, data[at + 4 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            return found, data[at:]


def codes_of(counts, symbols):
    """{(length, code): symbol} of a Huffman table."""
    code, found, number = 0, {}, 0
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            found[length, code] = symbols[number]
            code, number = code + 1, number + 1
        code <<= 1
    return found


class Bits:
    """The bits of a scan; `restart` goes on behind the next restart marker."""

    def __init__(self, data):
        self.data, self.at, self.left, self.byte = data, 0, 0, 0

    def bit(self):
        if self.left == 0:
            self.byte, self.left = self.data[self.at], 8
            self.at += 2 if self.byte == 0xFF else 1
        self.left -= 1
        return (self.byte >> self.left) & 1

    def number(self, size):
        value = 0
        for _ in range(size):
            value = 2 * value + self.bit()
        return value

    def signed(self, size):
        value = self.number(size)
        return value if size == 0 or value >> (size - 1) else value - (1 << size) + 1

    def symbol(self, codes):
        length, code = 0, 0
        while (length, code) not in codes:
            length, code = length + 1, 2 * code + self.bit()
        return codes[length, code]

    def restart(self):
        self.left = 0
        assert self.data[self.at] == 0xFF and 0xD0 <= self.data[self.at + 1] <= 0xD7
        self.at += 2


def coefficients(bits, dc_codes, ac_codes, before):
    """A block, int64 (8, 8), and its DC coefficient."""
    block = np.zeros((8, 8), np.int64)
    block[0, 0] = before + bits.signed(bits.symbol(dc_codes))
    k = 1
    while k < 64:
        run, size = divmod(bits.symbol(ac_codes), 16)
        if size == 0 and run < 15:
            break
        k += run
        block[ZIGZAG[k]] = bits.signed(size)
        k += 1
    return block, block[0, 0]


def one_pass(x, bits):
    """libjpeg's jidctint along the first axis, int64 (8, ...)."""
    z1 = (x[2] + x[6]) * 4433
    even = [
        ((x[0] + x[4]) << 13) + z1 + x[2] * 6270, ((x[0] - x[4]) << 13) + z1 - x[6] * 15137,
        ((x[0] - x[4]) << 13) - z1 + x[6] * 15137, ((x[0] + x[4]) << 13) - z1 - x[2] * 6270,
    ]  # fmt: skip
    z5 = (x[7] + x[3] + x[5] + x[1]) * 9633
    z3, z4 = z5 - (x[7] + x[3]) * 16069, z5 - (x[5] + x[1]) * 3196
    z1, z2 = -(x[7] + x[1]) * 7373, -(x[5] + x[3]) * 20995
    odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4,
           x[7] * 2446 + z1 + z3]  # fmt: skip
    values = [e + o for e, o in zip(even, odd)] + [e - o for e, o in zip(even[::-1], odd[::-1])]
    return (np.stack(values) + (1 << (bits - 1))) >> bits


def samples_of(block):
    """uint8 (8, 8) of dequantized coefficients."""
    return np.clip(one_pass(one_pass(block, 11).T, 18).T + 128, 0, 255)


def upsampled(plane, down, across):
    """libjpeg's triangle filter: int64 (H, W) -> (down H, across W)."""
    sums = plane
    if down == 2:
        above, below = np.vstack([plane[:1], plane[:-1]]), np.vstack([plane[1:], plane[-1:]])
        sums = np.stack([3 * plane + above, 3 * plane + below], axis=1).reshape(-1, plane.shape[1])
    if across == 1:
        return sums
    left, right = np.hstack([sums[:, :1], sums[:, :-1]]), np.hstack([sums[:, 1:], sums[:, -1:]])
    bits, even, odd = (4, 8, 7) if down == 2 else (2, 1, 2)
    pair = [(3 * sums + left + even) >> bits, (3 * sums + right + odd) >> bits]
    return np.stack(pair, axis=2).reshape(len(sums), -1)


def decode(data):
    """A baseline JPEG (bytes) as uint8 (H, W, 3)."""
    steps, dc, ac, interval = {}, {}, {}, 0
    found, scan = segments(data)
    for marker, content in found:
        if marker == 0xDB:
            for at in range(0, len(content), 65):
                steps[content[at]] = np.zeros((8, 8), np.int64)
                for place, step in zip(ZIGZAG, content[at + 1 : at + 65]):
                    steps[content[at]][place] = step
        if marker == 0xC4:
            at = 0
            while at < len(content):
                counts = content[at + 1 : at + 17]
                symbols = content[at + 17 : at + 17 + sum(counts)]
                (ac if content[at] >> 4 else dc)[content[at] & 15] = codes_of(counts, symbols)
                at += 17 + sum(counts)
        if marker == 0xC0:
            height, width = (int.from_bytes(content[at : at + 2], "big") for at in (1, 3))
            parts = [content[at : at + 3] for at in range(6, len(content), 3)]
        if marker == 0xDD:
            interval = int.from_bytes(content, "big")
        if marker == 0xDA:
            tables = [divmod(content[at], 16) for at in range(2, 2 + 2 * content[0], 2)]
    factors = [divmod(part[1], 16) for part in parts] if len(parts) == 3 else [(1, 1)]
    across, down = factors[0]
    rows, columns = -(-height // (8 * down)), -(-width // (8 * across))
    planes = [np.zeros((8 * v * rows, 8 * h * columns), np.int64) for h, v in factors]
    bits, before = Bits(scan), [0] * len(parts)
    for mcu in range(rows * columns):
        if interval and mcu and mcu % interval == 0:
            bits.restart()
            before = [0] * len(parts)
        for c, (h, v) in enumerate(factors):
            for i in range(v):
                for j in range(h):
                    codes = dc[tables[c][0]], ac[tables[c][1]]
                    block, before[c] = coefficients(bits, *codes, before[c])
                    top, left = 8 * (v * (mcu // columns) + i), 8 * (h * (mcu % columns) + j)
                    samples = samples_of(block * steps[parts[c][2]])
                    planes[c][top : top + 8, left : left + 8] = samples
    y = planes[0][:height, :width]
    if len(parts) == 1:
        return np.stack([y] * 3, axis=2).astype(np.uint8)
    size = -(-height // down), -(-width // across)
    cb, cr = (upsampled(p[: size[0], : size[1]], down, across) - 128 for p in planes[1:])
    cb, cr = cb[:height, :width], cr[:height, :width]
    half = 1 << 15
    rgb = [y + ((91881 * cr + half) >> 16), y + ((-22554 * cb - 46802 * cr + half) >> 16),
           y + ((116130 * cb + half) >> 16)]  # fmt: skip
    return np.clip(np.stack(rgb, axis=2), 0, 255).astype(np.uint8)
