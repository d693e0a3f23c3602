"""JSON objects: text with a null byte at its end, as FFCV stores them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ffcv_ssl.fields.base import Decoder, Malloc
from ffcv_ssl.fields.bytes import BytesDecoder, BytesField

_END = b"\0"


class JSONDecoder(BytesDecoder):
    """uint8 (B, longest in the file), the JSON texts padded with zeros; see `JSONField.unpack`."""


class JSONField(BytesField):
    """Anything `json.dumps` takes."""

    TYPE_ID = 5

    @staticmethod
    def from_binary(binary: np.ndarray) -> JSONField:
        return JSONField()

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"not serialisable as JSON: {error}") from None
        super().encode(destination, text.encode("ascii") + _END, malloc)

    def decode(self, metadata_row: Any, payload: bytes) -> Any:
        return _parse(payload)

    def get_decoder_class(self) -> type[Decoder]:
        return JSONDecoder

    @staticmethod
    def unpack(batch: Any) -> Any:
        """Parse the loader's output: a batch (B, L) gives a list, a single row (L,) one object.

        batch: uint8 tensor or array. Raises ValueError if a row holds no complete JSON text.
        """
        rows = np.asarray(batch.cpu() if hasattr(batch, "cpu") else batch, dtype=np.uint8)
        if rows.ndim == 1:
            return _parse(rows.tobytes())
        return [_parse(row.tobytes()) for row in rows]


def _parse(payload: bytes) -> Any:
    text, end, _ = bytes(payload).partition(_END)
    if not end:
        raise ValueError("JSON text has no end mark")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON text is nested too deeply") from None
