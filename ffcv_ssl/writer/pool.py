"""Samples encoded in worker processes, handed back in order, whatever the number of processes.

An exception in a worker, or its death, ends the writing with an error that names the sample;
nothing hangs: workers are watched through their process handles, and they watch their parent.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections import Counter
from typing import NamedTuple

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.errors import BetonError
from ffcv_ssl.kernels.hash import xxh3_64

_PART_BYTES = 32 << 20  # a chunk of large images travels in parts, so that memory stays bounded
_PARENT_CHECK_S = 1.0
_QUEUED_CHUNKS = (
    2  # a worker: one under way, one waiting, so that it never idles while the parent writes
)
_WINDOW_CHUNKS = 4  # a worker: how far the finished chunks may run ahead of a slow one


class Encoded(NamedTuple):
    """Consecutive samples, encoded; n of them, with P payload fields."""

    metadata: bytes  # n items of the file's metadata type, pointers still zero
    sizes: np.ndarray  # uint64 (n, P)
    checksums: np.ndarray  # uint64 (n, P), xxh3-64
    blob: bytes  # payloads end to end, in order; an empty payload takes one byte
    counts: dict  # field name -> what its encode did, as {text: count}


class SampleError(Exception):
    """A sample that could not be encoded; its text says which, and why."""


class SampleEncoder:
    """Fetches samples of a dataset and encodes them. fields: name -> Field. dataset: anything
    indexable.
    """

    def __init__(self, fields, dataset):
        self.fields = fields
        self.dataset = dataset
        self.metadata_type = beton.metadata_type(fields.values())
        empty = np.zeros(0, self.metadata_type)
        self.has_payload = [
            field.pointers(empty[f"f{index}"]) is not None
            for index, field in enumerate(fields.values())
        ]

    def encode(self, first, sources, on_sample=lambda sample, source: None):
        """Yield Encoded parts of samples first, first + 1, ..., made from dataset[source] for each
        of `sources`.
        """
        metadata = self._zero_metadata(len(sources))
        payloads, payload_bytes, begin = [], 0, 0
        for offset, source in enumerate(sources):
            on_sample(first + offset, source)
            payloads.append(
                self._encode_sample(first + offset, source, metadata[offset : offset + 1])
            )
            payload_bytes += sum(payload.size for payload in payloads[-1])
            if payload_bytes >= _PART_BYTES:
                yield self._part(metadata[begin : offset + 1], payloads)
                payloads, payload_bytes, begin = [], 0, offset + 1
        if payloads:
            yield self._part(metadata[begin:], payloads)

    def _zero_metadata(self, num_samples):
        # made from plain bytes: the padding between columns is part of the file, and must not be
        # garbage
        raw = np.zeros(num_samples * self.metadata_type.itemsize, np.uint8)
        return raw.view(self.metadata_type)

    def _encode_sample(self, sample, source, row):
        place = f"sample {sample} (dataset index {source})"
        try:
            values = self.dataset[source]
        except Exception as error:
            raise SampleError(f"{place}: {_describe(error)}") from error
        if not isinstance(values, (tuple, list)) or len(values) != len(self.fields):
            got = len(values) if isinstance(values, (tuple, list)) else type(values).__name__
            raise SampleError(
                f"{place}: expected a tuple of {len(self.fields)} values "
                f"({', '.join(self.fields)}), got {got}"
            )
        payloads = []
        for index, ((name, field), value) in enumerate(zip(self.fields.items(), values)):
            try:
                payload = _encode_value(field, row[f"f{index}"], value, self.has_payload[index])
            except Exception as error:
                raise SampleError(f"{place}, field '{name}': {_describe(error)}") from error
            if self.has_payload[index]:
                payloads.append(payload)
        return payloads

    def _part(self, metadata, payloads):
        sizes = np.array([[p.size for p in row] for row in payloads], np.uint64)
        checksums = np.array([[xxh3_64(p) for p in row] for row in payloads], np.uint64)
        slot = np.zeros(1, np.uint8)
        blob = b"".join((p if p.size else slot).tobytes() for row in payloads for p in row)
        counts = {name: field.take_counts() for name, field in self.fields.items()}
        return Encoded(metadata.tobytes(), sizes, checksums, blob, counts)


def _encode_value(field, destination, value, has_payload):
    """The payload of one value as uint8 (size,), its metadata written to `destination` (1,)."""
    buffers = []

    def malloc(num_bytes):
        if not has_payload or buffers:
            limit = "one allocation" if has_payload else "no allocation, as it names no pointers"
            raise TypeError(f"{type(field).__name__} may make {limit} a sample")
        buffers.append(np.zeros(int(num_bytes), np.uint8))
        return 0, buffers[0]

    field.encode(destination, value, malloc)
    return buffers[0] if buffers else np.zeros(0, np.uint8)


def _describe(error):
    """An exception in one line; foreign ones make no sense without their type."""
    text = " ".join(str(error).split())
    if text and type(error) in (ValueError, TypeError, BetonError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Chunk(NamedTuple):
    first: int  # sample id of the first one
    sources: list  # dataset indices


def encode_in_order(encoder, chunks, num_workers):
    """Yield Encoded parts of all chunks in order. SampleError for a sample that fails, or a worker
    that dies.

    One worker means this process; more are forked (spawned where there is no fork), and gone when
    the generator ends.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield from encoder.encode(*chunk)
        return
    xxh3_64(b"")  # compiled or loaded once here, not in every worker
    pool = _Pool(encoder, chunks, min(num_workers, len(chunks)))
    try:
        yield from pool.parts()
    finally:
        pool.stop()


