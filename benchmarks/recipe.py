"""The recipe that all peers render, and its cumulative columns (the FFCV-SSL paper's Table 2).

In the paper, view 0 has blur and view 1 has solarization. Here both views have every op, which
costs more.
"""

COLUMNS = ("crops", "+ blur", "+ grey", "+ solarize", "+ jitter")
SIZE_PX, BATCH_SIZE, NUM_VIEWS = 224, 64, 2
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
FLIP, BLUR, GREY, SOLARIZE, JITTER = 0.5, 0.5, 0.2, 0.2, 0.8
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.8, 0.8, 0.2
TAPS, SIGMA, THRESHOLD = 23, (0.1, 2.0), 128


def has(column: str, op: str) -> bool:
    """Whether the cumulative column includes this op."""
    return COLUMNS.index(column) >= COLUMNS.index(op)
