"""Numbers: the value is the metadata itself, 64 bits, no payload."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ffcv_ssl.fields.base import Decoder, Field, Malloc


class _ScalarDecoder(Decoder):
    dtype: np.dtype

    def output_spec(self, field: Any, reader: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        return (1,), self.dtype

    def decode_batch(
        self, field: Any, metadata_column: np.ndarray, payloads: Any, out: np.ndarray
    ) -> None:
        out[:, 0] = metadata_column


class IntDecoder(_ScalarDecoder):
    """int64 (B, 1)."""

    dtype = np.dtype("<i8")


class FloatDecoder(_ScalarDecoder):
    """float64 (B, 1)."""

    dtype = np.dtype("<f8")


class IntField(Field):
    """Signed 64-bit integers. In this library, label -1 means unlabelled."""

    TYPE_ID = 1

    @property
    def metadata_type(self) -> np.dtype:
        return np.dtype("<i8")

    @staticmethod
    def from_binary(binary: np.ndarray) -> IntField:
        return IntField()

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        """value: an int, a NumPy integer, or an integer tensor of one element."""
        try:
            exact = operator.index(value)
        except TypeError:
            raise TypeError(f"expected an integer, got {type(value).__name__}") from None
        if not -(2**63) <= exact < 2**63:
            raise ValueError(f"got {exact}, expected an integer of 64 bits")
        destination[0] = exact

    def decode(self, metadata_row: Any, payload: bytes) -> int:
        return int(metadata_row)

    def get_decoder_class(self) -> type[Decoder]:
        return IntDecoder


class FloatField(Field):
    """64-bit floating point numbers, every value kept (NaN and infinities too)."""

    TYPE_ID = 0

    @property
    def metadata_type(self) -> np.dtype:
        return np.dtype("<f8")

    @staticmethod
    def from_binary(binary: np.ndarray) -> FloatField:
        return FloatField()

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        """value: anything that `float` takes, except text."""
        if isinstance(value, (str, bytes)):
            raise TypeError(f"expected a number, got {type(value).__name__}")
        destination[0] = float(value)

    def decode(self, metadata_row: Any, payload: bytes) -> float:
        return float(metadata_row)

    def get_decoder_class(self) -> type[Decoder]:
        return FloatDecoder
