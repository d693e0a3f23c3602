"""Hostile JPEGs through this library's decoder, between pages that nobody may touch.

In a whole run the kernels check every index of arrays, too (NUMBA_BOUNDSCHECK).
"""

from __future__ import annotations

import os

from torture import frame

if not frame.IS_QUICK:
    os.environ.setdefault("NUMBA_BOUNDSCHECK", "1")  # before numba is imported

import functools
import random
from collections import Counter

import numpy as np
import simplejpeg
from support.guarded import Guarded

from ffcv_ssl.fields.image_codec import jpeg_header
from ffcv_ssl.kernels.jpeg import MARGIN, JpegDecoder, work_bytes
from torture.frame import Trial, fault
from torture.jpeg_mutants import mutant, seeds

MAX_PX = 400
"""A side of more is left to simplejpeg's own limits."""
MAX_BYTES = 1 << 16
NUM_MUTANTS = 2000


@functools.cache
def memory() -> dict[str, Guarded]:
    """Guarded memory by name."""
    sizes = {
        "data": MAX_BYTES, "pixels": 3 * MAX_PX * MAX_PX + MARGIN,
        "work": work_bytes(MAX_BYTES, MAX_PX, MAX_PX),
    }  # fmt: skip
    return {name: Guarded(size) for name, size in sizes.items()}


@functools.cache
def decoder() -> JpegDecoder:
    """A decoder whose own arrays are guarded, too."""
    made = JpegDecoder()
    arrays = []
    for array in made._arrays:
        place = Guarded(array.nbytes).at_end(array.nbytes).view(array.dtype).reshape(array.shape)
        place[...] = array
        arrays.append(place)
    made._arrays = tuple(arrays)
    return made


def decoded(data: bytes, shape: tuple[int, int], box, to_end: bool, at_end: bool):
    """(whether the decoder takes a JPEG, its pixels (H, W, 3))."""

    def take(name, size):
        found = memory()[name]
        return found.at_end(size) if at_end else found.at_begin(size)

    given = take("data", len(data))
    given[:] = np.frombuffer(data, np.uint8)
    pixels = take("pixels", 3 * shape[0] * shape[1] + MARGIN)
    work = take("work", work_bytes(len(data), *shape))
    is_taken = decoder().decode(given, shape, box, to_end, pixels, work)
    return is_taken, pixels[: 3 * shape[0] * shape[1]].reshape(*shape, 3)


def expected(data: bytes) -> np.ndarray | str:
    """What simplejpeg makes of a JPEG, strictly: pixels, or why it does not."""
    try:
        jpeg_header(data)
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        return str(error)


def try_mutant(data: bytes, choose: random.Random) -> str:
    """Decode a mutant, whole and a box of it. Raises AssertionError where it is taken and
    simplejpeg refuses it, or makes other pixels of it."""
    try:
        shape = jpeg_header(data)[:2]
    except ValueError:
        shape = (8, 8)
    if max(shape) > MAX_PX or len(data) > MAX_BYTES:
        return "too large to try"
    at_end, whole = choose.random() < 0.5, (0, 0, *shape)
    is_taken, pixels = decoded(data, shape, whole, True, at_end)
    pixels, truth = pixels.copy(), expected(data)
    top, left = (choose.randrange(side) for side in shape)
    box = (top, left, choose.randint(top + 1, shape[0]), choose.randint(left + 1, shape[1]))
    box_taken, in_box = decoded(data, shape, box, choose.random() < 0.5, at_end)
    if isinstance(truth, str):
        assert not is_taken, f"taken, but simplejpeg says {truth}"
        return "refused by both"
    assert not is_taken or np.array_equal(pixels, truth), "other pixels"
    inside = (slice(box[0], box[2]), slice(box[1], box[3]))
    assert not box_taken or np.array_equal(in_box[inside], truth[inside]), "other pixels in a box"
    return "equal pixels" if is_taken else "left to simplejpeg"


@fault("mutated JPEGs through our decoder", quick=1, full=500, limit_s=600)
def mutated_jpegs(trial: Trial) -> Counter:
    """A damaged JPEG of any sampling is left to simplejpeg, or gives simplejpeg's pixels, whole and
    in any box; none that simplejpeg refuses is taken. No byte outside the given memory is read or
    written: it lies between pages that nobody may touch."""
    choose = random.Random(int(trial.random.integers(2**62)))
    seen: Counter = Counter()
    for _ in range(NUM_MUTANTS):
        data = mutant(choose.choice(seeds()), choose)
        try:
            seen[try_mutant(data, choose)] += 1
        except AssertionError as error:
            raise AssertionError(f"{error}: {data.hex()}") from None
    return seen
