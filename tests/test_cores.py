"""The cores that a process may use, also where the system does not tell."""

import os

from ffcv_ssl.cores import usable_cores


def test_they_are_those_that_the_system_names():
    assert usable_cores() == os.sched_getaffinity(0)


def test_they_are_all_where_the_system_names_none(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores() == {0, 1, 2}
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == {0}
