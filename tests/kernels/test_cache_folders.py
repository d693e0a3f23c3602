"""Which folders are chosen for kernels: closed to others, and never a folder called `~`."""

import logging
import os

import pytest

from ffcv_ssl.kernels import cache_folders as module


def choose():
    """The folders as a fresh process finds them."""
    return module.cache_folders.__wrapped__("kernels-x")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("FFCV_SSL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_default_folders_that_a_lax_umask_left_open_are_closed_and_used(tmp_path, caplog):
    root = tmp_path / "home" / "ffcv_ssl"
    (root / "kernels-x").mkdir(parents=True)
    for folder in (root, root / "kernels-x"):
        folder.chmod(0o775)
    with caplog.at_level(logging.WARNING):
        assert choose() == (str(root / "kernels-x"),)
    assert not caplog.records
    assert {f.stat().st_mode & 0o777 for f in (root, root / "kernels-x")} == {0o755}


def test_a_named_folder_that_is_open_to_others_stays_as_it_is(tmp_path, monkeypatch):
    named = tmp_path / "shared"
    named.mkdir()
    named.chmod(0o775)
    monkeypatch.setenv("FFCV_SSL_CACHE", str(named))
    assert choose() == (str(tmp_path / "home" / "ffcv_ssl" / "kernels-x"),)
    assert named.stat().st_mode & 0o777 == 0o775


def test_a_user_without_a_home_gets_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert choose() == (str(tmp_path / f"ffcv_ssl-{os.geteuid()}" / "kernels-x"),)
    assert not (tmp_path / "~").exists()
