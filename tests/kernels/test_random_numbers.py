"""Philox, the shuffles and keys made of it: known answers, twins, and independence."""

import numpy as np
import pytest
import reference
from support.harness import assert_uniform

from ffcv_ssl.kernels.random import fill_uniforms, philox, random_word, shuffle_
from ffcv_ssl.seeding import derive_key, derive_seed

ONES = 0xFFFFFFFF
# The vectors for philox4x32 with 10 rounds in the authors' Random123 package: key, counter, result.
KNOWN_ANSWERS = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        ONES << 32 | ONES,
        (ONES, ONES, ONES, ONES),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        0x299F31D0 << 32 | 0xA4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Changing these would change every run: they are part of what "the same seed" means.
GOLDEN_KEY = 15915299512631111921
GOLDEN_SEED = 1814330998958252233


def block_of_uniforms(key, epoch, sample, occurrence, count):
    out = np.empty((count, 4))
    fill_uniforms(key, epoch, sample, occurrence, out)
    return out


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_authors_known_answers(key, counter, words):
    assert tuple(philox(np.uint64(key), *(np.uint64(c) for c in counter))) == words
    assert reference.philox(key, counter) == words


@pytest.mark.parametrize(
    ("epoch", "sample", "occurrence"),
    [(0, 0, 0), (7, 123, 1), (2**32 - 1, 2**48 - 1, 2**16 - 1), (1, 2**32, 0)],
)
def test_uniforms_equal_their_twin(epoch, sample, occurrence):
    key = 0xDEADBEEF12345678
    ours = block_of_uniforms(key, epoch, sample, occurrence, 20)
    twins = [reference.uniforms(key, epoch, sample, occurrence, block) for block in range(20)]
    assert ours.tolist() == twins


def test_uniforms_are_uniform_and_unrelated():
    numbers = block_of_uniforms(1, 0, 0, 0, 5000)
    for column in numbers.T:
        assert_uniform(column)
    correlations = np.corrcoef(np.vstack([numbers.T, np.roll(numbers.T, 1, axis=1)])) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(5000)
    assert numbers.max() < 1


def test_every_part_of_a_draws_name_changes_it():
    names = [
        (1, 0, 0, 0),
        (2, 0, 0, 0),
        (1 << 32, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 1 << 32, 0),
        (1, 0, 0, 1),
    ]
    draws = {tuple(block_of_uniforms(*name, 1)[0]) for name in names}
    assert len(draws) == len(names)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 10, 256, 257, 258, 513, 700])
def test_shuffles_equal_their_twin(size):
    for key, epoch in [(5, 0), (2**64 - 1, 2**32 - 1)]:
        values = np.arange(size) * 3
        shuffle_(key, epoch, values)
        assert values.tolist() == reference.shuffle(key, epoch, range(0, 3 * size, 3))


def test_every_permutation_is_equally_likely():
    counts = {}
    for epoch in range(24 * 300):
        values = np.arange(4)
        shuffle_(99, epoch, values)
        counts[tuple(values)] = counts.get(tuple(values), 0) + 1
    assert len(counts) == 24
    assert sum((count - 300) ** 2 / 300 for count in counts.values()) < 65  # chi-square, 23


def test_random_words_differ_by_every_argument_and_equal_their_twin():
    names = [
        (1, 0, 0, 0),
        (2, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 1 << 40, 0),
        (1, 0, 0, 1),
    ]
    words = [random_word(*name) for name in names]
    assert len(set(words)) == len(names)
    for word, (key, epoch, sample, attempt) in zip(words, names):
        w0, w1, _, _ = reference.philox(key, (attempt, sample & ONES, epoch, sample >> 32))
        assert word == w0 << 32 | w1


def test_keys_are_stable_for_ever():
    assert derive_key(0, "view", 1, "RandomGrayscale", 0) == GOLDEN_KEY
    assert derive_seed(0, "labelled") == GOLDEN_SEED


def test_keys_differ_by_seed_and_by_every_name():
    names = [
        (0,),
        (1,),
        (-1,),
        (0, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", "b"),
        (0, "ab"),
    ]
    assert len({derive_key(*name) for name in names}) == len(names)


def test_seeds_of_streams_are_non_negative_and_differ():
    seeds = [derive_seed(seed, stream) for seed in range(20) for stream in ("labelled", "other")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
