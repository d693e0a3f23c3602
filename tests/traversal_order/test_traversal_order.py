"""Orders: permutations that are pure functions of (seed, epoch), the same for ever."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference

from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order import QuasiRandom, Random, Sequential, TraversalOrder
from ffcv_ssl.traversal_order.base import stable_order

PAGE = 1 << 20


def fake_reader(num_samples, samples_per_page=10, payload=True, shuffled=False):
    """A reader of samples that lie `samples_per_page` to a page, in file order or not."""
    place = np.arange(num_samples)
    if shuffled:
        place = np.random.default_rng(0).permutation(num_samples)
    pointer = (PAGE * (1 + place // samples_per_page) + place % samples_per_page).astype(np.uint64)
    size = np.ones(num_samples, np.uint64)
    extents = {"image": SimpleNamespace(pointer=pointer, size=size) if payload else None, "y": None}
    return SimpleNamespace(
        fields=extents,
        page_size=PAGE,
        extents=extents.get,
        pointer=pointer,
        once=lambda what, find: find(),
    )


READER = fake_reader(95)
ORDERS = [Sequential(), Random(), QuasiRandom(3)]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 95])
def test_an_epoch_has_every_sample_once(order, size):
    indices = np.arange(size)
    for seed, epoch in [(0, 0), (1, 5), (2**62, 2**31)]:
        sequence = order.sequence(READER, indices, seed, epoch)
        assert sequence.dtype == np.int64
        assert np.array_equal(np.sort(sequence), indices)
    assert np.array_equal(indices, np.arange(size))  # the argument is left alone


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_only_the_given_indices_take_part(order):
    indices = np.array([94, 3, 50, 51, 7, 20])
    sequence = order.sequence(READER, indices, 3, 1)
    assert sorted(sequence) == sorted(indices)


@pytest.mark.parametrize("order", [Random(), QuasiRandom(3)], ids=lambda order: order.name)
def test_seeds_and_epochs_give_other_orders_and_the_same_ones_again(order):
    indices = np.arange(95)
    names = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    sequences = [tuple(order.sequence(READER, indices, *name)) for name in names]
    assert len(set(sequences)) == len(names)
    assert tuple(order.sequence(READER, indices, 0, 0)) == sequences[0]


# Golden: a change would give every run of the same seed another order.
GOLDEN_RANDOM = {
    (1, 0, 0): [0],
    (2, 0, 1): [1, 0],
    (5, 0, 0): [0, 4, 3, 1, 2],
    (8, 0, 0): [0, 4, 6, 5, 7, 1, 3, 2],
    (8, 0, 1): [4, 5, 6, 2, 3, 0, 1, 7],
    (8, 1, 0): [1, 5, 3, 7, 4, 0, 6, 2],
    (8, 9223372036854775807, 4294967295): [2, 5, 4, 3, 6, 1, 7, 0],
}
GOLDEN_QUASI = [11, 12, 9, 13, 15, 10, 14, 8, 1, 5, 4, 2, 6, 7, 3, 0, 19, 16, 18, 17]


def test_random_orders_are_the_golden_ones():
    for (size, seed, epoch), golden in GOLDEN_RANDOM.items():
        sequence = Random().sequence(None, np.arange(size), seed, epoch)
        assert sequence.tolist() == golden


def test_quasi_random_orders_are_the_golden_ones():
    reader = fake_reader(20, 4)
    assert QuasiRandom(2).sequence(reader, np.arange(20), 5, 1).tolist() == GOLDEN_QUASI


def test_random_order_equals_its_twin():
    key = derive_key(4, "order", "random")
    sequence = Random().sequence(None, np.arange(100) * 2, 4, 6)
    assert sequence.tolist() == reference.shuffle(key, 6, range(0, 200, 2))


def test_sequential_keeps_the_order_of_indices():
    indices = np.array([5, 2, 9])
    assert Sequential().sequence(None, indices, 1, 8).tolist() == [5, 2, 9]


def test_neighbours_in_a_random_order_are_far_apart():
    sequence = Random().sequence(None, np.arange(10_000), 0, 0)
    assert abs(np.corrcoef(sequence, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(sequence[1:], sequence[:-1])[0, 1]) < 0.05


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_window_reads_no_more_pages_than_it_may(window, shuffled):
    reader = fake_reader(1000, 10, shuffled=shuffled)
    sequence = QuasiRandom(window).sequence(reader, np.arange(1000), 7, 2)
    pages = reader.pointer[sequence] // np.uint64(PAGE)
    per_window = 10 * window
    seen = []
    for begin in range(0, 1000, per_window):
        inside = set(pages[begin : begin + per_window])
        assert len(inside) <= window
        seen += inside
    assert len(seen) == len(set(seen)) == 100  # no page is read in two windows


def test_samples_are_mixed_within_a_window_and_windows_are_mixed():
    reader = fake_reader(1000, 10)
    sequence = QuasiRandom(10).sequence(reader, np.arange(1000), 0, 0)
    pages = (reader.pointer[sequence] // np.uint64(PAGE)).astype(int)
    assert len(set(pages[:20])) > 5
    firsts = [pages[begin : begin + 100].mean() for begin in range(0, 1000, 100)]
    assert firsts != sorted(firsts)


def test_files_without_payloads_have_blocks_of_1024_samples():
    reader = fake_reader(5000, payload=False)
    sequence = QuasiRandom(1).sequence(reader, np.arange(5000), 0, 0)
    assert sorted(sequence) == list(range(5000))
    assert len(set(sequence[:904] // 1024)) <= 2


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_split_a_batch_without_loss_or_overlap(order, world_size):
    for count in (0, 1, 5, 24, 25):
        samples = order.sequence(READER, np.arange(95), 1, 1)[:count]
        parts = order.split(READER, samples, world_size)
        assert len(parts) == world_size
        assert sorted(np.concatenate(parts)) == list(range(count))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_ranks_of_a_quasi_random_order_share_few_pages():
    reader = fake_reader(1000, 10)
    order = QuasiRandom(20)
    samples = order.sequence(reader, np.arange(1000), 0, 0)[:200]
    pages = reader.pointer[samples] // np.uint64(PAGE)
    parts = order.split(reader, samples, 4)
    read = [len(set(pages[part])) for part in parts]
    assert sum(read) <= len(set(pages)) + 3  # a page is shared only where two parts meet
    for part in parts:
        assert (np.diff(part) > 0).all()  # a rank keeps the sequence's order


def test_an_order_of_ones_own_needs_only_a_sequence():
    class Backwards(TraversalOrder):
        def sequence(self, reader, indices, seed, epoch):
            return indices[::-1].copy()

    order = Backwards()
    assert order.name == "Backwards" and order.replacements(3) is None
    assert [part.tolist() for part in order.split(None, np.arange(5), 2)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_blocks_is_refused_in_one_line(window):
    with pytest.raises(ValueError, match="window_blocks: got") as error:
        QuasiRandom(window)
    assert "\n" not in str(error.value)


def test_the_largest_field_is_looked_for_once_a_reader():
    found, plain = {}, fake_reader(95)
    looked = []

    def extents(name):
        looked.append(name)
        return plain.extents(name)

    def once(what, find):
        if what not in found:
            found[what] = find()
        return found[what]

    reader = SimpleNamespace(fields=plain.fields, page_size=PAGE, extents=extents, once=once)
    order = QuasiRandom(3)
    sequence = order.sequence(reader, np.arange(95), 1, 0)
    assert np.array_equal(sequence, order.sequence(plain, np.arange(95), 1, 0))
    looked.clear()
    for _ in range(5):
        order.split(reader, sequence[:20], 2)
    assert looked == ["image"] * 5


@pytest.mark.parametrize("low, high", [(0, 5), (-3, 1 << 15), (0, 1 << 17), (-(2**62), 2**62)])
def test_a_stable_order_is_numpys(low, high):
    numbers = np.random.default_rng(0).integers(low, high, 3000)
    assert np.array_equal(stable_order(numbers), np.argsort(numbers, kind="stable"))
    assert len(stable_order(numbers[:0])) == 0
