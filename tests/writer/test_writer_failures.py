"""A writer that fails or is killed: one line that names the sample, and nothing left behind."""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from support.beton_files import PAGE_BYTES, pattern, write

from ffcv_ssl import BetonError, beton
from ffcv_ssl import fields as f
from ffcv_ssl.reader import Reader
from ffcv_ssl.writer import DatasetWriter, pool

IMAGE = {"image": f.RGBImageField("raw")}
BLOB = {"blob": f.BytesField()}


def fail():
    raise FileNotFoundError("cat.jpg")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(
    "bad, message",
    [
        (fail, r"sample 5 \(dataset index 5\): FileNotFoundError: cat.jpg"),
        (partial(pattern, 0, 3, 3), r"sample 5 .*expected a tuple of 2 values \(image, label\)"),
        ((pattern(0, 3, 3), "x"), r"sample 5 .*, field 'label': expected an integer, got str"),
        ((np.zeros((3, 3)), 1), r"sample 5 .*, field 'image': expected uint8 pixels, got float64"),
    ],
)
def test_a_sample_that_fails_is_named_and_nothing_is_left(tmp_path, num_workers, bad, message):
    items = [(pattern(i, 3, 3), i) for i in range(20)]
    items[5] = bad
    with pytest.raises(BetonError, match=message) as error:
        write(tmp_path / "a", {**IMAGE, "label": f.IntField()}, items, num_workers, chunksize=2)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_reported_with_its_sample(tmp_path):
    items = [(i,) for i in range(50)]
    items[31] = die
    with pytest.raises(BetonError, match=r"sample 31 \(dataset index 31\).*killed by signal 9"):
        write(tmp_path / "a", {"n": f.IntField()}, items, 3, chunksize=4)
    assert os.listdir(tmp_path) == []
    assert not multiprocessing.active_children()


def test_a_failure_leaves_the_old_file_as_it_was(tmp_path):
    write(tmp_path / "a", BLOB, [(b"old",)])
    with pytest.raises(BetonError):
        write(tmp_path / "a", BLOB, [(b"new",), fail])
    assert os.listdir(tmp_path) == ["a"]
    with Reader(tmp_path / "a") as reader:
        assert reader.decode(0, "blob") == b"old"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, num_workers):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES + 100_000, before[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        line = r"a: cannot be written \(File too large\); raise the limit on the size of files"
        with pytest.raises(BetonError, match=line) as error:
            write(tmp_path / "a", BLOB, [(bytes(9000),)] * 30, num_workers, chunksize=4)
        assert "\n" not in str(error.value)
        assert not multiprocessing.active_children()
    finally:
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE])
def test_workers_that_cannot_be_started_are_told_with_what_to_do(tmp_path, monkeypatch, number):
    starts, start = [], multiprocessing.context.ForkProcess.start

    def refuse(process):
        starts.append(process)
        if len(starts) == 3:
            raise OSError(number, os.strerror(number))
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refuse)
    line = rf"a: cannot start 4 worker processes \({os.strerror(number)}\); use fewer workers$"
    with pytest.raises(BetonError, match=line):
        write(tmp_path / "a", BLOB, [(b"x",)] * 8, 4, chunksize=2)
    assert os.listdir(tmp_path) == [] and not multiprocessing.active_children()


def test_a_stderr_that_takes_nothing_does_not_end_the_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("ffcv_ssl.writer.writer._PROGRESS_INTERVAL_S", 0.0)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        write(tmp_path / "a", BLOB, [(b"x",)])
        with contextlib.suppress(OSError):
            full.close()
    assert os.listdir(tmp_path) == ["a"]


def test_a_worker_whose_parent_is_gone_ends_at_the_next_sample(monkeypatch):
    monkeypatch.setattr(pool.signal, "signal", lambda *given: None)
    monkeypatch.setattr(pool, "_limit_threads", lambda: None)
    done = []

    class Slow:
        def __getitem__(self, index):
            done.append(index)
            return (b"x",)

    ours, theirs = multiprocessing.Pipe()
    ours.send(0)
    encoder, chunk = pool.SampleEncoder(BLOB, Slow()), pool.Chunk(0, list(range(9)))
    with pytest.raises(SystemExit):
        pool._work(theirs, encoder, [chunk], [0, 0], 0, os.getppid() + 1, [])
    assert done == []


