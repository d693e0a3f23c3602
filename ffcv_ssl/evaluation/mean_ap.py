"""Mean average precision of several labels per image, by the rule of Pascal VOC 2007.

Guarantees: a pure function of scores and targets; the order of the samples never matters, also not
where scores are equal.
"""

# N samples, K classes

from __future__ import annotations

import numpy as np

NUM_POINTS = 11  # recalls 0, 0.1, ... 1


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """11-point interpolated average precision of one class (Everingham et al. 2010, 4.2, eq. 1-2).

    AP = 1/11 sum_{r in 0, 0.1, ... 1} max over thresholds with recall >= r of the precision.

    scores: (N,) floats, finite, larger for classes that are more likely present. targets: (N,), 1
    present, 0 absent, -1 ("difficult") left out. A threshold includes all samples of equal score at
    once; in the benchmark's own program their order in the file decides. NaN where no sample is
    positive.
    """
    counted = targets >= 0
    scores, present = scores[counted], targets[counted] > 0
    num_present = int(present.sum())
    if num_present == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(present[order])
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of runs of equal scores
    precision, found = found[ends] / (ends + 1), found[ends]
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    # recall >= k/10 in whole numbers, as 3/10 is not exact in floating point
    wanted = -(-np.arange(NUM_POINTS) * num_present // (NUM_POINTS - 1))
    return float(best[np.searchsorted(found, wanted)].mean())


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> tuple[float, list[float]]:
    """The mean of `average_precision` over the classes with a positive, and that of each class.

    scores, targets: (N, K), values as for `average_precision`. Returns (float, list of K floats,
    NaN for a class without a positive); the mean is NaN where no class has a positive. Raises
    ValueError for shapes that differ, other targets, and scores that are not finite.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(
            f"mean_average_precision: got scores {scores.shape} and targets {targets.shape}, "
            "expected two (N, K)"
        )
    is_known = np.isin(targets, (-1, 0, 1))
    if not is_known.all():
        raise ValueError(
            f"mean_average_precision: got a target of {targets[~is_known][0]}, "
            "expected 1, 0 or -1 (left out)"
        )
    if not np.isfinite(scores).all():
        raise ValueError("mean_average_precision: got a score that is not finite")
    each = [average_precision(scores[:, k], targets[:, k]) for k in range(scores.shape[1])]
    known = [value for value in each if value == value]
    return (float(np.mean(known)) if known else float("nan")), each
