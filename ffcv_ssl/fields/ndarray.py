"""Arrays and tensors of one dtype and shape for the whole file."""

import json
import math
import re

import numpy as np

from ffcv_ssl.beton import ARG_TYPE, MAX_PAGE_BYTES, NDARRAY_ARGUMENTS_TYPE
from ffcv_ssl.fields.base import Decoder, Field

# Plain element types only: np.dtype() of a foreign text could be an object or a structured type.
_TYPE_TEXT = re.compile(r"[<>|=][?biufcSUVMm][0-9]{1,9}(\[[0-9]{0,9}[a-zA-Z]{1,2}\])?")
_MAX_DIMENSIONS = 32


class NDArrayDecoder(Decoder):
    """The field's dtype, (B, *shape)."""

    def output_spec(self, field, reader, name):
        return field.shape, field.dtype

    def decode_batch(self, field, metadata_column, payloads, out):
        for row, payload in zip(out, payloads):
            row[...] = np.frombuffer(payload, field.dtype).reshape(field.shape)


class NDArrayField(Field):
    """NumPy arrays of fixed dtype and shape (1 to 32 dimensions of at least 1: FFCV cannot read
    others back).
    """

    TYPE_ID = 4

    def __init__(self, dtype, shape):
        self.dtype = np.dtype(dtype)
        self.shape = tuple(int(extent) for extent in shape)
        if self.dtype.hasobject or self.dtype.names or self.dtype.subdtype:
            raise ValueError(f"element type {self.dtype}: expected a plain fixed-size one")
        if not 1 <= len(self.shape) <= _MAX_DIMENSIONS or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape}: expected 1 to 32 dimensions of at least 1 each")
        self.element_size = self.dtype.itemsize * math.prod(self.shape)
        if not 0 < self.element_size <= MAX_PAGE_BYTES:
            raise ValueError(f"{self.element_size} bytes a sample, limit {MAX_PAGE_BYTES}")

    @property
    def metadata_type(self):
        return np.dtype("<u8")

    def to_binary(self):
        arguments = np.zeros(1, NDARRAY_ARGUMENTS_TYPE)
        arguments["shape"][0, : len(self.shape)] = self.shape
        text = json.dumps(self.dtype.descr).encode("ascii")
        arguments["type_length"] = len(text)
        result = np.zeros(1, ARG_TYPE)
        raw = np.frombuffer(arguments.tobytes() + text, np.uint8)
        result.view(np.uint8)[: len(raw)] = raw
        return result[0]

    @classmethod
    def from_binary(cls, binary):
        raw = np.asarray(binary, np.uint8).tobytes()
        header_bytes = NDARRAY_ARGUMENTS_TYPE.itemsize
        arguments = np.frombuffer(raw[:header_bytes], NDARRAY_ARGUMENTS_TYPE)[0]
        length = int(arguments["type_length"])
        if not 0 < length <= len(raw) - header_bytes:
            raise ValueError(f"array type text of {length} bytes")
        shape = [int(extent) for extent in arguments["shape"]]
        while shape and shape[-1] == 0:
            shape.pop()
        return cls._from_type(_parse_type(raw[header_bytes : header_bytes + length]), tuple(shape))

    @classmethod
    def _from_type(cls, dtype, shape):
        return cls(dtype, shape)

    def encode(self, destination, value, malloc):
        value = np.asarray(value)
        if value.dtype != self.dtype or value.shape != self.shape:
            raise ValueError(f"expected {self.dtype} {self.shape}, got {value.dtype} {value.shape}")
        destination[0], buffer = malloc(self.element_size)
        buffer[:] = np.frombuffer(value.tobytes(), np.uint8)

    def pointers(self, column):
        return column

    def expected_sizes(self, column):
        return np.full(len(column), self.element_size, np.uint64)

    def decode(self, metadata_row, payload):
        return np.frombuffer(payload, self.dtype).reshape(self.shape).copy()

    def get_decoder_class(self):
        return NDArrayDecoder


class TorchTensorField(NDArrayField):
    """Torch tensors of a dtype that NumPy has too (not bfloat16)."""

    TYPE_ID = 6

    def __init__(self, dtype, shape):
        import torch

        try:
            numpy_dtype = torch.zeros(0, dtype=dtype).numpy().dtype
        except TypeError as error:
            raise ValueError(f"{dtype} has no NumPy counterpart ({error})") from None
        super().__init__(numpy_dtype, shape)
        self.torch_dtype = dtype

    @classmethod
    def _from_type(cls, dtype, shape):
        import torch

        try:
            torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
        except TypeError as error:
            raise ValueError(f"{dtype} has no torch counterpart ({error})") from None
        return cls(torch_dtype, shape)

    def encode(self, destination, value, malloc):
        if not hasattr(value, "detach"):
            raise TypeError(f"expected a torch tensor, got {type(value).__name__}")
        super().encode(destination, value.detach().cpu().numpy(), malloc)

    def decode(self, metadata_row, payload):
        import torch

        return torch.from_numpy(super().decode(metadata_row, payload))


def _parse_type(raw):
    """The dtype of a descriptor text such as [["", "<f4"]]. ValueError for anything but one plain
    type.
    """
    try:
        ((_, text),) = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"array type {raw[:64]!r}") from None
    if not isinstance(text, str) or not _TYPE_TEXT.fullmatch(text):
        raise ValueError(f"array type {text!r:.64}")
    try:
        return np.dtype(text)
    except TypeError:
        raise ValueError(f"array type {text!r}") from None
