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
from ffcv_ssl.writer import unfinished

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


OTHER_MACHINE = "ffffffff"


def leave(path, age_s):
    path.write_bytes(b"left")
    os.utime(path, (time.time() - age_s,) * 2)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    leave(tmp_path / ".a.4711.tmp", age_s=700)  # the name that an older version gave
    leave(tmp_path / f".a.{'0f' * 8}.tmp", age_s=700)  # and a later one
    leave(tmp_path / f".a.{OTHER_MACHINE}-{'0f' * 8}.tmp", age_s=700)
    leave(tmp_path / f".a.{unfinished._machine()}-{'0f' * 8}.tmp", age_s=0)
    kept = [".b.4711.tmp", ".a.notes.tmp", "a.4711.tmp", ".a.b.4711.tmp"]
    for name in kept:
        leave(tmp_path / name, age_s=700)
    os.mkfifo(tmp_path / ".a.12.tmp")
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert sorted(os.listdir(tmp_path)) == sorted(["a", ".a.12.tmp", *kept])


def test_the_file_of_a_living_writer_is_not_removed(tmp_path):
    name = f".a.{'0f' * 8}.tmp"
    leave(tmp_path / name, age_s=700)
    with open(tmp_path / name, "rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write(tmp_path / "a", BLOB, [(b"x",)])
        assert sorted(os.listdir(tmp_path)) == [name, "a"]
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_of_a_writer_whose_lock_is_not_seen_from_here_is_not_removed(tmp_path):
    # Lustre with localflock, NFS with local_lock: another machine's lock is not seen
    names = [f".a.{OTHER_MACHINE}-{'0f' * 8}.tmp", ".a.4711.tmp", f".a.{'0f' * 8}.tmp"]
    for name in names:
        leave(tmp_path / name, age_s=60)
    write(tmp_path / "a", BLOB, [(b"x",)])
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a"])


def test_a_writer_does_not_even_lock_the_unfinished_files_of_its_own_process(tmp_path):
    with unfinished.unfinished(str(tmp_path / "a")):
        (own,) = os.listdir(tmp_path)
        opened, os_open = [], os.open

        def watched(path, *flags):
            opened.append(path)
            return os_open(path, *flags)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unfinished.os, "open", watched)
            unfinished._remove_leftovers(str(tmp_path), "a")
        assert opened == [] and os.listdir(tmp_path) == [own]


def test_a_folder_that_cannot_be_listed_is_written_to(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.os, "listdir", refuse)
        write(tmp_path / "a", BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["a"]


def is_locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def test_a_forked_process_that_lives_on_does_not_keep_its_parents_lock(tmp_path):
    with unfinished._new_file(str(tmp_path / "a"), str(tmp_path), "a") as (file, temporary):
        started, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b"x")
            time.sleep(60)
            os._exit(0)
        try:
            os.read(started, 1)
            with open(os.devnull, "wb") as null, open(temporary, "rb") as other:
                assert is_locked(other)
                os.dup2(null.fileno(), file.fileno())  # as when this process is killed
                assert not is_locked(other)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(started)
            os.close(told)


def test_leftovers_stay_where_there_are_no_locks_and_writing_works(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave(tmp_path / ".a.4711.tmp", age_s=700)  # maybe of a living writer
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
        # under `nohup` it would not hear this signal, and rightly so
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    wait_until(lambda: process.poll() is not None or has_begun(out.parent))
    assert process.poll() is None, process.communicate()
    return process


def has_begun(folder):
    """Whether a file in a folder holds bytes."""
    return folder.exists() and any(path.stat().st_size for path in folder.iterdir())


def wait_until(is_so, limit_s=240):
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.01)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_one_line_and_nothing_is_left(tmp_path, number):
    out = tmp_path / "out" / "a.beton"
    process = start_slow_command(out)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
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
    write(out, BLOB, [(b"x",)])  # its workers live for a moment still
    assert os.listdir(out.parent) == ["a.beton"]


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


def test_an_empty_path_is_refused_before_anything_is_encoded():
    with pytest.raises(UserError, match="got an empty path, expected the name of a file to write"):
        DatasetWriter("", BLOB)


def test_a_signal_ends_the_process_where_the_system_drops_it(tmp_path, monkeypatch):
    # the first process of a container gets no signal of its own that has no handler
    sent = []

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(write_dataset.os, "kill", lambda *given: sent.append(given))
    monkeypatch.setattr(write_dataset.os, "_exit", end)
    with write_dataset._removing_on_signals(), pytest.raises(SystemExit) as ended:
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    assert sent == [(os.getpid(), signal.SIGTERM)] and ended.value.code == 128 + signal.SIGTERM


def test_a_file_that_fails_when_it_is_closed_is_one_line(tmp_path):
    with pytest.raises(
        BetonError, match=r"a: cannot be written \(Bad file descriptor\); make room"
    ):
        with unfinished.unfinished(str(tmp_path / "a")) as file:
            os.close(file.fileno())
    assert os.listdir(tmp_path) == []


def test_a_link_into_a_missing_folder_is_one_line_and_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none" / "a")
    with pytest.raises(BetonError, match="cannot be written"):
        write(tmp_path / "link", BLOB, [(b"x",)])
    assert os.listdir(tmp_path) == ["link"]
