"""The loader's benchmark compares the same work, or nothing."""

import pytest

from benchmarks.loader import check_levels

OURS = (100.0, 70.0, 0.5)


def test_peers_with_our_distribution_pass():
    check_levels({"ffcv-ssl": OURS, "other": (105.0, 66.0, 0.5)})


@pytest.mark.parametrize("levels", [(110.0, 70.0, 0.5), (100.0, 60.0, 0.5)])
def test_a_peer_with_another_distribution_stops_the_run_with_one_line(levels):
    with pytest.raises(SystemExit) as stopped:
        check_levels({"ffcv-ssl": OURS, "other": levels})
    line = stopped.value.code  # a string: Python prints it to stderr and exits with 1
    assert line.startswith("benchmarks.loader: other: ") and "\n" not in line
