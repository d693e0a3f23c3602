"""Reading `.beton` files from a disk that fails: errors, short reads, files cut while open."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from unittest import mock

from ffcv_ssl import BetonError
from ffcv_ssl.fields import BytesField, Field
from ffcv_ssl.reader import Reader
from torture.oracle import check_against, checked, read_values
from torture.seeds import Seed

KINDS = ("an error", "a short read", "short reads from then on", "the file ends")


def failing_preadv(kind: str, at: int):
    """os.preadv that fails in a way at its call number `at`, or from then on."""
    read, numbers = os.preadv, iter(range(1 << 62))

    def preadv(fd, buffers, offset):
        number, (buffer,) = next(numbers), buffers
        if number < at or (number > at and kind in ("an error", "a short read")):
            return read(fd, [buffer], offset)
        if kind == "an error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return (
            0 if kind == "the file ends" else read(fd, [buffer[: (len(buffer) + 1) // 2]], offset)
        )

    return preadv


def try_failing_read(seed: Seed, choose: random.Random) -> str:
    """Read a sound file where one read fails: its values, or BetonErrors in their place."""
    kind = choose.choice(KINDS)
    with mock.patch.object(os, "preadv", failing_preadv(kind, choose.randrange(40))):
        try:
            values = read_values(seed.path)
        except BetonError as error:
            checked(error)
            assert "short" not in kind, f"{kind}: {error}"
            return "refused at opening"
    check_against(seed.values, values)
    is_bad = any(isinstance(value, BetonError) for value in values.values())
    assert not (is_bad and "short" in kind), f"{kind}: not read to its end"
    return "refused at a sample" if is_bad else "read right"


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
