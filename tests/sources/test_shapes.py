"""Generated shapes: reproducible, varied, and told apart by nothing but their outline."""

import numpy as np
import pytest
import torch

from ffcv_ssl.sources import Shapes
from ffcv_ssl.sources.outlines import AREA, OUTLINES, REACH
from ffcv_ssl.sources.shapes import CLASS_NAMES, MAX_OBJECTS, Draws, WithDistanceBin

CHANCE = 1 / len(OUTLINES)
# What seed 0 gave when the generator was published.
GOLDEN_LABELS = [4, 3, 0, 2, 9, 8, 5, 7, 1, 6, 9, 1]
GOLDEN_COUNTS = [4, 4, 1, 2, 1, 2, 4, 3, 4, 1, 1, 2]
GOLDEN_DISTANCES = [0.5775911949339888, 0.6769273011932864, 0.33059963928225367]
GOLDEN_PIXELS = [
    [112.0, 117.0, 120.7, 130.3],
    [114.7, 159.7, 126.0, 138.3],
    [123.7, 113.0, 130.7, 134.7],
    [126.0, 56.3, 137.3, 40.3],
]
GOLDEN_DRAWS = [0.6998615923161662, 0.1003199490812251, 0.06215859862990125]


def stack(dataset, first=0):
    """(images uint8 (N, H, W, 3), labels (N,), counts (N,), distances (N,))."""
    samples = [dataset[index] for index in range(first, len(dataset))]
    return tuple(np.stack(values) for values in zip(*samples))


@pytest.fixture(scope="module")
def probe_data():
    """3,000 training and 1,000 held-out images of 32 px, with labels."""
    train, val = stack(Shapes("train", 3000, 32)), stack(Shapes("val", 1000, 32))
    return train[0], train[1], val[0], val[1]


def test_a_sample_is_a_function_of_seed_split_and_index_alone():
    forwards, backwards = Shapes("train", 30, 40, seed=3), Shapes("train", 1000, 40, seed=3)
    for index in reversed(range(30)):
        ours, theirs = forwards[index], backwards[index]
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}])
def test_another_seed_or_split_gives_other_images(other):
    base = {"split": "train", "num_samples": 20, "size_px": 32, "seed": 0}
    ours, theirs = Shapes(**base), Shapes(**(base | other))
    for index in range(20):
        assert not np.array_equal(ours[index][0], theirs[index][0])


def test_samples_stay_as_they_were_published():
    """Golden: files written from the same settings must stay equal from version to version."""
    dataset = Shapes("train", 100, 32, seed=0)
    assert [dataset[index][1] for index in range(12)] == GOLDEN_LABELS
    assert [dataset[index][2] for index in range(12)] == GOLDEN_COUNTS
    assert [dataset[index][3] for index in range(3)] == pytest.approx(GOLDEN_DISTANCES, rel=1e-12)
    assert dataset[7][0][::8, ::8].mean(axis=2) == pytest.approx(np.array(GOLDEN_PIXELS), abs=1)


def test_the_random_stream_is_the_published_one():
    assert Draws("0/train/0").uniform(shape=3) == pytest.approx(GOLDEN_DRAWS, rel=1e-15)


def test_the_scene_is_the_same_at_any_size():
    small, large = Shapes("train", 10, 48), Shapes("train", 10, 144)
    for index in range(10):
        shrunk = large[index][0].reshape(48, 3, 48, 3, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small[index][0]).mean() < 6
        assert small[index][1:] == large[index][1:]


@pytest.mark.parametrize("size_px", [8, 33, 500])
def test_images_are_rgb_of_the_size_asked_for(size_px):
    image = Shapes("train", 1, size_px)[0][0]
    assert image.shape == (size_px, size_px, 3) and image.dtype == np.uint8


def test_classes_are_balanced_and_named():
    _, labels, _, _ = stack(Shapes("train", 200, 8))
    assert np.bincount(labels).tolist() == [20] * 10
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10


def test_any_stride_through_the_samples_meets_all_classes():
    """So that an even choice of samples, such as a limit makes, is a fair one."""
    dataset = Shapes("train", 5000, 8)
    for stride in (2, 5, 10, 100):
        labels = [dataset[index][1] for index in range(0, 50 * stride, stride)]
        assert len(set(labels)) == 10, stride


def test_number_and_distance_are_varied_and_independent_of_the_class():
    _, labels, counts, distances = stack(Shapes("train", 2000, 8))
    assert set(counts) == set(range(1, MAX_OBJECTS + 1))
    for values in (counts, distances):
        by_class = np.array([values[labels == label].mean() for label in range(10)])
        error = values.std() / np.sqrt(200)
        assert np.abs(by_class - values.mean()).max() < 4 * error


