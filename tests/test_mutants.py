"""Mutants of small files, a few hundred of what `make torture` tries by the hundred thousand."""

import random

import pytest
from torture.mutants import Mutant, try_many
from torture.seeds import make_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def test_mutants_are_refused_or_read_as_other_programs_read_them(seeds):
    outcomes = try_many(seeds, 400, random.Random(0))
    assert min(outcomes.values()) > 5 and len(outcomes) == 3


def test_a_mutant_is_a_function_of_its_bytes(seeds):
    draw, different = random.Random(1), set()
    for data in [draw.randbytes(96) for _ in range(20)]:
        first, second = (Mutant(seeds[0], data) for _ in range(2))
        assert (first.parts, first.lies, first.end) == (second.parts, second.lies, second.end)
        different.add(repr((first.parts, first.lies, first.end)))
    assert len(different) > 15  # a few change nothing
