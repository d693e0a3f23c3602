"""Free cores are those that other programs and a container's limit leave."""

import math
import os

import pytest

from ffcv_ssl.training import machine


def test_idle_time_is_that_of_our_cores_alone(tmp_path):
    lines = ["cpu 9 9 9 9999 9", "cpu0 1 2 3 400 50 6", "cpu1 1 2 3 900 0 6", "cpu10 0 0 0 7 0"]
    (tmp_path / "stat").write_text("\n".join([*lines, "intr 5", ""]))
    ticks = machine.idle_seconds({0, 10}, str(tmp_path / "stat")) * os.sysconf("SC_CLK_TCK")
    assert ticks == pytest.approx(457)
    assert 0 <= machine.idle_cores(0.05) <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text, cores", [("150000 100000\n", 1.5), ("max 100000\n", math.inf)])
def test_a_containers_limit_is_read(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert machine.cgroup_cores(str(tmp_path / "cpu.max")) == cores
    assert machine.cgroup_cores(str(tmp_path / "none")) == math.inf


@pytest.mark.parametrize(
    "idle, counts", [(0.0, [1]), (1.2, [1]), (1.9, [1, 2]), (3.6, [2, 4]), (62.0, [4, 8])]
)
def test_half_of_the_idle_cores_are_tried_before_all_of_them(idle, counts):
    assert machine.thread_counts(idle) == counts
