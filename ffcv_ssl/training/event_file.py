"""TensorBoard's events, written by the thread that logs.

Guarantees: when `add` returns, the values are in the file; a full disk is an error of that call.
torch's SummaryWriter hands them to a thread, which prints a traceback where it cannot write.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from ffcv_ssl.files import explained

EVENTS_PREFIX = "events.out.tfevents."
"""Begins the names of event files. The second in which a file was made follows: TensorBoard reads
files in the order of their names."""
_VERSION = "brain.Event:2"  # since which SessionLog.START hides earlier events


class EventFile:
    """A new file of scalars, pictures and texts in `folder`, which is made if need be.

    hide_from: a step; TensorBoard hides earlier files' events of this step and of those after it.
    Raises CheckpointError where something cannot be written, here and in every method.
    """

    def __init__(self, folder: Path, hide_from: int | None = None) -> None:
        # slow to import: only where needed
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = (
            folder / f"{EVENTS_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        )
        with explained(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "xb")  # noqa: SIM115, `close` closes it
            self.records = RecordWriter(self.file)
            self._append(Event(file_version=_VERSION))
            if hide_from is not None:
                start = SessionLog(status=SessionLog.START)
                self._append(Event(step=hide_from, session_log=start))

    def add(self, scalars: dict[str, float], step: int) -> None:
        """Append the values of some tags after `step` steps, as float32."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        with explained(self.path):
            self._append(Event(step=step, summary=Summary(value=values)))

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Append a PNG, as it is after `step` steps."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        with explained(self.path):
            value = Summary.Value(tag=tag, image=image)
            self._append(Event(step=step, summary=Summary(value=[value])))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Append a text, in Markdown."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=[text.encode()])
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        with explained(self.path):
            value = Summary.Value(
                tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor
            )
            self._append(Event(step=step, summary=Summary(value=[value])))

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        self.records.flush()

    def sync(self) -> None:
        """Put all events on disk."""
        with explained(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with explained(self.path):
            self.file.close()
