"""Average precision against a slow twin written from the definition, and against known values."""

from fractions import Fraction

import numpy as np
import pytest

from ffcv_ssl.evaluation.mean_ap import average_precision, mean_average_precision


def slow_average_precision(scores, targets):
    """Every threshold, every recall, in exact fractions."""
    pairs = [(s, t) for s, t in zip(scores, targets) if t != -1]
    num_present = sum(t == 1 for _, t in pairs)
    total = Fraction(0)
    for point in range(11):
        best = Fraction(0)
        for threshold in {s for s, _ in pairs}:
            taken = [t for s, t in pairs if s >= threshold]
            if Fraction(sum(taken), num_present) >= Fraction(point, 10):
                best = max(best, Fraction(sum(taken), len(taken)))
        total += best
    return float(total / 11)


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_it_equals_the_definition_with_and_without_equal_scores(levels):
    rng = np.random.default_rng(levels)
    for size in (1, 2, 5, 10, 30, 47):
        for _ in range(10):
            scores = rng.integers(0, levels, size) / levels
            targets = rng.integers(-1, 2, size)
            targets[rng.integers(size)] = 1
            expected = slow_average_precision(scores, targets)
            assert average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_ranking_has_1_and_chance_the_share_of_positives():
    targets = np.array([1, 1, 0, 0, 0])
    assert average_precision(np.array([5.0, 4, 3, 2, 1]), targets) == 1
    assert average_precision(np.zeros(5), targets) == pytest.approx(2 / 5)


def test_of_two_positives_on_ranks_2_and_4_every_recall_sees_a_precision_of_one_half():
    assert average_precision(np.array([4.0, 3, 2, 1]), np.array([0, 1, 0, 1])) == 0.5


def test_recalls_of_tenths_are_met_exactly():
    # 3 of 10 positives come first: recall 0.3 counts with precision 1, then nine negatives
    targets = np.array([1] * 3 + [0] * 9 + [1] * 7)
    scores = np.arange(len(targets), 0, -1.0)
    expected = (4 * 1 + 7 * 10 / 19) / 11
    assert average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_difficult_samples_change_nothing():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=60), rng.integers(0, 2, 60)
    more_scores = np.concatenate([scores, rng.normal(size=20)])
    more_targets = np.concatenate([targets, np.full(20, -1)])
    shuffled = rng.permutation(80)
    assert average_precision(more_scores[shuffled], more_targets[shuffled]) == average_precision(
        scores, targets
    )


def test_the_order_of_samples_of_equal_score_does_not_matter():
    scores, targets = np.array([1.0, 1, 0, 0, 0]), np.array([1, 0, 0, 0, 1])
    for order in ([0, 1, 2, 3, 4], [1, 0, 4, 3, 2]):
        value = average_precision(scores[order], targets[order])
        assert value == pytest.approx((6 / 2 + 5 * 2 / 5) / 11)


def test_classes_without_a_positive_are_left_out_of_the_mean():
    scores = np.array([[0.9, 0.1, 0.3], [0.1, 0.9, 0.2]])
    mean, each = mean_average_precision(scores, np.array([[1, 0, -1], [0, 0, 0]]))
    assert mean == each[0] == 1 and np.isnan(each[1:]).all()
    assert np.isnan(mean_average_precision(scores, np.zeros((2, 3), int))[0])


def test_it_agrees_with_scikit_learns_curve_interpolated_at_eleven_recalls():
    curve = pytest.importorskip("sklearn.metrics").precision_recall_curve
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, targets = rng.normal(size=70), rng.integers(0, 2, 70)
        precision, recall, _ = curve(targets, scores)
        precision, recall = precision[:-1], recall[:-1]  # its last point is made up
        points = [precision[recall >= k / 10 - 1e-9].max() for k in range(11)]
        assert average_precision(scores, targets) == pytest.approx(np.mean(points), abs=1e-12)


@pytest.mark.parametrize(
    "scores, targets, message",
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), r"got scores \(2, 3\) and targets \(2, 2\)"),
        (np.zeros((2, 2)), np.full((2, 2), 2), "got a target of 2, expected 1, 0 or -1"),
        (np.full((2, 2), np.nan), np.ones((2, 2)), "not finite"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(scores, targets)
