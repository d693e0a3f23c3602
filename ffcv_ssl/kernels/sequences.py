"""Loops over the samples of an epoch that NumPy could only sort: 4 s for 14 million samples."""

import numpy as np

from ffcv_ssl.kernels.compile import kernel


@kernel("boolean(Array(int64, 1, 'C', readonly=True), int32[::1], int32[::1])")
def count_occurrences_(sequence, counts, occurrences):
    """occurrences[i]: how often sequence[i] stands earlier in the sequence. Returns whether any id
    occurs twice. counts: zeros, one for every id that may occur; ids outside are not noticed."""
    repeats = False
    for i in range(sequence.size):
        sample = np.uint64(sequence[i])  # unsigned: no test for a negative index
        occurrences[i] = counts[sample]
        repeats |= counts[sample] != 0
        counts[sample] += np.int32(1)
    return repeats


@kernel("void(int64[::1], int64[::1], int64[::1], int64[:, ::1])")
def fill_windows_(stream, chosen_in, waiting, windows):
    """Cut a stream of numbers 0 to K - 1 into windows (T, C) whose numbers all differ.

    A window that meets a number it already holds skips it; the next window starts with the skipped
    ones. chosen_in (K,): -1; waiting: scratch (C + K,).
    """
    position, num_waiting = 0, 0
    for t in range(windows.shape[0]):
        filled, num_skipped = 0, 0
        for i in range(num_waiting):
            if chosen_in[waiting[i]] != t:
                chosen_in[waiting[i]] = t
                windows[t, filled] = waiting[i]
                filled += 1
        while filled < windows.shape[1]:
            candidate = stream[position]
            position += 1
            if chosen_in[candidate] == t:
                waiting[num_skipped] = candidate
                num_skipped += 1
            else:
                chosen_in[candidate] = t
                windows[t, filled] = candidate
                filled += 1
        num_waiting = num_skipped
