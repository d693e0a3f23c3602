"""Mutants of small `.beton` files: sound files taken apart, changed on purpose, and put together
again, half of them with checksums that are right for the lie.

A mutant is a pure function of a seed file and a few bytes, so that a fuzzer can search these bytes
and a test can keep them. N samples.
"""

from __future__ import annotations

import json
import zlib

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.kernels.hash import xxh3_64
from torture.seeds import Seed

# fmt: off
HOSTILE = [
    0, 1, 2, 3, 7, 8, 12, 24, 127, 255, 256, 2**15, 2**16 - 1, 2**21, 2**31, 2**32 - 1, 2**32,
    2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 2**64 - 24,
]
TYPE_TEXTS = [
    b'[["", "<f8"]]', b'[["", "|O"]]', b'[["", "<U9"]]', b'[["", "|S8"]]', b'[["", "<f3"]]',
    b'[["a", "<f4"], ["b", "<f4"]]', b'[["", "<M8[s]"]]', b'[["", "|b1"]]', b"[[1, 2]]",
    b'[["", "<u2"]]', b'[["", "<c8"]]', b"[" * 600, b'[["", "|V4"]]', b'[["", "<m8[zz]"]]',
]
JSON_TEXTS = [b"[" * 300, b"1e999\0", b'{"a": NaN}\0', b"\xff\xfe\0", b"{}\0{}", b"no end mark" * 9]
JPEG_MARKERS = [0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE]
# fmt: on


