"""Samples encoded in worker processes, handed back in order, whatever the number of processes.

An exception in a worker, or its death, ends the writing with an error that names the sample.
Nothing hangs: the parent watches the workers' process handles, and the workers watch their parent.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.errors import FfcvSslError
from ffcv_ssl.fields.base import Field
from ffcv_ssl.kernels.hash import xxh3_64

_PART_BYTES = 32 << 20  # a chunk of large images travels in parts, so that memory stays bounded
_PARENT_CHECK_S = 1.0
# Per worker: one chunk in work and one waiting, so that it never idles while the parent writes.
_QUEUED_CHUNKS = 2
_WINDOW_CHUNKS = 4  # per worker: how many chunks may be finished before the oldest one is


class Encoded(NamedTuple):
    """n consecutive samples, encoded; P fields have payloads."""

    metadata: bytes  # n items of the file's metadata type, pointers still zero
    sizes: np.ndarray  # uint64 (n, P)
    checksums: np.ndarray  # uint64 (n, P), xxh3-64
    blob: bytes  # payloads end to end, in order; an empty payload takes one byte
    counts: dict[str, dict[str, int]]  # field -> what its `encode` did, as {text: count}


class SampleError(Exception):
    """A sample cannot be encoded, and the text says which one and why; or no sample can, because
    the workers cannot be started."""


class SampleEncoder:
    """Fetches samples of a dataset, anything that can be indexed, and encodes them."""

    def __init__(self, fields: Mapping[str, Field], dataset: Any) -> None:
        self.fields = fields
        self.dataset = dataset
        self.metadata_type = beton.metadata_type(fields.values())
        empty = np.zeros(0, self.metadata_type)
        self.has_payload = [
            field.pointers(empty[f"f{index}"]) is not None
            for index, field in enumerate(fields.values())
        ]

    def encode(
        self,
        first: int,
        sources: list[int],
        on_sample: Callable[[int, int], None] = lambda sample, source: None,
    ) -> Iterator[Encoded]:
        """Encode dataset[source] for each of `sources` as samples first, first + 1, ...

        on_sample(sample, source) is called before each sample.
        """
        metadata = self._zero_metadata(len(sources))
        payloads: list[list[np.ndarray]] = []
        payload_bytes = begin = 0
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

    def _zero_metadata(self, num_samples: int) -> np.ndarray:
        # made from plain zeros: the padding between columns is part of the file's bytes
        raw = np.zeros(num_samples * self.metadata_type.itemsize, np.uint8)
        return raw.view(self.metadata_type)

    def _encode_sample(self, sample: int, source: int, row: np.ndarray) -> list[np.ndarray]:
        """The payloads of one sample, its metadata written to `row` (1,)."""
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

    def _part(self, metadata: np.ndarray, payloads: list[list[np.ndarray]]) -> Encoded:
        sizes = np.array([[p.size for p in row] for row in payloads], np.uint64)
        checksums = np.array([[xxh3_64(p) for p in row] for row in payloads], np.uint64)
        slot = np.zeros(1, np.uint8)
        blob = b"".join((p if p.size else slot).tobytes() for row in payloads for p in row)
        counts = {name: field.take_counts() for name, field in self.fields.items()}
        return Encoded(metadata.tobytes(), sizes, checksums, blob, counts)


def _encode_value(
    field: Field, destination: np.ndarray, value: Any, has_payload: bool
) -> np.ndarray:
    """The payload of one value as uint8 (size,), its metadata written to `destination` (1,)."""
    buffers: list[np.ndarray] = []

    def malloc(num_bytes: int) -> tuple[int, np.ndarray]:
        if not has_payload:
            name = type(field).__name__
            raise TypeError(
                f"{name}.encode calls malloc, but {name}.pointers returns None; override pointers"
            )
        if buffers:
            raise TypeError(f"{type(field).__name__}.encode calls malloc twice, expected once")
        buffers.append(np.zeros(int(num_bytes), np.uint8))
        return 0, buffers[0]

    field.encode(destination, value, malloc)
    return buffers[0] if buffers else np.zeros(0, np.uint8)


def _describe(error: Exception) -> str:
    """An exception in one line, with its type unless it is one of this library's usual types."""
    text = " ".join(str(error).split())
    if text and (type(error) in (ValueError, TypeError) or isinstance(error, FfcvSslError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Chunk(NamedTuple):
    """Consecutive samples that a worker encodes at once."""

    first: int  # id of the first sample
    sources: list[int]  # dataset indices


def encode_in_order(
    encoder: SampleEncoder, chunks: list[Chunk], num_workers: int
) -> Generator[Encoded, None, None]:
    """Yield the encoded samples of all chunks, in order.

    One worker means this process. More workers are forked (spawned where there is no fork), and end
    with the generator. Raises SampleError for a sample that fails, for a worker that dies and where
    workers cannot be started.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield from encoder.encode(*chunk)
        return
    pool = _Pool(encoder, chunks, min(num_workers, len(chunks)))
    try:
        yield from pool.parts()
    finally:
        pool.stop()


class _Worker(NamedTuple):
    process: Any  # Process of a fork or spawn context
    connection: multiprocessing.connection.Connection
    queue: list[int]  # ids of the chunks that it was given and has not finished


class _Pool:
    def __init__(self, encoder: SampleEncoder, chunks: list[Chunk], num_workers: int) -> None:
        self._chunks = chunks
        self._sent = 0
        self._parts: dict[int, list[Encoded]] = {}  # by chunk id, parts that came before their turn
        self._finished: set[int] = set()
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        self._workers: list[_Worker] = []
        try:
            # (sample, dataset index) that each worker is encoding, for the message if it dies
            self._current = context.RawArray("q", 2 * num_workers)
            for index in range(num_workers):
                self._workers.append(self._start(context, index, encoder))
        except OSError as error:
            self.stop()
            raise SampleError(
                f"cannot start {num_workers} worker processes ({error.strerror or error}); use "
                "fewer workers"
            ) from error
        except BaseException:
            self.stop()
            raise

    def _start(self, context: Any, index: int, encoder: SampleEncoder) -> _Worker:
        ours, theirs = context.Pipe()
        # A forked worker inherits the parent's ends of all pipes. It must close them, or it would
        # never see that the parent has died.
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

    def parts(self) -> Iterator[Encoded]:
        for chunk_id in range(len(self._chunks)):
            while True:
                yield from self._parts.pop(chunk_id, ())
                if chunk_id in self._finished:
                    self._finished.remove(chunk_id)
                    break
                self._hand_out(chunk_id)
                self._receive()

    def _hand_out(self, oldest_unfinished: int) -> None:
        limit = min(len(self._chunks), oldest_unfinished + _WINDOW_CHUNKS * len(self._workers))
        for depth in range(_QUEUED_CHUNKS):
            for worker in self._workers:
                if self._sent < limit and len(worker.queue) == depth:
                    try:
                        # Only the id, not the chunk: the message must fit into the pipe, because
                        # the worker may not read while it waits for us to read its large message.
                        worker.connection.send(self._sent)
                    except OSError:
                        raise self._death(worker) from None
                    worker.queue.append(self._sent)
                    self._sent += 1

    def _receive(self) -> None:
        owner: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        owner |= {worker.process.sentinel: worker for worker in self._workers}
        ready = multiprocessing.connection.wait(list(owner))
        for worker in {id(owner[handle]): owner[handle] for handle in ready}.values():
            try:
                self._take_message(worker)
            except (EOFError, OSError):
                raise self._death(worker) from None

    def _take_message(self, worker: _Worker) -> None:
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

    def _death(self, worker: _Worker) -> SampleError:
        worker.process.join(5)
        code = worker.process.exitcode
        how = (
            f"was killed by signal {-code}" if code is not None and code < 0 else f"exited ({code})"
        )
        if code == -signal.SIGKILL:
            how += "; if memory was full, use fewer workers"
        index = self._workers.index(worker)
        sample, source = self._current[2 * index : 2 * index + 2]
        return SampleError(f"sample {sample} (dataset index {source}): its worker process {how}")

    def stop(self) -> None:
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


class _RemoteError(Exception):
    """A worker's traceback, shown as the cause of the error in the parent."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"in a worker process:\n{trace}")


def _work(
    connection: Any,
    encoder: SampleEncoder,
    chunks: list[Chunk],
    current: Any,
    index: int,
    parent: int,
    inherited: list[Any],
) -> None:
    """What a worker process does: receive chunk ids and send encoded parts, until the parent stops
    it or is gone."""
    # Ctrl-C and a closed terminal: the parent gets the signal too, and stops us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_threads()
    for parents_end in inherited:
        parents_end.close()

    def on_sample(sample: int, source: int) -> None:
        if os.getppid() != parent:  # a killed parent's workers must not go on for a whole chunk
            sys.exit()
        current[2 * index], current[2 * index + 1] = sample, source

    try:
        while True:
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            chunk_id = connection.recv()
            first, sources = chunks[chunk_id]
            try:
                for part in encoder.encode(first, sources, on_sample):
                    connection.send(("part", chunk_id, part._replace(blob=b"")))
                    connection.send_bytes(part.blob)
            except Exception as error:
                text = str(error) if isinstance(error, SampleError) else _describe(error)
                connection.send(("error", chunk_id, (text, traceback.format_exc())))
                return
            connection.send(("done", chunk_id, None))
    except (EOFError, OSError):
        return  # the parent is gone


def _limit_threads() -> None:
    """One torch thread per worker, as in torch's DataLoader: a forked OpenMP pool would wait for
    ever.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def add_counts(total: dict[str, Counter[str]], counts: dict[str, dict[str, int]]) -> None:
    """Add the counts of a part to `total`, field by field."""
    for name, count in counts.items():
        total.setdefault(name, Counter()).update(count)
