"""Chosen labels: shares that are drawn right, published lists, and mistakes named on one line."""

import numpy as np
import pytest
import reference
from support.harness import assert_share

from ffcv_ssl.errors import UserError
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.training.label_choice import choose_labels, class_counts, samples_by_class


def make_labels(sizes=(400, 300, 500), unlabelled=100, seed=0):
    labels = np.repeat([-1, *range(len(sizes))], [unlabelled, *sizes])
    return np.random.default_rng(seed).permutation(labels)


LABELS = make_labels()
RANDOM = [
    ("bernoulli", {"fraction": 0.3}),
    ("bernoulli", {"count": 123}),
    ("balanced", {"fraction": 0.3}),
    ("balanced", {"count": 300}),
]


def chosen(*arguments, labels=LABELS, num_classes=3, **settings):
    """Ids of the samples whose label is chosen."""
    before = labels.copy()
    kept = choose_labels(labels, num_classes, *arguments, **settings)
    assert np.array_equal(labels, before)
    assert kept.dtype == np.int64 and kept.shape == labels.shape
    ids = np.flatnonzero(kept >= 0)
    assert (kept[kept < 0] == -1).all() and np.array_equal(kept[ids], labels[ids])
    return ids


@pytest.mark.parametrize(("scheme", "size"), RANDOM)
def test_a_choice_depends_on_the_seed_alone(scheme, size):
    choices = [chosen(scheme, **size, seed=seed).tolist() for seed in (0, 1, 0, 2**62)]
    assert choices[0] == choices[2]
    assert len({tuple(choice) for choice in choices}) == 3


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_bernoulli_chooses_each_label_with_the_given_probability(fraction):
    labels = make_labels((40_000, 10_000))
    kept = choose_labels(labels, 2, "bernoulli", fraction=fraction)
    for label in (0, 1):
        assert_share(kept[labels == label] >= 0, fraction)


def test_a_bernoulli_draw_is_of_the_sample_not_of_the_others():
    fewer = LABELS.copy()
    fewer[::3] = -1
    expected = np.setdiff1d(chosen("bernoulli", fraction=0.3), np.arange(len(LABELS))[::3])
    assert np.array_equal(chosen("bernoulli", fraction=0.3, labels=fewer), expected)


def test_a_bernoulli_draw_equals_its_twin():
    key = derive_key(4, "labels", "bernoulli")
    first = [reference.uniforms(key, 0, 0, 0, sample)[0] for sample in range(len(LABELS))]
    expected = np.flatnonzero((np.array(first) < 0.2) & (LABELS >= 0))
    assert np.array_equal(chosen("bernoulli", fraction=0.2, seed=4), expected)


@pytest.mark.parametrize("count", [1, 123, 1200])
def test_a_count_is_met_exactly(count):
    assert len(chosen("bernoulli", count=count)) == count


def test_every_label_is_as_likely_as_another_in_a_count():
    labels = make_labels((5, 5), 2)
    hits = np.zeros(len(labels))
    for seed in range(2000):
        hits[chosen("bernoulli", count=3, seed=seed, labels=labels, num_classes=2)] += 1
    assert abs(hits[labels >= 0] - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("size", "expected"),
    [({"count": 3}, 1), ({"count": 300}, 100), ({"fraction": 0.25}, 100), ({"fraction": 1e-9}, 1)],
)
def test_balanced_takes_the_same_number_of_every_class(size, expected):
    counts = np.bincount(LABELS[chosen("balanced", **size)])
    assert counts.tolist() == [expected] * 3


def test_classes_are_drawn_from_independently():
    labels = np.repeat([0, 1], 100)
    first, second = np.split(chosen("balanced", count=100, labels=labels, num_classes=2), 2)
    assert not np.array_equal(first, second - 100)


@pytest.mark.parametrize("scheme", ["bernoulli", "balanced"])
@pytest.mark.parametrize(
    ("less", "more"), [({"fraction": 0.1}, {"fraction": 0.4}), ({"count": 60}, {"count": 600})]
)
def test_a_larger_share_contains_the_smaller_one(scheme, less, more):
    assert set(chosen(scheme, **less)) < set(chosen(scheme, **more))