def test_classes_of_distance_are_ordered_and_about_equal_in_number():
    *_, distances, bins = stack(WithDistanceBin(Shapes("train", 2000, 8)))
    assert np.bincount(bins).min() > 0.6 * 2000 / 6 and len(set(bins)) == 6
    assert (np.diff(bins[distances.argsort()]) >= 0).all()


def test_more_objects_are_further_away():
    _, _, counts, distances = stack(Shapes("train", 500, 8))
    means = [distances[counts == count].mean() for count in range(1, MAX_OBJECTS + 1)]
    assert means == sorted(means) and distances.min() > 0


@pytest.mark.parametrize("outline", OUTLINES)
def test_every_outline_covers_the_same_area_within_reach(outline):
    axis = (np.arange(1200, dtype=np.float32) + np.float32(0.5)) / np.float32(300) - np.float32(2)
    x, y = np.meshgrid(axis, axis)
    inside = outline(x, y) < 0
    assert inside.mean() * 16 == pytest.approx(AREA, rel=0.005)
    assert np.hypot(x[inside], y[inside]).max() < REACH


@pytest.mark.parametrize("outline", OUTLINES)
def test_an_outline_rises_by_one_per_unit_across_its_border(outline):
    """What one clip needs in order to draw it antialiased."""
    axis = (np.arange(800, dtype=np.float32) + np.float32(0.5)) / np.float32(200) - np.float32(2)
    field = outline(*np.meshgrid(axis, axis))
    slope = np.hypot(*np.gradient(field, 1 / 200))[np.abs(field) < 0.01]
    assert np.median(slope) == pytest.approx(1, abs=0.02)
    assert np.quantile(slope, 0.02) > 0.9


def ridge_accuracy(features, labels, val_features, val_labels):
    """Held-out accuracy of the best of several ridge regressions on one-hot labels.

    The best on the held-out images themselves: a bound on what such a probe can find.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, z = (features - mean) / std, (val_features - mean) / std
    targets = np.eye(10)[labels] - CHANCE
    accuracies = []
    for decay in (10.0, 1e2, 1e3, 1e4, 1e5):
        weights = np.linalg.solve(x.T @ x + decay * np.eye(x.shape[1]), x.T @ targets)
        accuracies.append(((z @ weights).argmax(axis=1) == val_labels).mean())
    return max(accuracies)


def logistic_accuracy(features, labels, val_features, val_labels, decay):
    """Held-out accuracy of a multinomial logistic regression by L-BFGS."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, z = (torch.from_numpy((f - mean) / std).float() for f in (features, val_features))
    model = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.zeros_(model.weight)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(labels))
        loss = loss + decay * model.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (model(z).argmax(dim=1).numpy() == val_labels).mean()


def colour_histograms(images):
    """Square roots of 32 bins a channel and of 4 x 4 x 4 joint bins: (N, 160)."""
    rows = []
    for image in images.reshape(len(images), -1, 3):
        single = [np.bincount(image[:, c] // 8, minlength=32) for c in range(3)]
        joint = np.bincount((image // 64) @ np.array([16, 4, 1]), minlength=64)
        rows.append(np.concatenate([*single, joint]))
    return np.sqrt(np.stack(rows))


@pytest.mark.slow
def test_linear_probes_on_raw_pixels_stay_near_chance(probe_data):
    train, labels, val, val_labels = probe_data
    train, val = (x.reshape(len(x), -1).astype(np.float32) for x in (train, val))
    assert ridge_accuracy(train, labels, val, val_labels) < CHANCE + 0.10
    assert logistic_accuracy(train, labels, val, val_labels, decay=1e-2) < CHANCE + 0.10


def test_linear_probes_on_colour_histograms_stay_near_chance(probe_data):
    train, labels, val, val_labels = probe_data
    train, val = colour_histograms(train), colour_histograms(val)
    assert ridge_accuracy(train, labels, val, val_labels) < CHANCE + 0.10
    assert logistic_accuracy(train, labels, val, val_labels, decay=1e-3) < CHANCE + 0.10


def test_the_probes_find_a_class_that_colour_gives_away(probe_data):
    """The two tests above can fail: with a tint by class the same probes see it."""
    train, labels, val, val_labels = probe_data
    tint = np.linspace(0, 60, 10)

    def tinted(images, classes):
        colour = tint[classes][:, None, None, None] * np.array([1, 0, -1])
        return np.clip(images + colour, 0, 255).astype(np.uint8)

    features = [colour_histograms(tinted(*pair)) for pair in ((train, labels), (val, val_labels))]
    assert ridge_accuracy(features[0], labels, features[1], val_labels) > CHANCE + 0.15


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_an_index_error(index):
    with pytest.raises(IndexError):
        Shapes("train", 5, 8)[index]


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"size_px": 7}, {"size_px": 5000}])
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Shapes(**settings)
