"""What a source of images gives to the writer, and how a part of it is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffcv_ssl.errors import SourceError
from ffcv_ssl.fields import Field


@dataclass(frozen=True)
class Source:
    """An indexed dataset, and what its `.beton` file says about it."""

    dataset: Any
    """`dataset[i]` is (image, one value for each of `fields`); `len(dataset)` samples."""
    fields: dict[str, Field]
    """The fields beside the image, in the order of a sample's values."""
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the labels 0, 1, ... of a field, by field name."""
    made: dict[str, Any] = field(default_factory=dict)
    """How the samples came about, kept in the file; serialisable as JSON, no absolute paths."""
    names: Sequence[str] | None = None
    """A file name for each sample, relative and with `/`; None where samples are not files."""
    is_generated: bool = False
    """Images are drawn at the size that the user chose, so no resolution limit applies."""
    remarks: Sequence[str] = ()
    """What looks like a mistake and may be none; a line each."""

    def place(self, index: int) -> str:
        """Where sample `index` comes from, for messages."""
        return f"sample {index}" if self.names is None else self.names[index]


def select(
    source: Source,
    subset_lines: Iterable[str] | None = None,
    limit: int | None = None,
    where: str = "subset",
) -> list[int]:
    """Indices of the samples to write, ascending.

    subset_lines: lines of a subset file: indices, or file names with or without their folders;
    blank lines and lines that start with # are skipped. limit: largest number of samples; they are
    spread evenly, because the first ones of a sorted folder would all be of one class. where: name
    of the subset file. Raises SourceError for a line that names no sample, and for an empty choice.
    """
    chosen = list(range(len(source.dataset)))
    if subset_lines is not None:
        chosen = _subset(source, subset_lines, where)
    if limit is not None and limit < len(chosen):
        if limit < 1:
            raise SourceError(f"limit: got {limit}, expected at least 1")
        chosen = [chosen[k * len(chosen) // limit] for k in range(limit)]
    return chosen


def _subset(source: Source, lines: Iterable[str], where: str) -> list[int]:
    entries = [line.strip() for line in lines]
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise SourceError(f"{where}: no entries, expected one sample per line")
    num_samples = len(source.dataset)
    if all(entry.isdecimal() for entry in entries):
        indices = {int(entry) for entry in entries}
        if max(indices) >= num_samples:
            raise SourceError(
                f"{where}: got index {max(indices)}, expected 0 to {num_samples - 1}, the samples "
                "of the source"
            )
        return sorted(indices)
    if source.names is None:
        entry = next(entry for entry in entries if not entry.isdecimal())
        raise SourceError(
            f"{where}: got {entry!r}, expected indices, as the samples of this source have no names"
        )
    return _named(source.names, entries, where)


def _named(names: Sequence[str], entries: list[str], where: str) -> list[int]:
    by_name = {name: [index] for index, name in enumerate(names)}
    for index, name in enumerate(names):
        if "/" in name:
            by_name.setdefault(name.rsplit("/", 1)[1], []).append(index)
    missing = [entry for entry in entries if entry not in by_name]
    if missing:
        raise SourceError(
            f"{where}: {len(missing)} of {len(entries)} names are not in the source, the first is "
            f"{missing[0]!r}; expected names such as {names[0]!r}"
        )
    for entry in entries:
        if len(by_name[entry]) > 1:
            first, second = (names[index] for index in by_name[entry][:2])
            raise SourceError(
                f"{where}: got {entry!r}, expected one path: it may be {first} or {second}"
            )
    return sorted({by_name[entry][0] for entry in entries})
