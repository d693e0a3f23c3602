"""Numbers: the value is the metadata itself, 64 bits, no payload."""

import operator

import numpy as np

from ffcv_ssl.fields.base import Decoder, Field


class _ScalarDecoder(Decoder):
    dtype: np.dtype

    def output_spec(self, field, reader, name):
        return (1,), self.dtype

    def decode_batch(self, field, metadata_column, payloads, out):
        out[:, 0] = metadata_column


class IntDecoder(_ScalarDecoder):
    """int64 (B, 1)."""

    dtype = np.dtype("<i8")


class FloatDecoder(_ScalarDecoder):
    """float64 (B, 1)."""

    dtype = np.dtype("<f8")


class IntField(Field):
    """Signed 64-bit integers. By convention of this library, label -1 means unlabelled."""

    TYPE_ID = 1

    @property
    def metadata_type(self):
        return np.dtype("<i8")

    @staticmethod
    def from_binary(binary):
        return IntField()

    def encode(self, destination, value, malloc):
        """value: anything with an exact integer meaning (int, NumPy integer, one-element integer
        tensor).
        """
        try:
            exact = operator.index(value)
        except TypeError:
            raise TypeError(f"expected an integer, got {type(value).__name__}") from None
        if not -(2**63) <= exact < 2**63:
            raise ValueError(f"{exact} does not fit 64 bits")
        destination[0] = exact

    def decode(self, metadata_row, payload):
        return int(metadata_row)

    def get_decoder_class(self):
        return IntDecoder


class FloatField(Field):
    """64-bit floating point numbers, every value kept (NaN and infinities too)."""

    TYPE_ID = 0

    @property
    def metadata_type(self):
        return np.dtype("<f8")

    @staticmethod
    def from_binary(binary):
        return FloatField()

    def encode(self, destination, value, malloc):
        """value: anything that `float` takes, texts aside."""
        if isinstance(value, (str, bytes)):
            raise TypeError(f"expected a number, got {type(value).__name__}")
        destination[0] = float(value)

    def decode(self, metadata_row, payload):
        return float(metadata_row)

    def get_decoder_class(self):
        return FloatDecoder