def test_chunks_larger_than_a_pipe_do_not_block_the_writer(tmp_path):
    class Repeated:
        def __getitem__(self, index):
            return (index, b"0123456789abcdef" * 2)

    indices = np.arange(84_000) << 40  # long to spell, so that a list of a chunk's is long too
    writer = DatasetWriter(tmp_path / "a", {"n": f.IntField(), **BLOB}, num_workers=2)
    writer.from_indexed_dataset(Repeated(), indices, chunksize=21_000)
    with Reader(tmp_path / "a") as reader:
        assert np.array_equal(reader.metadata["f0"], indices)


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    line = r"a: cannot be written \(No such file or directory\); make its folder first$"
    with pytest.raises(BetonError, match=line) as error:
        write(tmp_path / "none" / "a", BLOB, [(b"x",)])
    assert "\n" not in str(error.value)


def test_labels_outside_of_the_class_names_are_refused(tmp_path):
    for labels in ([0, 2], [-2, 0]):
        with pytest.raises(BetonError, match="2 class names"):
            items = [(label,) for label in labels]
            write(tmp_path / "a", {"y": f.IntField()}, items, class_names={"y": ["a", "b"]})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fields": {}}, "no fields"),
        ({"fields": {"a_name_too_long__": f.IntField()}}, "17 bytes"),
        ({"page_size": 3 << 20}, "power of two"),
        ({"page_size": 1 << 20}, "power of two"),
        ({"page_size": 1 << 32}, "power of two"),
        ({"class_names": {"y": ["a"]}}, "not an IntField"),
        ({"made": {"when": object()}}, "made"),
    ],
)
def test_settings_that_make_no_file_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DatasetWriter(**{"path": tmp_path / "a", "fields": BLOB, **settings})


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        write(tmp_path / "a", BLOB, [])


def test_a_field_may_reserve_one_payload_a_sample_at_most(tmp_path):
    class Twice(f.BytesField):
        def encode(self, destination, value, malloc):
            super().encode(destination, value, malloc)
            super().encode(destination, value, malloc)

    with pytest.raises(BetonError, match="encode calls malloc twice, expected once"):
        write(tmp_path / "a", {"x": Twice()}, [(b"a",)])


SLOW_WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
from ffcv_ssl.fields import BytesField
from ffcv_ssl.writer import DatasetWriter

class Slow:  # seconds, so that it is not done before a test on a busy machine goes on
    def __len__(self):
        return 3000
    def __getitem__(self, index):
        time.sleep(0.003)
        return (bytes(10_000),)

print("go", flush=True)
writer = DatasetWriter(sys.argv[1], {"x": BytesField()}, num_workers=2)
writer.from_indexed_dataset(Slow(), chunksize=9)
"""


def alive(process_group):
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.whole
@pytest.mark.parametrize("delay_s", [0.0, 0.15, 0.3])
def test_a_killed_writer_leaves_no_file_that_opens_and_no_process(tmp_path, delay_s):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, tmp_path / "a.beton"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(beton.__file__))),
    )
    assert process.stdout.readline() == b"go\n"
    time.sleep(delay_s)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "a.beton").exists()
    for left in tmp_path.iterdir():
        with pytest.raises(BetonError):
            Reader(left)
    deadline = time.monotonic() + 10
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid), "workers outlived their parent"


@pytest.mark.whole
def test_an_interrupt_removes_the_unfinished_file_and_the_workers(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, tmp_path / "a.beton"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(beton.__file__))),
    )
    assert process.stdout.readline() == b"go\n"
    while not any(tmp_path.iterdir()):
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0, "the writer was done before it was interrupted"
    process.stdout.close()
    assert os.listdir(tmp_path) == []
    assert not alive(process.pid)
