"""Atomic replacement and locks between processes."""

import errno
import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from ffcv_ssl import files
from ffcv_ssl.errors import CheckpointError, UserError
from ffcv_ssl.files import explained, hold_folder, locked, replacing, write_text
from ffcv_ssl.training import checkpoint


@pytest.fixture
def shared_umask():
    former = os.umask(0o002)
    yield 0o664
    os.umask(former)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / "a.txt.tmp").write_text("half, but longer than what comes next")
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_have_the_permissions_of_the_umask(tmp_path, shared_umask):
    write_text(tmp_path / "a.txt", "")
    with locked(tmp_path / "lock"):
        pass
    assert mode_of(tmp_path / "a.txt") == mode_of(tmp_path / "lock") == shared_umask


def bind(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


KINDS = [
    (os.mkdir, "a folder"),
    (os.mkfifo, "a pipe"),
    (bind, "a socket"),
    (lambda path: path.symlink_to("/dev/null"), "a device"),
]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.tmp"])
@pytest.mark.parametrize("make, kind", KINDS)
def test_only_a_regular_file_is_replaced(tmp_path, monkeypatch, make, kind, name):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    make(Path(name))
    before = os.lstat(name)
    line = f"{name}: is {kind}, expected a regular file or a new name to write to"
    with pytest.raises(UserError, match=f"^{line}$"):
        write_text("a.txt", "text")
    assert os.listdir() == [name]
    assert os.path.samestat(os.lstat(name), before)


def test_a_link_at_the_temporary_name_is_refused_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.txt.tmp").symlink_to("precious")
    with pytest.raises(UserError, match=r"a.txt.tmp: is a link, expected a regular file"):
        write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "precious").read_text() == "mine"
    with pytest.raises(OSError, match="symbolic links"):  # made at the last moment
        files._open_no_link(str(tmp_path / "a.txt.tmp"), os.O_WRONLY)


@pytest.mark.parametrize("name", ["a.png", "n" * 251 + ".png"])
def test_a_picture_that_the_user_names_leaves_the_files_beside_it_alone(tmp_path, name):
    neighbours = [tmp_path / "a.png.tmp", tmp_path / "a.tmp"]
    for neighbour in neighbours:
        neighbour.write_text("mine")
    path = tmp_path / name
    left = files.own_temporary(path)
    left.write_text("left by a killed process of this number, and longer than what comes next")
    with files.replacing(path, files.own_temporary(path)) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and not left.exists()
    assert [neighbour.read_text() for neighbour in neighbours] == ["mine", "mine"]


def test_a_checkpoint_takes_no_pipes_place_nor_does_the_one_before_it(tmp_path):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / checkpoint.PREVIOUS
    os.mkfifo(previous)
    checkpoint.save(path, {"step": 1}, previous)
    with pytest.raises(UserError, match=f"{checkpoint.PREVIOUS}: is a pipe, expected"):
        checkpoint.save(path, {"step": 2}, previous)
    assert checkpoint.load(path) == {"step": 1}
    with pytest.raises(UserError, match=f"{checkpoint.PREVIOUS}: is a pipe, expected"):
        checkpoint.save(previous, {"step": 2})
    assert stat.S_ISFIFO(os.lstat(previous).st_mode)


def test_a_link_is_replaced_and_the_file_it_led_to_stays(tmp_path):
    (tmp_path / "b.txt").write_text("old")
    (tmp_path / "a.txt").symlink_to("b.txt")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "b.txt").read_text() == "old"


def test_the_bytes_are_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_text(tmp_path / "a.txt", "text")
    assert calls == ["fsync", "replace"]


def test_a_full_disk_becomes_one_line_with_a_remedy(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"a.pt: .*No space left.*; free some space.*, kept$"),
        explained(tmp_path / "a.pt", ", kept"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        with pytest.raises(TimeoutError), locked(path, wait_s=0):
            pass
    with locked(path, wait_s=0):
        pass


def test_a_lock_is_waited_for(tmp_path):
    path, order, is_held = tmp_path / "lock", [], threading.Event()

    def hold():
        with locked(path):
            is_held.set()
            threading.Event().wait(0.2)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(60)
    with locked(path, wait_s=60):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    "number, can_unlock",
    [(errno.ENOSYS, False), (errno.EOPNOTSUPP, False), (errno.EOPNOTSUPP, True)]
    + [(errno.ENOLCK, True), (errno.EINVAL, True)],
)
def test_without_locks_on_the_file_system_the_block_runs(tmp_path, monkeypatch, number, can_unlock):
    def flock(descriptor, operation):
        if operation != fcntl.LOCK_UN or not can_unlock:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    blocks = []
    for turn in range(2):  # nothing that was left keeps the next one out
        with locked(tmp_path / "lock", wait_s=0):
            blocks.append(turn)
    assert blocks == [0, 1]


def test_a_run_in_a_held_or_impossible_folder_is_refused(tmp_path):
    with hold_folder(tmp_path / "a" / "run") as folder:
        assert folder.is_dir()
        with pytest.raises(UserError, match="another process trains here"):
            with hold_folder(folder):
                pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be the run's folder"):
        with hold_folder(tmp_path / "file" / "run"):
            pass
