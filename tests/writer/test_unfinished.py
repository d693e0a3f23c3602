"""A writer's target and its unfinished file: what is refused, and what is left behind."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from support.beton_files import List, write
from support.small_files import REPOSITORY

import write_dataset
from ffcv_ssl import BetonError, DatasetWriter, Reader
from ffcv_ssl.errors import UserError
from ffcv_ssl.fields import BytesField

BLOB = {"blob": BytesField()}


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a folder"),
        (make_socket, "a socket"),
        (make_device, "a device"),
        (lambda path: os.symlink("/dev/null", path), "a device"),
    ],
)
def test_a_target_that_is_no_regular_file_is_refused_and_stays(tmp_path, make, kind):
    make(tmp_path / "a")
    before = os.lstat(tmp_path / "a")
    with pytest.raises(UserError, match=f"a: is {kind}, expected a regular file"):
        write(tmp_path / "a", BLOB, [(b"x",)])
    assert os.path.samestat(before, os.lstat(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_a_target_that_becomes_a_pipe_before_writing_is_refused(tmp_path):
    writer = DatasetWriter(tmp_path / "a", BLOB, num_workers=1)
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="is a pipe"):
        writer.from_indexed_dataset(List([(b"x",)]))
    assert stat.S_ISFIFO(os.lstat(tmp_path / "a").st_mode)


def test_the_command_says_that_a_device_is_no_target_and_leaves_it(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for out in ("/dev/null", str(tmp_path / "pipe")):
        before = os.lstat(out)
        arguments = ["--source=shapes", "--num_samples=2", "--workers=1"]
        # a copy of the path, as a writer without the check would replace the device
        link = tmp_path / "link"
        link.symlink_to(out)
        assert write_dataset.main([*arguments, f"--out={link}"]) == 2
        err = capsys.readouterr().err
        assert "expected a regular file" in err and err.count("\n") == 1
        assert os.path.samestat(before, os.lstat(out)) and link.is_symlink()
        link.unlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "a"
    if exists:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("disk/a")
    write(tmp_path / "link", BLOB, [(b"new",)])
    assert (tmp_path / "link").is_symlink() and not target.is_symlink()
    with Reader(target) as reader:
        assert reader.decode(0, "blob") == b"new"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(target.parent) == ["a"]


def test_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(UserError, match="cannot be written") as error:
        write(tmp_path / "a", BLOB, [(b"x",)])
    assert "\n" not in str(error.value)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".a.4711.tmp").write_bytes(b"left by an older version")
    (tmp_path / f".a.{'0f' * 8}.tmp").write_bytes(b"left")
    kept = [".b.4711.tmp", ".a.notes.tmp", "a.4711.tmp", ".a.b.4711.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(b"of others")
    os.mkfifo(tmp_path / ".a.12.tmp")
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert sorted(os.listdir(tmp_path)) == sorted(["a", ".a.12.tmp", *kept])


def test_the_file_of_a_living_writer_is_not_removed(tmp_path):
    name = f".a.{'0f' * 8}.tmp"
    with open(tmp_path / name, "wb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write(tmp_path / "a", BLOB, [(b"x",)])
        assert sorted(os.listdir(tmp_path)) == [name, "a"]
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_stay_where_there_are_no_locks_and_writing_works(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".a.4711.tmp").write_bytes(b"maybe of a living writer")
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert sorted(os.listdir(tmp_path)) == [".a.4711.tmp", "a"]


def test_a_new_file_that_another_writer_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    flock, taken = fcntl.flock, []

    def late(file, operation):
        if not taken:  # the moment between making the file and locking it
            taken.extend(os.listdir(tmp_path))
            (tmp_path / taken[0]).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert len(taken) == 1 and os.listdir(tmp_path) == ["a"]
    with Reader(tmp_path / "a") as reader:
        assert reader.decode(0, "blob") == b"x"


def test_two_writers_of_one_target_disturb_each_other_nowhere(tmp_path):
    meeting, errors = threading.Barrier(2), []

    def item(text):
        meeting.wait(10)  # both files are there, and both are half-written
        return (text,)

    def work(text):
        try:
            first, last = (lambda: item(text)), (lambda: item(text * 2))
            write(tmp_path / "a", BLOB, [first, (b"-" * 99_999,), last])
        except Exception as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(text,)) for text in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and os.listdir(tmp_path) == ["a"]
    with Reader(tmp_path / "a") as reader:
        text = reader.decode(0, "blob")
        assert text in (b"one", b"two") and reader.decode(2, "blob") == text * 2


@pytest.mark.parametrize("size", [200, 240, 255])
def test_a_name_as_long_as_a_file_system_takes_is_written(tmp_path, size):
    write(tmp_path / ("n" * size), BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["n" * size]


SLOW_COMMAND = """
import sys, time
import write_dataset
from ffcv_ssl.sources import shapes

draw = shapes.Shapes.__getitem__
def slow(self, index):
    time.sleep(0.003)
    return draw(self, index)
shapes.Shapes.__getitem__ = slow
sys.exit(write_dataset.main(sys.argv[1:]))
"""


def start_slow_command(out):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, "--source=shapes", "--num_samples=20000"]
        + [f"--out={out}", "--workers=2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=REPOSITORY,
    )
    deadline = time.monotonic() + 240
    while not out.parent.exists() or not any(out.parent.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    return process


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_one_line_and_nothing_is_left(tmp_path, number):
    out = tmp_path / "out" / "a.beton"
    process = start_slow_command(out)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -number
    assert err == f"write_dataset.py: ended by {number.name}, nothing is left\n"
    assert os.listdir(out.parent) == []


@pytest.mark.whole
def test_what_a_killed_command_left_is_removed_at_the_next_start(tmp_path):
    out = tmp_path / "out" / "a.beton"
    process = start_slow_command(out)
    process.kill()
    process.communicate()
    assert len(os.listdir(out.parent)) == 1
    deadline = time.monotonic() + 10
    while process_group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)  # workers notice their parent's end within a second
    write(out, BLOB, [(b"x",)])
    assert os.listdir(out.parent) == ["a.beton"]


def process_group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_command_restores_the_handlers_that_it_found(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    arguments = ["--source=shapes", "--num_samples=2", "--workers=1", "--size_px=8"]
    assert write_dataset.main([*arguments, f"--out={tmp_path / 'a'}"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_hang_up_stays_ignored(tmp_path, monkeypatch):
    seen = []
    writing = write_dataset.write
    monkeypatch.setattr(
        write_dataset,
        "write",
        lambda args: seen.append(signal.getsignal(signal.SIGHUP)) or writing(args),
    )
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        arguments = ["--source=shapes", "--num_samples=2", "--workers=1", "--size_px=8"]
        assert write_dataset.main([*arguments, f"--out={tmp_path / 'a'}"]) == 0
    finally:
        signal.signal(signal.SIGHUP, former)
    assert seen == [signal.SIG_IGN]


def test_the_command_works_in_a_thread_that_may_set_no_handlers(tmp_path):
    arguments = ["--source=shapes", "--num_samples=2", "--workers=1", "--size_px=8"]
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(write_dataset.main([*arguments, f"--out={tmp_path / 'a'}"]))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_link_into_a_missing_folder_is_one_line_and_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none" / "a")
    with pytest.raises(BetonError, match="cannot be written"):
        write(tmp_path / "link", BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["link"]
