"""A fault of every end, for the tests of the frame; not part of the table."""

import atexit
import os
import subprocess
import tempfile
import time
from collections import Counter

from torture.frame import Trial, fault


@fault("survived", quick=2, full=12)
def survived(trial: Trial) -> str:
    """its folder is empty and its numbers are its own"""
    assert not list(trial.folder.iterdir())
    (trial.folder / "left").touch()
    return f"drew {trial.random.integers(10**6)}"


@fault("counted", quick=2, full=2)
def counted(trial: Trial) -> Counter:
    """many things in a trial"""
    return Counter({"refused": 3, "right": 4})


@fault("measured", quick=2, full=2)
def measured(trial: Trial) -> dict[str, float]:
    """the larger figure is kept"""
    return {"seconds": 7.0 - trial.number}


@fault("dies", quick=2, full=2)
def dies(trial: Trial) -> str:
    """another trial goes on"""
    if trial.number == 0:
        os.abort()
    return "lived"


@fault("hangs", quick=1, full=1, limit_s=0.5)
def hangs(trial: Trial) -> str:
    """an end after the limit"""
    time.sleep(60)
    return "woke up"


@fault("is wrong", quick=1, full=1)
def is_wrong(trial: Trial) -> str:
    """its line is kept"""
    print("said before")
    raise AssertionError("two is not one")


@fault("leaves a child and a folder", quick=1, full=1)
def leaves_a_child(trial: Trial) -> str:
    """both go with the process of the trials"""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return f"{child.pid} {tempfile.mkdtemp()}"


@fault("ends the process badly", quick=1, full=1)
def ends_badly(trial: Trial) -> None:
    """a row says so"""
    atexit.register(os._exit, 3)
