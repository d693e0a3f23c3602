"""Byte strings of any length, zero bytes included."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.beton import BYTES_METADATA_TYPE
from ffcv_ssl.fields.base import ANY_SIZE, Decoder, Field, Malloc, first_true


class BytesDecoder(Decoder):
    """uint8 (B, longest in the file), shorter values padded with zeros."""

    def output_spec(self, field: Any, reader: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        return (int(reader.field_metadata(name)["size"].max(initial=0)),), np.dtype("<u1")

    def decode_batch(
        self, field: Any, metadata_column: np.ndarray, payloads: Any, out: np.ndarray
    ) -> None:
        for row, payload in zip(out, payloads):
            row[: len(payload)] = np.frombuffer(payload, np.uint8)
            row[len(payload) :] = 0


class BytesField(Field):
    """Variable-length bytes. The writer takes `bytes` or a one-dimensional uint8 array."""

    TYPE_ID = 3

    @property
    def metadata_type(self) -> np.dtype:
        return BYTES_METADATA_TYPE

    @staticmethod
    def from_binary(binary: np.ndarray) -> BytesField:
        return BytesField()

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = np.frombuffer(value, np.uint8)
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 1:
            is_array = isinstance(value, np.ndarray)
            got = f"{value.dtype} {value.shape}" if is_array else type(value).__name__
            raise TypeError(f"expected bytes or a 1-d uint8 array, got {got}")
        destination["ptr"], buffer = malloc(value.size)
        destination["size"] = value.size
        buffer[:] = value

    def expected_sizes(self, column: np.ndarray) -> np.ndarray:
        return column["size"]

    def find_bad_sample(
        self, column: np.ndarray, sizes: np.ndarray | None
    ) -> tuple[int, str] | None:
        # where sizes are compared, ANY_SIZE is no promise; here it would ask for 16 EiB
        index = first_true(column["size"] == ANY_SIZE)
        return None if index is None else (index, "its size is impossible")

    def decode(self, metadata_row: Any, payload: bytes) -> Any:
        return bytes(payload)

    def get_decoder_class(self) -> type[Decoder]:
        return BytesDecoder
