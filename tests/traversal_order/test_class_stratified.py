"""Class-stratified batches: so many classes with so many images each, the same for ever."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import reference
from support.beton_files import List
from support.loading import make_loader, samples_of

from ffcv_ssl import BetonError, DatasetWriter, Reader
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.traversal_order import ClassStratified


def make_labels(sizes, unlabelled=5, seed=0):
    """(N,) labels, class k `sizes[k]` times, some unlabelled, shuffled."""
    labels = np.repeat([-1, *range(len(sizes))], [unlabelled, *sizes])
    return np.random.default_rng(seed).permutation(labels)


def batches(order, seed=0, epoch=0, indices=None):
    """(T, m, C): the pass as interleaved batches."""
    indices = np.arange(len(order.labels)) if indices is None else np.asarray(indices)
    sequence = order.sequence(None, indices, seed, epoch)
    assert sequence.dtype == np.int64
    return sequence.reshape(-1, order.images_per_class, order.classes_per_batch)


@pytest.mark.parametrize(
    ("sizes", "classes", "images"),
    [
        ([9, 9, 9, 9], 3, 2),
        ([5, 1, 30, 8, 2], 2, 4),
        ([40] * 7, 5, 3),
        ([3, 3], 2, 5),
        ([1], 1, 1),
        ([2, 9, 9], 3, 1),
    ],
)
def test_a_batch_has_so_many_classes_with_so_many_images_each(sizes, classes, images):
    order = ClassStratified(make_labels(sizes), classes, images)
    for epoch in range(3):
        for batch in batches(order, epoch=epoch):
            of_class = order.labels[batch]
            assert (of_class == of_class[0]).all()  # interleaved: a row has one image of each
            assert len(set(of_class[0])) == classes and of_class.min() >= 0


@pytest.mark.parametrize(("classes", "images"), [(2, 3), (6, 2), (3, 6), (1, 1)])
def test_a_pass_has_every_image_of_equal_classes_exactly_once(classes, images):
    order = ClassStratified(make_labels([6] * 6), classes, images)
    for epoch in range(3):
        sequence = batches(order, 4, epoch).reshape(-1)
        assert sorted(sequence) == sorted(np.flatnonzero(order.labels >= 0))


@pytest.mark.parametrize(
    ("sizes", "classes", "images", "expected"),
    [([6] * 6, 2, 3, 6), ([7, 7], 2, 3, 3), ([1, 1, 1], 3, 4, 1), ([13], 1, 4, 4)],
)
def test_a_pass_has_as_many_batches_as_cover_the_labelled_images(sizes, classes, images, expected):
    order = ClassStratified(make_labels(sizes), classes, images)
    assert len(batches(order)) == expected


@pytest.mark.parametrize("num_classes", [5, 6, 7, 12])
def test_classes_are_seen_equally_often_whatever_their_sizes(num_classes):
    order = ClassStratified(make_labels([1] * (num_classes - 1) + [200]), 5, 2)
    seen = order.labels[batches(order)][:, 0]
    counts = np.zeros(num_classes, int)
    for number, classes in enumerate(seen, 1):
        counts[classes] += 1
        # an ideal deal gives every class `number * 5 / K` turns; one that waits is one behind
        assert abs(counts - number * 5 / num_classes).max() < 2


def endless(values, seed, epoch, *names):
    """Permutations of `values` one after another, from the generator's twin."""
    for number in itertools.count():
        key = derive_key(seed, "order", "class_stratified", *names, number)
        yield from reference.shuffle(key, epoch, values)


def twin(labels, classes_per_batch, images_per_class, num_batches, seed, epoch):
    """The rule in plain Python: draw classes one by one, put back those the batch already has."""
    members = {label: np.flatnonzero(labels == label).tolist() for label in set(labels) - {-1}}
    classes = endless(range(len(members)), seed, epoch, "classes")
    images = {k: endless(v, seed, epoch, "images", k) for k, v in members.items()}
    found, put_back = [], []
    for _ in range(num_batches):
        classes, put_back, batch = itertools.chain(put_back, classes), [], []
        while len(batch) < classes_per_batch:
            drawn = next(classes)
            (put_back if drawn in batch else batch).append(drawn)
        batch = [sorted(members)[number] for number in batch]
        columns = [[next(images[label]) for _ in range(images_per_class)] for label in batch]
        found.append(np.transpose(columns).tolist())
    return found


@pytest.mark.parametrize(
    ("sizes", "classes", "images"), [([7] * 5, 4, 1), ([3, 20, 0, 4, 9, 9, 2], 4, 3), ([8], 1, 3)]
)
def test_a_pass_equals_its_twin(sizes, classes, images):
    order = ClassStratified(make_labels(sizes), classes, images)
    for seed, epoch in [(0, 0), (2**62, 5)]:
        found = batches(order, seed, epoch)
        expected = twin(order.labels, classes, images, len(found), seed, epoch)
        assert found.tolist() == expected


