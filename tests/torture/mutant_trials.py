"""Mutants of small `.beton` files, read by a reader and by a loader: refused, or read as an oracle
reads their bytes, in an amount of memory that their size bounds.
"""

# N samples, H W pixels

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import reference
from support.process_limits import with_limited_memory

from ffcv_ssl import BetonError, Loader, beton
from ffcv_ssl.fields import BytesField, JSONField
from ffcv_ssl.reader import Reader
from torture.mutants import Mutant
from torture.oracle import check_against, check_against_bytes, checked, read_values
from torture.seeds import CROP_PX, Seed

LOADER_BYTES = 1 << 30
"""Of address space, beyond what reading takes: the stacks and arenas of a loader's threads."""
NUM_BATCHES, BATCH_SIZE = 30, 3


def memory_bound_bytes(file_bytes: int, payload_bytes: int, limit_px: int) -> int:
    """What reading a file may take beyond what the process has, in bytes.

    file_bytes: of the whole file; what is said of its samples is in memory eight times at most.
    payload_bytes: of the largest payload; no image of more than 1,024 pixels a byte is accepted,
    nor one of more than limit_px, and its pixels are in memory twice. The rest, 48 MiB, is the
    allocator's.
    """
    pixels = min(limit_px, 1024 * min(payload_bytes, file_bytes))
    return (48 << 20) + 8 * file_bytes + 2 * 3 * pixels


def memory_bound(mutant: Mutant) -> int:
    """Of reading a mutant, in bytes; rows that leave the file promise no payload."""
    file_bytes = mutant.seed.first + len(mutant.seed.tail)
    rows = np.frombuffer(bytes(mutant.parts["table"]), beton.ALLOC_ROW_TYPE)
    sizes = rows["size"][rows["size"] <= file_bytes]
    return memory_bound_bytes(file_bytes, int(sizes.max(initial=0)), beton.MAX_IMAGE_PX)


def try_mutant(seed: Seed, data: bytes) -> str | None:
    """Make the mutant, read it, and say what happened; None for a mutant that is the seed itself.
    Raises AssertionError for a wrong value, and lets out what is no BetonError."""
    mutant = Mutant(seed, data)
    try:
        if not mutant.apply():
            return None
        values = right_values(mutant)
    except BetonError as error:
        checked(error)
        return "refused at opening"
    finally:
        seed.restore()
    return "refused at a sample" if has_errors(values) else "read right"


def right_values(mutant: Mutant) -> dict:
    """What a reader says of an applied mutant, after the oracle has agreed. Raises BetonError where
    it is refused, AssertionError for a wrong value."""
    seed = mutant.seed
    values = with_limited_memory(memory_bound(mutant), lambda: read_values(seed.path))
    if mutant.is_resealed or not values["verified"]:  # both marks gone: a file of FFCV's
        check_against_bytes(seed, values)
    else:
        check_against(seed.values, values)
    return values


def has_errors(values: dict) -> bool:
    return any(isinstance(value, BetonError) for value in values.values())


def try_loaded_mutant(seed: Seed, data: bytes) -> str | None:
    """Make the mutant, load an epoch of it, and say what happened; None for a mutant that is the
    seed itself. Raises AssertionError for a row that is not its sample's, and for an error without
    a cause in the file."""
    mutant = Mutant(seed, data)
    try:
        return load_mutant(mutant) if mutant.apply() else None
    finally:
        seed.restore()


def load_mutant(mutant: Mutant) -> str:
    seed, rows, refusal = mutant.seed, {}, None
    try:
        limit_bytes = memory_bound(mutant) + LOADER_BYTES
        rows = with_limited_memory(limit_bytes, lambda: load_rows(seed))
    except BetonError as error:
        refusal = checked(error)
    except ValueError as error:
        assert "\n" not in str(error), f"not one line: {error}"
        same_fields = mutant.parts["descriptors"] == seed.parts["descriptors"]
        assert not same_fields or mutant.parts["header"] != seed.parts["header"], error
        return "refused: the pipelines do not fit its fields"
    try:
        values = right_values(mutant)
    except BetonError as error:
        assert refusal is not None, f"loaded, but a reader refuses it: {error}"
        return "refused"
    assert refusal is None or has_errors(values), f"a reader reads it: {refusal}"
    if refusal is None:
        check_rows(seed, values, rows)
    return "loaded right" if refusal is None else "refused"


