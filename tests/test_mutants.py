"""Mutants of small files, a few hundred of what `make torture` tries by the hundred thousand."""

import json
import random
from pathlib import Path

import pytest
from support.process_limits import with_limited_memory
from torture.mutants import Mutant, try_many, try_mutant
from torture.seeds import make_seeds

from ffcv_ssl import BetonError
from ffcv_ssl.reader import Reader


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def test_mutants_are_refused_or_read_as_other_programs_read_them(seeds):
    outcomes = try_many(seeds, 400, random.Random(0))
    assert min(outcomes.values()) > 5 and len(outcomes) == 3


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
    assert mutant.memory_bound() < 128 << 20 < 3 * 4096 * 65535


def test_mutants_that_a_search_kept_are_refused_or_read_right(seeds):
    """Each of them took a branch of the reader that no other before it had taken."""
    kept = json.loads((Path(__file__).parent / "data" / "fuzz" / "mutants.json").read_text())
    by_name = {Path(seed.path).name: seed for seed in seeds}
    outcomes = {try_mutant(by_name[name], bytes.fromhex(text)) for name, text in kept}
    assert len(kept) > 40 and len(outcomes) == 3


def test_a_mutant_is_a_function_of_its_bytes(seeds):
    draw, different = random.Random(1), set()
    for data in [draw.randbytes(96) for _ in range(20)]:
        first, second = (Mutant(seeds[0], data) for _ in range(2))
        assert (first.parts, first.lies, first.end) == (second.parts, second.lies, second.end)
        different.add(repr((first.parts, first.lies, first.end)))
    assert len(different) > 15  # a few change nothing
