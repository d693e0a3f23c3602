"""Mutants of small files, a few hundred of what `make torture` tries by the hundred thousand."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from support.process_limits import with_limited_memory
from torture.mutant_trials import memory_bound, try_loaded_mutant, try_many, try_mutant
from torture.mutants import Mutant
from torture.oracle import check_against_bytes
from torture.seeds import make_seeds

from ffcv_ssl import BetonError
from ffcv_ssl.reader import Reader


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def test_mutants_are_refused_or_read_as_other_programs_read_them(seeds):
    outcomes = try_many(seeds, 400, random.Random(0))
    assert outcomes.total() == 400 and min(outcomes.values()) > 5 and len(outcomes) == 3


def test_mutants_load_as_other_programs_read_them(seeds):
    outcomes = try_many(seeds, 80, random.Random(0), try_loaded_mutant)
    assert outcomes["loaded right"] > 5 and outcomes["refused"] > 5


def test_a_mutant_that_is_the_seed_itself_is_not_counted(seeds):
    draw, changed = random.Random(0), Counter()
    for data in [draw.randbytes(96) for _ in range(50)]:
        is_new = is_changed(seeds[0], data)
        assert (try_mutant(seeds[0], data) is not None) == is_new
        changed[is_new] += 1
    assert changed[True] > 30 and changed[False] > 0


def is_changed(seed, data):
    """Whether a mutant's file has other bytes than the seed's."""
    before = Path(seed.path).read_bytes()
    Mutant(seed, data).apply()
    try:
        return Path(seed.path).read_bytes() != before
    finally:
        seed.restore()


def test_the_oracle_sees_every_lie(seeds):
    """Each value that a reader could give wrongly, given wrongly."""
    (seed,) = [seed for seed in seeds if seed.path.endswith("/many.beton")]
    count, names, classes, made = seed.values["about"]
    check_against_bytes(seed, seed.values)
    lies = {
        "about": [
            (count - 1, names, classes, made),
            (count, names[::-1], classes, made),
            (count, names, {"label": ["dog", "cat", "owl"]}, made),
            (count, names, classes, {}),
        ],
        "names": [None, seed.values["names"][::-1]],
        "verified": [False],
        (0, "label"): [seed.values[0, "label"] + 1],
    }
    for key, value in ((key, value) for key, values in lies.items() for value in values):
        with pytest.raises(AssertionError):
            check_against_bytes(seed, {**seed.values, key: value})
    fewer = {key: value for key, value in seed.values.items() if key != (0, "label")}
    with pytest.raises(AssertionError):
        check_against_bytes(seed, fewer)


def test_the_oracle_takes_no_nan_for_another(seeds):
    (seed,) = [seed for seed in seeds if seed.path.endswith("/numbers.beton")]
    for wrong in (float("nan"), -seed.values[0, "x"]):
        with pytest.raises(AssertionError):
            check_against_bytes(seed, {**seed.values, (0, "x"): wrong})


@pytest.mark.parametrize("kind", ["jpg", "raw"])
@pytest.mark.parametrize("is_foreign", [False, True])
def test_small_files_that_claim_giant_images_are_refused_before_memory_is_taken(
    seeds, kind, is_foreign
):
    name = ("foreign_" if is_foreign else "") + {"jpg": "one", "raw": "raw"}[kind]
    (seed,) = [seed for seed in seeds if seed.path.endswith(f"/{name}.beton")]
    mutant = Mutant(seed, b"")
    mutant.parts = {name: bytearray(raw) for name, raw in seed.parts.items()}
    mutant.is_resealed, mutant.lies, mutant.end = True, [], None
    mutant.tell_sides(int(seed.extents[0].pointer[0]), 4096, 65535)
    if kind == "jpg":
        at = mutant.parts["payloads"].find(b"\xff\xc0") + 5
        mutant.parts["payloads"][at : at + 4] = (4096).to_bytes(2, "big") + b"\xff\xff"
    mutant.apply()
    try:
        with pytest.raises(BetonError, match=r"its few bytes|differs from that in the allocation"):
            with_limited_memory(64 << 20, lambda: Reader(seed.path))
    finally:
        seed.restore()
    assert memory_bound(mutant) < 128 << 20 < 3 * 4096 * 65535


def test_mutants_that_a_search_kept_are_refused_or_read_right(seeds):
    """Each of them took a branch of the reader that no other before it had taken."""
    kept = json.loads((Path(__file__).parent / "data" / "fuzz" / "mutants.json").read_text())
    by_name = {Path(seed.path).name: seed for seed in seeds}
    outcomes = {try_mutant(by_name[name], bytes.fromhex(text)) for name, text in kept}
    assert len(kept) > 40 and len(outcomes - {None}) == 3


def test_a_mutant_is_a_function_of_its_bytes(seeds):
    draw, different = random.Random(1), set()
    for data in [draw.randbytes(96) for _ in range(20)]:
        first, second = (Mutant(seeds[0], data) for _ in range(2))
        assert (first.parts, first.lies, first.end) == (second.parts, second.lies, second.end)
        different.add(repr((first.parts, first.lies, first.end)))
    assert len(different) > 15  # a few change nothing