def load_rows(seed: Seed) -> dict[int, list[Any]]:
    """An epoch through a loader, at most NUM_BATCHES: {sample: its row of each field}."""
    rows: dict[int, list[Any]] = {}
    settings = {"pipelines": seed.crops, "drop_last": False}
    with Loader(seed.path, BATCH_SIZE, num_workers=1, seed=1, **settings) as loader:
        for batch in islice(loader, NUM_BATCHES):
            for number in np.flatnonzero(batch.valid.numpy()):
                sample = int(batch.indices[number])
                assert sample not in rows, f"sample {sample} comes twice"
                rows[sample] = [values[number].numpy() for values in batch]
    return rows


def check_rows(seed: Seed, values: dict, rows: dict[int, list[Any]]) -> None:
    """Raise AssertionError unless the rows are those of the first samples, and each is what the
    sample's values give: the view of an image, the bytes of any other value."""
    num_samples, names = values["about"][:2]
    assert sorted(rows) == list(range(min(num_samples, NUM_BATCHES * BATCH_SIZE))), sorted(rows)
    with Reader(seed.path) as reader:
        for sample, name in (key for key in values if isinstance(key, tuple)):
            row, value = rows[sample][names.index(name)], values[sample, name]
            field = reader.fields[name]
            if name in seed.crops:
                check_view(row, value, f"sample {sample}, {name}")
            elif isinstance(field, BytesField):
                payload = reader.read(sample, name)
                right = row.tobytes() == payload.ljust(len(row), b"\0")
                assert right, f"sample {sample}, {name}: other bytes"
                if isinstance(field, JSONField) and not isinstance(value, BetonError):
                    assert repr(field.unpack(row)) == repr(value)
            else:
                assert row.tobytes() == np.asarray(value).tobytes(), f"sample {sample}, {name}"


def check_view(view: np.ndarray, image: np.ndarray, where: str) -> None:
    """Raise AssertionError unless a view (H, W, 3) is the central square of an image, resized; one
    level off is a rounding."""
    height, width, _ = image.shape
    side = min(height, width)
    box = (height - side) // 2, (width - side) // 2, side, side
    expected = 255 * reference.resized_crop(image / 255, box, CROP_PX)
    assert view.shape == expected.shape and view.dtype == np.uint8, f"{where}: {view.shape}"
    worst = np.abs(view - expected).max()
    assert worst <= 1, f"{where}: a view that is {worst:.1f} levels off"


Attempt = Callable[[Seed, bytes], "str | None"]
"""`try_mutant` or `try_loaded_mutant`."""


def try_new_mutant(seed: Seed, choose: random.Random, attempt: Attempt, is_resealed: bool) -> str:
    """What a mutant of the seed came to; one that is the seed itself is drawn again. is_resealed:
    of a seed with checksums, whether they are made right for the change."""
    while True:
        data = bytes([choose.randrange(128) * 2 + is_resealed]) + choose.randbytes(95)
        try:
            outcome = attempt(seed, data)
        except Exception as error:
            name = os.path.basename(seed.path)
            raise AssertionError(f"{name} {data.hex()}: {type(error).__name__}: {error}") from error
        if outcome is not None:
            return outcome


def try_many(
    seeds: list[Seed], count: int, choose: random.Random, attempt: Attempt = try_mutant
) -> Counter:
    """Outcomes of `count` mutants. Of four, two have checksums that are right for the change, one
    the seed's, one none. Files of many samples take long and get every twentieth turn."""
    outcomes: Counter = Counter()
    for number in range(count):
        is_verified, is_resealed = number % 4 != 3, number % 4 < 2
        is_large = number % 20 == number // 20 % 4
        kind = is_verified, is_large
        wanted = [seed for seed in seeds if (seed.is_verified, len(seed.values) >= 50) == kind]
        outcomes[try_new_mutant(choose.choice(wanted), choose, attempt, is_resealed)] += 1
    return outcomes