def test_a_class_hands_out_all_its_images_before_one_comes_again():
    order = ClassStratified(make_labels([3, 10, 200]), 2, 4)
    for label, size in enumerate([3, 10, 200]):
        sequence = batches(order, epoch=1).transpose(0, 2, 1).reshape(-1)  # turn after turn
        mine = sequence[order.labels[sequence] == label]
        for begin in range(0, len(mine) - size + 1, size):
            assert len(set(mine[begin : begin + size])) == size


def test_only_labelled_samples_among_the_indices_take_part():
    labels = make_labels([10, 10, 10])
    order = ClassStratified(labels, 2, 2)
    indices = np.concatenate([np.flatnonzero(labels >= 0)[::2], np.flatnonzero(labels < 0)])
    before = indices.copy()
    seen = set(batches(order, indices=indices).reshape(-1))
    assert seen <= set(indices[labels[indices] >= 0])
    assert np.array_equal(indices, before)


def test_seeds_and_epochs_give_other_passes_and_the_same_ones_again():
    order = ClassStratified(make_labels([8] * 4), 2, 2)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    passes = [tuple(batches(order, *key).reshape(-1)) for key in keys]
    assert len(set(passes)) == 4
    assert tuple(batches(order, 1, 0).reshape(-1)) == passes[2]


def test_the_pass_of_a_small_file_is_the_golden_one():
    """A change would give every run of the same seed other batches."""
    labels = [0, 1, 2, -1, 0, 1, 2, 0, 1, 2, 2]
    assert batches(ClassStratified(labels, 2, 2), 3, 1).tolist() == GOLDEN


GOLDEN = [[[7, 6], [0, 10]], [[8, 4], [1, 0]], [[2, 5], [9, 8]]]


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 12, 30])
def test_ranks_split_a_batch_without_loss_or_overlap(world_size, unique):
    order = ClassStratified(make_labels([20] * 8), 4, 3, unique)
    for batch in batches(order):
        parts = order.split(None, batch.reshape(-1), world_size)
        assert sorted(np.concatenate(parts)) == list(range(12))
        sizes = [len(part) for part in parts]
        assert len(sizes) == world_size and max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize(("world_size", "shared"), [(2, 0), (3, 0), (6, 0), (4, 2), (5, 3)])
def test_ranks_have_classes_of_their_own_where_asked_for(world_size, shared):
    order = ClassStratified(make_labels([20] * 8), 6, 4, unique_classes_per_rank=True)
    low_class_ranks = []
    for batch in batches(order):
        parts = order.split(None, batch.reshape(-1), world_size)
        labels = order.labels[batch.reshape(-1)]
        owners = Counter(label for part in parts for label in set(labels[part]))
        assert sum(count - 1 for count in owners.values()) == shared
        low_class_ranks.append(next(r for r, p in enumerate(parts) if labels.min() in labels[p]))
    assert len(set(low_class_ranks)) > 1  # which classes a rank has changes from batch to batch


@pytest.mark.parametrize("size", [11, 13, 24])
def test_a_batch_of_another_size_is_refused_in_one_line(size):
    order = ClassStratified(make_labels([20] * 8), 4, 3)
    message = f"global batch of {size} samples, expected 4 classes x 3 images; .* must be 12"
    with pytest.raises(ValueError, match=message) as error:
        order.split(None, batches(order).reshape(-1)[:size], 2)
    assert "\n" not in str(error.value)


def test_ranks_share_all_classes_and_split_their_images_otherwise():
    order = ClassStratified(make_labels([20] * 8), 6, 4)
    batch = batches(order)[0].reshape(-1)
    for part in order.split(None, batch, 2):
        assert sorted(Counter(order.labels[batch[part]]).values()) == [2] * 6


def test_replacements_are_labelled_samples_of_the_same_class():
    order = ClassStratified([2, -1, 0, 2, 0, 2], 2, 1)
    assert order.replacements(3).tolist() == [0, 3, 5]


def test_the_name_tells_settings_and_labels_apart():
    labels = make_labels([5, 5, 5])
    orders = [
        ClassStratified(labels, 2, 3),
        ClassStratified(labels, 3, 2),
        ClassStratified(labels, 2, 2),
        ClassStratified(labels, 2, 3, unique_classes_per_rank=True),
        ClassStratified(np.roll(labels, 1), 2, 3),
    ]
    assert len({order.name for order in orders}) == 5
    assert ClassStratified(labels.tolist(), 2, 3).name == orders[0].name


