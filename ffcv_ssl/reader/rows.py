"""The allocation table of an open file, by columns: which row begins at a pointer, and whether rows
overlap."""

# N samples, R rows of the allocation table

from __future__ import annotations

import numpy as np

BLOCK = 1 << 18  # rows that are compared at once; bounds the memory of intermediate arrays


class Rows:
    """Columns, uint64 (R,): pointer, size, owner (the sample), checksum or None. sorted_pointer:
    ascending; by_pointer: the rows in that order, None for rows in order."""

    def __init__(self, table: np.ndarray, checksums: np.ndarray | None) -> None:
        self.pointer = np.ascontiguousarray(table["ptr"])
        self.size = np.ascontiguousarray(table["size"])
        self.owner = np.ascontiguousarray(table["sample_id"])
        self.checksum = checksums
        self.sorted_pointer = self.pointer
        self.by_pointer: np.ndarray | None = None
        if len(table) > 1 and not np.all(self.pointer[1:] > self.pointer[:-1]):
            # FFCV gives an empty payload the pointer of the next one: sort the longest row last
            self.by_pointer = np.lexsort((self.size, self.pointer))
            self.sorted_pointer = self.pointer[self.by_pointer]

    def find_overlap(self) -> tuple[int, int] | None:
        """Two rows that share bytes, or None. Empty rows share none, wherever they are."""
        for begin in range(0, len(self.pointer) - 1, BLOCK):
            rows = slice(begin, begin + BLOCK + 1)  # the last one begins the next block too
            pointer = self.sorted_pointer[rows]
            size = self.size[rows] if self.by_pointer is None else self.size[self.by_pointer[rows]]
            if np.any(pointer[:-1] + size[:-1] > pointer[1:]):
                return self._overlap_of_filled()
        return None

    def _overlap_of_filled(self) -> tuple[int, int] | None:
        order = np.arange(len(self.pointer)) if self.by_pointer is None else self.by_pointer
        order = order[self.size[order] != 0]
        pointer, size = self.pointer[order], self.size[order]
        found = np.flatnonzero(pointer[:-1] + size[:-1] > pointer[1:])
        return (int(order[found[0]]), int(order[found[0] + 1])) if len(found) else None

    def find(self, pointer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the rows that begin at these pointers, whether there is one). Where several
        rows begin at one pointer, the longest of them."""
        starts = self.sorted_pointer
        position = np.searchsorted(starts, pointer, side="right") - 1
        found = position >= 0
        if len(starts):
            found &= starts[np.maximum(position, 0)] == pointer
        return position if self.by_pointer is None else self.by_pointer[position], found

    def are_samples(self, pointer: np.ndarray) -> bool:
        """Whether row i is the payload of sample i, at these pointers, and none is empty: the
        table's columns are then the field's extents as they are."""
        is_simple = self.by_pointer is None and len(pointer) == len(self.pointer)
        return is_simple and bool(
            np.array_equal(pointer, self.pointer)
            and self.size.all()
            and np.array_equal(self.owner, np.arange(len(pointer), dtype=np.uint64))
        )