def test_all_labels_can_be_chosen():
    everything = np.flatnonzero(LABELS >= 0)
    assert np.array_equal(chosen("bernoulli", fraction=1), everything)
    assert np.array_equal(chosen("bernoulli", count=len(everything)), everything)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "split.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


NAMES = ("a/1.jpg", "a/2.jpg", "b/2.jpg", "b/3.jpg", "b/deep/4.jpg", "5.jpg")
FILE_LABELS = np.array([0, 0, 1, 1, 1, -1])


def from_file(path, names=NAMES):
    return chosen("file", file=path, names=names, labels=FILE_LABELS, num_classes=2).tolist()


@pytest.mark.parametrize("text", ["3\n0\n", "3\r\n\r\n0", " 3 \n\n# some\n0  \n\n", "\ufeff3\n0"])
def test_a_file_may_list_indices(write, text):
    assert from_file(write(text), names=None) == [0, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.jpg\n1.jpg\n", [0, 3]),
        ("\nb/3.jpg  \r\ntrain/a/1.jpg\n4.jpg", [0, 3, 4]),
        ("a/2.jpg", [1]),
        ("train/b/2.jpg\na/2.jpg", [1, 2]),
    ],
)
def test_a_file_may_list_names_with_or_without_folders(write, text, expected):
    assert from_file(write(text)) == expected


def test_names_are_fetched_only_for_a_file_of_names(write):
    assert from_file(write("1"), names=lambda: pytest.fail("fetched")) == [1]
    assert from_file(write("1.jpg"), names=lambda: NAMES) == [0]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("0\n6\n", None, "split.txt:2: got index 6, expected 0 to 5"),
        ("0\n" + "9" * 5000, None, "split.txt:2: got index 99"),
        ("0\n\n2\n0\n", None, "split.txt:4: got 0, which is sample 0 again, first named on line 1"),
        ("0\n5\n", None, "split.txt:2: got 5, but sample 5 has no label"),
        ("1.jpg\n7.jpg", NAMES, "split.txt:2: got 7.jpg, no sample has this name; .* a/1.jpg"),
        ("1.jpg\n0", NAMES, "split.txt:2: got 0, no sample has this name"),
        ("-1\n0", NAMES, "split.txt:1: got -1, no sample has this name"),
        (
            "2.jpg",
            NAMES,
            "split.txt:1: got 2.jpg, which may be a/2.jpg or b/2.jpg; give the whole path",
        ),
        ("c/2.jpg", NAMES, "split.txt:1: got c/2.jpg, which may be"),
        (
            "3.jpg\nb/3.jpg",
            NAMES,
            "split.txt:2: got b/3.jpg, which is sample 3 again, first named on line 1",
        ),
        ("5.jpg", NAMES, "split.txt:1: got 5.jpg, but sample 5 has no label"),
        ("1.jpg", None, "split.txt: got names of samples, but the dataset has no file names"),
        ("\n# none\n", NAMES, "split.txt: no entries"),
        (b"\xff\xfe\x00", NAMES, "split.txt: not a text file"),
    ],
)
def test_a_line_that_names_no_label_is_an_error_with_its_number(write, text, names, message):
    with pytest.raises(UserError, match=message) as error:
        from_file(write(text), names)
    assert "\n" not in str(error.value)