class _Worker(NamedTuple):
    process: multiprocessing.Process
    connection: multiprocessing.connection.Connection
    queue: list  # ids of the chunks it has been given and not finished


class _Pool:
    def __init__(self, encoder, chunks, num_workers):
        self._chunks = chunks
        self._sent = 0
        self._parts = {}  # chunk id -> parts that came before their turn
        self._finished = set()
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        # what each worker is at, (sample, dataset index), for the day it dies
        self._current = context.RawArray("q", 2 * num_workers)
        self._workers = []
        try:
            for index in range(num_workers):
                self._workers.append(self._start(context, index, encoder))
        except BaseException:
            self.stop()
            raise

    def _start(self, context, index, encoder):
        ours, theirs = context.Pipe()
        # a fork inherits our ends of the pipes, its own too: held open, they would keep it waiting
        # for a parent that is gone
        inherited = [worker.connection for worker in self._workers] + [ours]
        is_fork = context.get_start_method() == "fork"
        process = context.Process(
            target=_work,
            args=(
                theirs,
                encoder,
                self._chunks,
                self._current,
                index,
                os.getpid(),
                inherited if is_fork else [],
            ),
            name=f"beton-writer-{index}",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that a dead worker's pipe ends
        return _Worker(process, ours, [])

    def parts(self):
        for chunk_id in range(len(self._chunks)):
            while True:
                yield from self._parts.pop(chunk_id, ())
                if chunk_id in self._finished:
                    self._finished.remove(chunk_id)
                    break
                self._hand_out(chunk_id)
                self._receive()

    def _hand_out(self, oldest_unfinished):
        limit = min(len(self._chunks), oldest_unfinished + _WINDOW_CHUNKS * len(self._workers))
        for depth in range(_QUEUED_CHUNKS):
            for worker in self._workers:
                if self._sent < limit and len(worker.queue) == depth:
                    try:
                        # an id, not the chunk: this must fit the pipe even while the worker is not
                        # reading, because it may be waiting for us to take its own large message
                        worker.connection.send(self._sent)
                    except OSError:
                        raise self._death(worker) from None
                    worker.queue.append(self._sent)
                    self._sent += 1

    def _receive(self):
        by_handle = {worker.connection: worker for worker in self._workers}
        by_handle.update({worker.process.sentinel: worker for worker in self._workers})
        for worker in {id(w): w for w in map(by_handle.get, _wait(by_handle))}.values():
            try:
                self._take_message(worker)
            except (EOFError, OSError):
                raise self._death(worker) from None

    def _take_message(self, worker):
        if not worker.connection.poll():
            raise EOFError
        kind, chunk_id, content = worker.connection.recv()
        if kind == "part":
            blob = worker.connection.recv_bytes()
            self._parts.setdefault(chunk_id, []).append(content._replace(blob=blob))
        elif kind == "done":
            worker.queue.remove(chunk_id)
            self._finished.add(chunk_id)
        else:
            text, trace = content
            raise SampleError(text) from _RemoteError(trace)

    def _death(self, worker):
        worker.process.join(5)
        code = worker.process.exitcode
        how = (
            f"was killed by signal {-code}" if code is not None and code < 0 else f"exited ({code})"
        )
        index = self._workers.index(worker)
        sample, source = self._current[2 * index : 2 * index + 2]
        return SampleError(f"sample {sample} (dataset index {source}): its worker process {how}")

    def stop(self):
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
            worker.process.close()
        self._workers = []


_wait = multiprocessing.connection.wait


class _RemoteError(Exception):
    """The traceback of a worker, shown as the cause of the error in the parent."""

    def __init__(self, trace):
        super().__init__(f"in a worker process:\n{trace}")


def _work(connection, encoder, chunks, current, index, parent, inherited):
    """A worker's life: chunks in, parts out, until told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_threads()
    for parents_end in inherited:
        parents_end.close()

    def on_sample(sample, source):
        current[2 * index], current[2 * index + 1] = sample, source

    try:
        while True:
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            chunk_id = connection.recv()
            try:
                for part in encoder.encode(*chunks[chunk_id], on_sample):
                    connection.send(("part", chunk_id, part._replace(blob=b"")))
                    connection.send_bytes(part.blob)
            except Exception as error:
                text = str(error) if isinstance(error, SampleError) else _describe(error)
                connection.send(("error", chunk_id, (text, traceback.format_exc())))
                return
            connection.send(("done", chunk_id, None))
    except (EOFError, OSError):
        return  # the parent is gone


def _limit_threads():
    """One torch thread a worker, as torch's own DataLoader does: a forked OpenMP pool would wait
    for ever.
    """
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def add_counts(total, counts):
    """Add a part's counts (field -> {text: count}) to `total` (field -> Counter)."""
    for name, count in counts.items():
        total.setdefault(name, Counter()).update(count)