def test_later_changes_of_the_callers_labels_change_nothing():
    labels = make_labels([8, 8])
    order = ClassStratified(labels, 2, 2)
    before = batches(order)
    labels[:] = 0
    assert np.array_equal(batches(order), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((make_labels([3] * 4), 5, 1), "classes_per_batch: got 5, expected at most 4"),
        (([-1, -1], 1, 1), "classes_per_batch: got 1, expected at most 0"),
        (([0, 1], 0, 1), "classes_per_batch: got 0, expected at least 1"),
        (([0, 1], 1, 1.5), "images_per_class: got 1.5, expected at least 1"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        ClassStratified(*arguments)
    assert "\n" not in str(error.value)


def test_indices_that_hold_too_few_classes_or_have_no_label_are_refused():
    order = ClassStratified([0, 0, 1, 1, 2, 2], 3, 1)
    with pytest.raises(ValueError, match="classes_per_batch: got 3, expected at most 2"):
        batches(order, indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"got 6 labels, expected one .*; sample 6 has none"):
        batches(order, indices=[0, 2, 6])


# -- through the loader

LABELS = make_labels([9, 4, 12, 7], unlabelled=6)


@pytest.fixture(scope="module")
def labelled_beton(tmp_path_factory):
    """38 small images in four classes of 4 to 12, and some unlabelled."""
    path = str(tmp_path_factory.mktemp("stratified") / "a.beton")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (len(LABELS), 20, 20, 3), np.uint8)
    writer = DatasetWriter(
        path, {"image": RGBImageField("raw"), "label": IntField()}, num_workers=1
    )
    writer.from_indexed_dataset(List([(i, int(n)) for i, n in zip(images, LABELS)]))
    return path


def make_stratified(path, classes=2, images=3, world_size=1, unique=False, **arguments):
    order = ClassStratified(LABELS, classes, images, unique)
    arguments = {"order": order, "indices": np.flatnonzero(LABELS >= 0), **arguments}
    if "rank" in arguments:
        arguments["world_size"] = world_size
    return make_loader(path, order.batch_size // world_size, **arguments)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_see_the_very_views_of_one_rank(labelled_beton, world_size, unique):
    with make_stratified(labelled_beton) as loader:
        expected = [samples_of([batch]) for batch in loader]
    ranks = []
    for rank in range(world_size):
        with make_stratified(
            labelled_beton, world_size=world_size, unique=unique, rank=rank
        ) as loader:
            ranks.append([samples_of([batch]) for batch in loader])
    assert len(expected) == 6 and all(len(batch) == 6 for batch in expected)
    for number, batch in enumerate(expected):
        together = [sample for rank in ranks for sample in rank[number]]
        assert sorted(together) == sorted(batch)


def test_an_image_that_comes_again_has_fresh_views(labelled_beton):
    with make_stratified(labelled_beton, classes=4, images=8) as loader:
        batch = samples_of(loader)
    again = [samples for samples in _by_id(batch).values() if len(samples) > 1]
    assert again
    for samples in again:
        assert len({view_0 for _, _, view_0, _ in samples}) == len(samples)


def _by_id(samples):
    found = {}
    for sample in samples:
        found.setdefault(sample[0], []).append(sample)
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_a_pass_is_resumed_inside_with_other_ranks(labelled_beton, before, after):
    with make_stratified(labelled_beton) as loader:
        expected = [samples_of([batch]) for batch in loader]
    with make_stratified(labelled_beton, world_size=before, rank=0) as loader:
        iterator = iter(loader)
        for _ in range(2):
            next(iterator)
        state = loader.state_dict()
        iterator.close()
    rest = [[] for _ in expected[2:]]
    for rank in range(after):
        with make_stratified(labelled_beton, world_size=after, rank=rank) as loader:
            loader.load_state_dict(state)
            for number, batch in enumerate(loader):
                rest[number] += samples_of([batch])
    assert [sorted(batch) for batch in rest] == [sorted(batch) for batch in expected[2:]]


def test_a_state_of_other_settings_is_refused(labelled_beton):
    with make_stratified(labelled_beton, classes=2, images=3) as loader:
        state = loader.state_dict()
    with make_stratified(labelled_beton, classes=3, images=2) as loader:
        with pytest.raises(BetonError, match=r"2 classes x 3 images.*has.*3 classes x 2 images"):
            loader.load_state_dict(state)


def test_a_bad_sample_is_replaced_by_one_of_its_class(labelled_beton, tmp_path):
    path = tmp_path / "bad.beton"
    with make_stratified(labelled_beton, classes=4, images=2) as loader:
        indices = next(iter(loader)).indices.numpy()
    (bad, other) = indices[LABELS[indices] == 3]
    with Reader(labelled_beton) as reader:
        content = bytearray(Path(labelled_beton).read_bytes())
        content[int(reader.extents("image").pointer[bad])] ^= 1
    path.write_bytes(content)
    with make_stratified(str(path), classes=4, images=2, on_error="replace") as loader:
        batch = next(iter(loader))
    (replacement,) = batch.indices[batch.replaced].tolist()
    assert replacement != bad and LABELS[replacement] == 3
    kept = ~batch.replaced.numpy()
    assert np.array_equal(batch.indices.numpy()[kept], indices[kept]) and other in indices[kept]
    assert np.array_equal(LABELS[batch.indices], batch.label.numpy())