def test_a_list_that_is_a_device_is_refused(tmp_path):
    (tmp_path / "split.txt").symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"file: .*split.txt: is a device, expected a regular file"):
        from_file(tmp_path / "split.txt", NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "uniform", "count": 3}, "scheme: got 'uniform', expected one of bernoulli, ba"),
        ({"scheme": "bernoulli"}, "scheme bernoulli got nothing, expected either fraction or coun"),
        (
            {"scheme": "balanced", "fraction": 0.1, "count": 30},
            "scheme balanced got fraction 0.1 and count 30, expected either fraction or count",
        ),
        ({"scheme": "bernoulli", "file": "x"}, "scheme bernoulli got file x, expected either"),
        ({"scheme": "file", "count": 30}, "scheme file got count 30, expected file alone"),
        ({"scheme": "file"}, "scheme file got nothing, expected file alone"),
        ({"scheme": "file", "file": "no.txt"}, "labels.file: no.txt: No such file"),
        ({"scheme": "bernoulli", "fraction": 0}, "labels.fraction: got 0, expected above 0"),
        ({"scheme": "bernoulli", "fraction": float("nan")}, "labels.fraction: got nan"),
        ({"scheme": "balanced", "fraction": 1.5}, "labels.fraction: got 1.5, expected above 0"),
        ({"scheme": "bernoulli", "count": 0}, "labels.count: got 0, expected at least 1"),
        ({"scheme": "bernoulli", "count": 1201}, "1201 labelled samples wanted, there are 1200"),
        ({"scheme": "balanced", "count": 100}, "got 100, expected a multiple of the 3 classes"),
        ({"scheme": "balanced", "count": 903}, "301 labels of class 1 wanted, there are 300"),
        ({"scheme": "balanced", "fraction": 1}, "400 labels of class 1 wanted, there are 300"),
        ({"scheme": "bernoulli", "fraction": 1e-9}, "got 1e-09, which drew none of 1200 labels"),
    ],
)
def test_settings_that_make_no_choice_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        choose_labels(LABELS, 3, **arguments)
    assert str(error.value).startswith("labelled.labels") and "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [None, [], [-1, -1]])
def test_a_dataset_without_labels_is_refused(labels):
    with pytest.raises(UserError, match="no labelled sample"):
        choose_labels(labels, 0, "bernoulli", fraction=0.5)


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        ([0, 1, -1, 1], 2, "3 labels of 2 classes, 1 to 2 each"),
        ([0, 1, -1], 2, "2 labels of 2 classes, 1 each"),
        ([0, 3], 4, "2 labels of 4 classes, 0 to 1 each; none of class 1, 2"),
        ([0], 15, "1 labels of 15 classes, 0 to 1 each; none of class 1, 2, 3, 4, 5, 6, 7, 8, 9, "
         "10 and 4 more"),
    ],
)  # fmt: skip
def test_counts_are_told_in_one_line(labels, num_classes, expected):
    assert class_counts(np.array(labels), num_classes) == expected


def test_published_splits_of_indices_are_read(data_folder):
    path = data_folder / "splits" / "cifar10_4000labels_split152.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    labels = np.arange(50_000) % 10
    expected = sorted(int(line) for line in path.read_text().split())
    assert chosen("file", file=path, labels=labels, num_classes=10).tolist() == expected
    assert len(expected) == 4000


@pytest.mark.parametrize(
    ("name", "size"), [("imagenet_1percent.txt", 12_811), ("imagenet_10percent.txt", 128_116)]
)
def test_published_splits_of_names_are_read(data_folder, name, size):
    path = data_folder / "splits" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    entries = path.read_text().split()
    classes = sorted({entry.split("_")[0] for entry in entries})
    names = [f"{entry.split('_')[0]}/{entry}" for entry in entries]
    names = sorted([*names, *(f"{wnid}/{wnid}_none.JPEG" for wnid in classes)])
    labels = np.array([classes.index(name.split("/")[0]) for name in names])
    ids = chosen("file", file=path, names=names, labels=labels, num_classes=1000)
    assert len(classes) == 1000 and len(ids) == size
    assert {names[i].split("/")[1] for i in ids} == set(entries)


def test_samples_by_class_are_what_a_search_for_each_class_finds():
    labels = np.random.default_rng(0).integers(-1, 50, 300)
    for label, members in enumerate(samples_by_class(labels, 55)):
        assert members.tolist() == np.flatnonzero(labels == label).tolist()
    assert [len(members) for members in samples_by_class(np.full(3, -1), 2)] == [0, 0]
