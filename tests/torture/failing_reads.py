"""Reading `.beton` files from a disk that fails: errors, short reads, files cut while open."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
from unittest import mock

from ffcv_ssl import BetonError
from ffcv_ssl.fields import BytesField, Field
from ffcv_ssl.reader import Reader
from torture.oracle import check_against, checked, read_values
from torture.seeds import Seed

KINDS = ("an error", "a short read", "short reads from then on", "the file ends")


class FailingReads:
    """os.preadv that fails in a way (one of KINDS, or none: "") at its call number `at`, or from
    then on. sizes: of the reads that were asked for. num_faults: calls that failed."""

    def __init__(self, kind: str = "", at: int = 0) -> None:
        self.kind, self.at = kind, at
        self.sizes: list[int] = []
        self.num_faults = 0
        self._read = os.preadv

    def __call__(self, fd, buffers, offset):
        number, (buffer,) = len(self.sizes), buffers
        self.sizes.append(len(buffer))
        is_sound = number < self.at or (number > self.at and self.kind in KINDS[:2])
        if not self.kind or is_sound:
            return self._read(fd, [buffer], offset)
        self.num_faults += 1
        if self.kind == "an error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.kind == "the file ends":
            return 0
        return self._read(fd, [buffer[: (len(buffer) + 1) // 2]], offset)


@functools.cache
def sound_reads(path: str) -> list[int]:
    """The sizes of the reads that a sound file takes, in order."""
    with mock.patch.object(os, "preadv", FailingReads()) as reads:
        read_values(path)
    return reads.sizes


def try_failing_read(seed: Seed, choose: random.Random) -> str:
    """Read a sound file where one read fails. Raises AssertionError where a read that gave nothing
    is not told, and where short reads do not lead to the right values."""
    kind, sizes = choose.choice(KINDS), sound_reads(seed.path)
    least = 2 if "short" in kind else 1  # a read of one byte cannot be short
    at = choose.choice([number for number, size in enumerate(sizes) if size >= least])
    reads, outcome = FailingReads(kind, at), "read right"
    with mock.patch.object(os, "preadv", reads):
        try:
            values = read_values(seed.path)
        except BetonError as error:
            checked(error)
            values, outcome = {}, "refused at opening"
    assert reads.num_faults, f"read {at} of {len(sizes)} was not reached"
    check_against(seed.values, values)
    if any(isinstance(value, BetonError) for value in values.values()):
        outcome = "refused at a sample"
    assert (outcome == "read right") == ("short" in kind), f"{kind} at read {at}: {outcome}"
    return outcome


def try_wrong_questions(seed: Seed) -> None:
    """Fields and samples that a file does not have, and a file that is closed twice."""
    with Reader(seed.path) as reader:
        name = reader.field_names[0]
        for sample in (-1, reader.num_samples, 2**63):
            try:
                reader.read(sample, name)
            except IndexError as error:
                assert "\n" not in str(error)
            else:
                raise AssertionError(f"sample {sample} was read")
        for ask in (reader.field_metadata, reader.extents):
            try:
                ask("no such field")
            except BetonError as error:
                checked(error)
            else:
                raise AssertionError("a field that is not there was found")
        assert reader.handlers is reader.fields
        reader.close()
    Reader(seed.path).__del__()


class Promiseless(BytesField):
    """Bytes whose sizes only the allocation table tells, as of a custom field of FFCV's."""

    expected_sizes = Field.expected_sizes

    @staticmethod
    def from_binary(binary):
        return Promiseless()


def try_custom_fields(seed: Seed) -> None:
    """Byte strings read as a custom field's are those of the sound file, or refused: where a
    payload has no bytes, its pointer may be another sample's."""
    custom = {name: Promiseless for (_, name), v in read_samples(seed) if isinstance(v, bytes)}
    with contextlib.suppress(BetonError), Reader(seed.path, custom) as reader:
        for sample, name in ((s, n) for (s, n), _ in read_samples(seed) if n in custom):
            assert reader.decode(sample, name) == seed.values[sample, name]


def read_samples(seed: Seed):
    return [(key, value) for key, value in seed.values.items() if isinstance(key, tuple)]


def try_no_file(folder) -> None:
    """What is no regular file is refused, at once."""
    os.mkfifo(f"{folder}/pipe")
    for path in (f"{folder}/pipe", str(folder)):
        try:
            Reader(path)
        except BetonError as error:
            checked(error)
        else:
            raise AssertionError(f"{path} was opened")
    os.remove(f"{folder}/pipe")