class Choices:
    """Decisions taken from bytes; zeros after their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def bytes(self, count):
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")

    def below(self, bound):
        """0 to bound - 1."""
        if bound <= 1:
            return 0
        return int.from_bytes(self.bytes(1 if bound <= 256 else 4), "little") % bound

    def pick(self, options):
        return options[self.below(len(options))]

    def number(self, before=0):
        """A 64-bit number that is likely to break something, or near the one before."""
        kind = self.below(4)
        if kind == 0:
            return (before + self.below(64) - 32) % 2**64
        if kind == 1:
            return before ^ 1 << self.below(64)
        return self.pick(HOSTILE) if kind == 2 else self.below(2**21)


class Mutant:
    """A seed file after a few changes that `data` chooses."""

    def __init__(self, seed: Seed, data: bytes) -> None:
        self.seed, self.choose = seed, Choices(data)
        self.parts = {name: bytearray(raw) for name, raw in seed.parts.items()}
        self.end: int | None = None
        self.is_resealed = not seed.is_verified or self.choose.below(2) == 1
        self.lies: list[tuple[str, str, int]] = []
        changes = [
            self.change_bytes, self.change_header, self.change_metadata, self.change_metadata,
            self.change_row, self.change_descriptor, self.change_payload, self.change_payload,
            self.change_text, self.change_marks, self.cut, self.change_names,
        ]  # fmt: skip
        for _ in range(1 + self.choose.below(3)):
            self.choose.pick(changes)()

    # -- changes ----------------------------------------------------------------------------------

    def change_bytes(self):
        part = self.choose.pick(list(self.parts.values()))
        self.damage(part, 0, len(part))

    def damage(self, part, begin, end):
        """A flipped bit, other bytes, zeros, or a copy of another place."""
        if end <= begin:
            return
        at, kind = begin + self.choose.below(end - begin), self.choose.below(4)
        length = min(1 + self.choose.below(16), end - at)
        if kind == 0:
            part[at] ^= 1 << self.choose.below(8)
        elif kind == 1:
            part[at : at + length] = self.choose.bytes(length)
        elif kind == 2:
            part[at : at + length] = bytes(length)
        else:
            source = begin + self.choose.below(end - begin)
            length = min(length, end - source)
            part[at : at + length] = part[source : source + length]

    def set_number(self, part, at, size):
        before = int.from_bytes(part[at : at + size], "little")
        number = self.choose.number(before) % 256**size
        part[at : at + size] = number.to_bytes(size, "little")

    def set_field(self, part, dtype, name, row=0):
        kind, offset = dtype.fields[name][:2]
        self.set_number(part, row * dtype.itemsize + offset, kind.itemsize)

    def change_header(self):
        name = self.choose.pick(beton.HEADER_TYPE.names)
        self.set_field(self.parts["header"], beton.HEADER_TYPE, name)

    def change_row(self):
        if not self.seed.num_rows:
            return
        table, row = self.parts["table"], self.choose.below(self.seed.num_rows)
        if self.choose.below(4) == 0:  # two rows change places
            a, b = row * 24, self.choose.below(self.seed.num_rows) * 24
            table[a : a + 24], table[b : b + 24] = table[b : b + 24], table[a : a + 24]
        else:
            name = self.choose.pick(beton.ALLOC_ROW_TYPE.names)
            self.set_field(table, beton.ALLOC_ROW_TYPE, name, row)

    def change_metadata(self):
        part, dtype = self.parts["metadata"], self.seed.dtype
        row = self.choose.below(len(part) // dtype.itemsize)
        kind, offset = dtype.fields[self.choose.pick(dtype.names)][:2]
        at = row * dtype.itemsize + offset
        if kind.names:
            sub, sub_offset = kind.fields[self.choose.pick(kind.names)][:2]
            self.set_number(part, at + sub_offset, sub.itemsize)
        elif self.choose.below(2):
            self.set_number(part, at, kind.itemsize)
        else:  # the pointer of another sample
            other = self.choose.below(len(part) // dtype.itemsize) * dtype.itemsize + offset
            part[at : at + kind.itemsize] = part[other : other + kind.itemsize]

    def change_descriptor(self):
        part, size = self.parts["descriptors"], beton.DESCRIPTOR_TYPE.itemsize
        begin, kind = self.choose.below(self.seed.num_fields) * size, self.choose.below(5)
        if kind == 0:
            part[begin] = self.choose.pick([*range(8), 99, 255])
        elif kind == 1:
            other = self.choose.below(self.seed.num_fields) * size
            if self.choose.below(2):  # two fields of one name
                part[begin + 1 : begin + 17] = part[other + 1 : other + 17]
            else:
                self.damage(part, begin + 1, begin + 17)
        elif kind == 2:
            text = self.choose.pick(TYPE_TEXTS)
            length, at = len(text).to_bytes(8, "little"), begin + 17 + 256
            part[at : at + 8 + len(text)] = length + text
        elif kind == 3:  # an extent of the shape, or the length of the type
            self.set_number(part, begin + 17 + 8 * self.choose.below(33), 8)
        else:
            self.damage(part, begin + 17, begin + size)

    def change_payload(self):
        """Bytes of one payload; those of JPEGs by their markers."""
        extents = [e for e in self.seed.extents if e is not None]
        if not extents:
            return
        extent = self.choose.pick(extents)
        sample = self.choose.below(len(extent.pointer))
        begin = int(extent.pointer[sample]) - self.seed.first
        end = begin + int(extent.size[sample])
        part, kind = self.parts["payloads"], self.choose.below(6)
        if kind == 0 and part[begin : begin + 2] == b"\xff\xd8":
            self.change_frame_header(part, begin, end)
        elif kind == 1:
            self.set_marker(part, begin, end)
        elif kind == 2:
            text = self.choose.pick(JSON_TEXTS)[: end - begin]
            part[begin : begin + len(text)] = text
        elif kind == 3:  # another payload of any kind
            other = self.choose.pick(extents)
            source = int(other.pointer[self.choose.below(len(other.pointer))]) - self.seed.first
            source = max(0, source)  # that of an empty payload points before the pages
            count = min(end - begin, len(part) - source)
            part[begin : begin + count] = part[source : source + count]
        else:
            self.damage(part, begin, end)

    def change_frame_header(self, part, begin, end):
        """The JPEG's own size, and often the metadata's with it."""
        at = bytes(part[begin:end]).find(b"\xff\xc0")
        if at < 0:
            return
        at += begin + 5
        sides = [self.choose.pick([1, 2, 16, 64, 255, 1000, 4096, 65535]) for _ in range(2)]
        part[at : at + 4] = b"".join(side.to_bytes(2, "big") for side in sides)
        if self.choose.below(2):
            self.tell_sides(begin + self.seed.first, *sides)

    def tell_sides(self, pointer, height, width):
        metadata = np.frombuffer(self.parts["metadata"], self.seed.dtype)
        for name in metadata.dtype.names:
            column = metadata[name]
            if column.dtype.names and "width" in column.dtype.names:
                rows = column["data_ptr"] == pointer
                column["height"][rows], column["width"][rows] = height, width

    def set_marker(self, part, begin, end):
        if end - begin < 2:
            return
        at = begin + self.choose.below(end - begin - 1)
        part[at : at + 2] = bytes([0xFF, self.choose.pick(JPEG_MARKERS)])

    def change_text(self):
        if "text" not in self.parts:
            return
        text, kind = self.parts["text"], self.choose.below(6)
        if kind == 0:
            self.damage(text, 0, len(text))
        elif kind == 1:
            text[:] = self.choose.pick([b"", b"[]", b"{", b"[" * 3000, b'{"made": {}}', b"\xff"])
        elif kind == 2:
            names = self.choose.pick([5, ["a", 1], {}, None, "ab", [["a"]]])
            text[:] = json.dumps({"class_names": {"label": names}, "made": {}}).encode()
        else:
            document = json.loads(self.seed.parts["text"])
            place = document.get("names") or {"offset": 0, "packed_bytes": 0}
            place = {**place, self.choose.pick([*place, "more"]): self.choose.number()}
            document["names"] = self.choose.pick([place, place, place, 5, [], {}])
            text[:] = json.dumps(document).encode()

    def change_names(self):
        """Other names than were packed, in their place."""
        if "text" not in self.parts:
            return
        document = json.loads(self.seed.parts["text"])
        place = document.get("names")
        if place is None:
            return
        text = self.choose.pick([b"", b"a", b"a\0" * 300, bytes(100_000), b"\xff\0\xff", b"a\0b"])
        packed = self.choose.pick([zlib.compress(text), zlib.compress(text)[:-5], text])
        packed = packed[: place["packed_bytes"]]
        begin = place["offset"] - self.seed.first
        self.parts["payloads"][begin : begin + len(packed)] = packed
        place["packed_bytes"], place["packed_hash"] = len(packed), xxh3_64(packed)
        place["text_bytes"] = self.choose.pick([len(text), len(text) + 1, 2**20])
        document["names"] = place
        self.parts["text"][:] = json.dumps(document).encode()

    def change_marks(self):
        which = self.choose.pick(["locator", "footer"])
        dtype = beton.LOCATOR_TYPE if which == "locator" else beton.FOOTER_TYPE
        self.lies.append((which, self.choose.pick(dtype.names), self.choose.number()))

    def cut(self):
        size = self.seed.first + len(self.seed.tail)
        kind = self.choose.below(3)
        if kind == 0:
            self.end = self.choose.below(size)
        elif kind == 1:
            self.end = size - self.choose.below(400)
        else:
            self.end = size + self.choose.below(100)

    # -- putting together -------------------------------------------------------------------------

    def apply(self) -> bool:
        """Write the mutant over the seed's file; whether the two differ."""
        head, tail = self.content()
        seed, size = self.seed, self.seed.first + len(tail)
        seed.write(head, tail, self.end)
        is_whole = self.end is None or self.end == size
        return (head, tail, is_whole) != (seed.head, seed.tail, True)

    def content(self) -> tuple[bytes, bytes]:
        """The bytes before the pages, and those from the first page on."""
        parts, seed = self.parts, self.seed
        head = b"".join(parts[name] for name in ("header", "descriptors", "metadata"))
        if not seed.is_verified:
            return head.ljust(len(seed.head), b"\0"), bytes(parts["payloads"] + parts["table"])
        if self.is_resealed:
            locator, section = self.sealed()
        else:
            at = len(seed.tail) - len(seed.parts["table"])
            locator = seed.head[-beton.LOCATOR_TYPE.itemsize :]
            section = seed.tail[len(seed.parts["payloads"]) + seed.text_bytes : at]
            section = bytes(parts["text"]) + section
        locator, section = self.with_lies(locator, section)
        head = b"".join(parts[name] for name in ("header", "descriptors", "metadata")) + locator
        return head, bytes(parts["payloads"]) + section + bytes(parts["table"])

    def sealed(self):
        """Marks and checksums that are right for what the parts say now."""
        parts, seed = self.parts, self.seed
        text = bytes(parts["text"])
        section_offset = seed.first + len(parts["payloads"])
        table_offset = section_offset + beton.section_bytes(text, seed.num_rows)
        if parts["header"][16:24] == seed.parts["header"][16:24]:
            parts["header"][16:24] = table_offset.to_bytes(8, "little")
        rows = np.frombuffer(bytes(parts["table"]), beton.ALLOC_ROW_TYPE)
        payloads = bytes(parts["payloads"])
        checksums = [
            xxh3_64(payloads[max(0, int(row["ptr"]) - seed.first) :][: int(row["size"])])
            for row in rows
        ]
        names = ("header", "descriptors", "metadata", "table")
        return beton.pack_integrity(
            seed.regions, section_offset, table_offset, text, np.array(checksums, np.uint64),
            {name: bytes(parts[name]) for name in names},
        )  # fmt: skip

    def with_lies(self, locator, section):
        size = beton.FOOTER_TYPE.itemsize
        marks = {
            "locator": np.frombuffer(bytearray(locator), beton.LOCATOR_TYPE),
            "footer": np.frombuffer(bytearray(section[-size:]), beton.FOOTER_TYPE),
        }
        for which, name, number in self.lies:
            mark = marks[which]
            mark[name] = b"FFCV-SSL:nothing" if name == "magic" else number
            if self.is_resealed and name != "own_hash":
                beton._seal(mark)
                if which == "footer":
                    marks["locator"]["footer_hash"] = mark["own_hash"]
                    beton._seal(marks["locator"])
        return marks["locator"].tobytes(), section[:-size] + marks["footer"].tobytes()
