"""Shared by all tests: the quick tier starts no process; where photographs lie; small datasets."""

import contextlib
import multiprocessing.popen_forkserver
import multiprocessing.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401  its import starts a process (ldconfig), which a quick test may not
from support.small_files import REPOSITORY, SOUND_SAMPLES, write_small

NOT_QUICK = ("whole", "slow", "slurm", "interop")  # as in the Makefile


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A quick test that starts a process fails, in its fixtures too; the writer may fork."""
    is_quick = not any(item.get_closest_marker(name) for name in NOT_QUICK)
    with no_processes() if is_quick else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def no_processes():
    """Nothing in this block starts a program or spawns a Python process."""

    def refuse(*_, **__):
        pytest.fail("this test starts a process: mark it `whole`")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess.Popen, "__init__", refuse)
        patched.setattr(multiprocessing.util, "spawnv_passfds", refuse)
        patched.setattr(multiprocessing.popen_forkserver.Popen, "__init__", refuse)
        yield


@pytest.fixture(scope="module")
def no_picture():
    """Runs of the trainer leave an empty `report.png`: to draw it takes longer than they train."""
    from ffcv_ssl.training import run_folder

    def leave_empty(folder, views=None):
        path = Path(folder, run_folder.REPORT_FILE)
        path.touch()
        return path

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "draw_report", leave_empty)
        yield


@pytest.fixture(scope="session")
def data_folder():
    """The folder of photographs (FFCV_SSL_TEST_DATA, default ../shared/data); the test is skipped
    where it is absent."""
    folder = Path(os.environ.get("FFCV_SSL_TEST_DATA", REPOSITORY / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no test photographs: {folder} is not a folder (set FFCV_SSL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory):
    """97 images of many sizes, JPEG and raw mixed."""
    return write_small(tmp_path_factory.mktemp("small") / "small.beton", 97, mode="proportion")


@pytest.fixture(scope="session")
def raw_beton(tmp_path_factory):
    """200 raw images of 16 x 16."""
    return write_small(tmp_path_factory.mktemp("raw") / "raw.beton", 200, (16, 16), mode="raw")


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A file of ours with every field type; not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "a.beton"
    from support.beton_files import make_columns, write_all_fields

    write_all_fields(path, make_columns(SOUND_SAMPLES, 26, 19), made={"by": "test"})
    return path


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copy(sound, tmp_path / "copy.beton"))


@pytest.fixture
def foreign(copy):
    """The same file without checksums, as FFCV would have written it."""
    from support.beton_files import without_integrity

    without_integrity(copy)
    return copy
