"""Mean average precision of several labels an image, by the rule of Pascal VOC 2007.

Guarantees: a pure function of scores and targets; the order of the samples never matters, also not
where scores are equal.
"""

# N samples, K classes

from __future__ import annotations

import numpy as np

NUM_POINTS = 11  # recalls 0, 0.1, ... 1


def average_precision(scores, targets):
    """11-point interpolated average precision of one class (Everingham et al. 2010, 4.2, eq. 1-2):

    AP = 1/11 sum_{r in 0, 0.1, ... 1} max over thresholds with recall >= r of the precision.

    scores: (N,) floats, finite, larger means rather present. targets: (N,), 1 present, 0 absent, -1
    ("difficult") left out. A threshold takes in all samples of equal score at once: the benchmark's
    own program lets their order in the file decide. NaN where no sample is positive.
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
    # recall >= k/10 in whole numbers: 3/10 is no float
    wanted = -(-np.arange(NUM_POINTS) * num_present // (NUM_POINTS - 1))
    return float(best[np.searchsorted(found, wanted)].mean())


def mean_average_precision(scores, targets):
    """The mean of `average_precision` over the classes that have a positive, and each one's.

    scores, targets: (N, K) as there. Returns (float, list of K floats, NaN for a class without a
    positive); the mean is NaN where no class has one. Raises ValueError for shapes that differ,
    other targets, and scores that are not finite.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    if scores.shape != targets.shape or scores.ndim != 2:
        got = f"got scores {scores.shape} and targets {targets.shape}"
        raise ValueError(f"mean_average_precision: {got}, expected two (N, K)")
    if not np.isin(targets, (-1, 0, 1)).all():
        got = f"got a target of {targets[~np.isin(targets, (-1, 0, 1))][0]}"
        raise ValueError(f"mean_average_precision: {got}, expected 1, 0 or -1 (left out)")
    if not np.isfinite(scores).all():
        raise ValueError("mean_average_precision: got a score that is not finite")
    each = [average_precision(scores[:, k], targets[:, k]) for k in range(scores.shape[1])]
    known = [value for value in each if value == value]
    return (float(np.mean(known)) if known else float("nan")), each
