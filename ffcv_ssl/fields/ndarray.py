"""Arrays and tensors of one dtype and shape for the whole file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ssl.beton import ARG_TYPE, MAX_PAGE_BYTES, NDARRAY_ARGUMENTS_TYPE
from ffcv_ssl.fields.base import Decoder, Field, Malloc

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike


# Plain element types only: np.dtype() of a foreign text could be an object or a structured type.
_TYPE_TEXT = re.compile(r"[<>|=][?biufcSUVMm][0-9]{1,9}(\[[0-9]{0,9}[a-zA-Z]{1,2}\])?")
_MAX_DIMENSIONS = 32


class NDArrayDecoder(Decoder):
    """The field's dtype, (B, *shape)."""

    def output_spec(self, field: Any, reader: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        return field.shape, field.dtype

    def decode_batch(
        self, field: Any, metadata_column: np.ndarray, payloads: Any, out: np.ndarray
    ) -> None:
        for row, payload in zip(out, payloads):
            row[...] = np.frombuffer(payload, field.dtype).reshape(field.shape)


class NDArrayField(Field):
    """NumPy arrays of a fixed dtype and shape.

    The shape has 1 to 32 dimensions of at least 1, because FFCV cannot read others back.
    """

    TYPE_ID = 4

    def __init__(self, dtype: DTypeLike, shape: Iterable[int]) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = tuple(int(extent) for extent in shape)
        if self.dtype.hasobject or self.dtype.names or self.dtype.subdtype:
            raise ValueError(f"dtype: got {self.dtype}, expected a plain type of fixed size")
        if not 1 <= len(self.shape) <= _MAX_DIMENSIONS or min(self.shape) < 1:
            raise ValueError(f"shape: got {self.shape}, expected 1 to 32 dimensions of at least 1")
        self.element_size = self.dtype.itemsize * math.prod(self.shape)
        if not 0 < self.element_size <= MAX_PAGE_BYTES:
            raise ValueError(
                f"shape: got {self.element_size} bytes per sample, expected 1 to {MAX_PAGE_BYTES}"
            )

    @property
    def metadata_type(self) -> np.dtype:
        return np.dtype("<u8")

    def to_binary(self) -> np.void:
        arguments = np.zeros(1, NDARRAY_ARGUMENTS_TYPE)
        arguments["shape"][0, : len(self.shape)] = self.shape
        text = json.dumps(self.dtype.descr).encode("ascii")
        arguments["type_length"] = len(text)
        result = np.zeros(1, ARG_TYPE)
        raw = np.frombuffer(arguments.tobytes() + text, np.uint8)
        result.view(np.uint8)[: len(raw)] = raw
        return result[0]

    @classmethod
    def from_binary(cls, binary: np.ndarray) -> NDArrayField:
        raw = np.asarray(binary, np.uint8).tobytes()
        header_bytes = NDARRAY_ARGUMENTS_TYPE.itemsize
        arguments = np.frombuffer(raw[:header_bytes], NDARRAY_ARGUMENTS_TYPE)[0]
        length = int(arguments["type_length"])
        if not 0 < length <= len(raw) - header_bytes:
            raise ValueError(
                f"got an array type of {length} bytes, expected 1 to {len(raw) - header_bytes}"
            )
        shape = [int(extent) for extent in arguments["shape"]]
        while shape and shape[-1] == 0:
            shape.pop()
        return cls._from_type(_parse_type(raw[header_bytes : header_bytes + length]), tuple(shape))

    @classmethod
    def _from_type(cls, dtype: np.dtype, shape: tuple[int, ...]) -> NDArrayField:
        return cls(dtype, shape)

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        value = np.asarray(value)
        if value.dtype != self.dtype or value.shape != self.shape:
            raise ValueError(f"expected {self.dtype} {self.shape}, got {value.dtype} {value.shape}")
        destination[0], buffer = malloc(self.element_size)
        buffer[:] = np.frombuffer(value.tobytes(), np.uint8)

    def pointers(self, column: np.ndarray) -> np.ndarray:
        return column

    def expected_sizes(self, column: np.ndarray) -> np.ndarray:
        return np.full(len(column), self.element_size, np.uint64)

    def decode(self, metadata_row: Any, payload: bytes) -> Any:
        return np.frombuffer(payload, self.dtype).reshape(self.shape).copy()

    def get_decoder_class(self) -> type[Decoder]:
        return NDArrayDecoder


class TorchTensorField(NDArrayField):
    """Torch tensors of a dtype that NumPy has too (not bfloat16)."""

    TYPE_ID = 6

    def __init__(self, dtype: torch.dtype, shape: Iterable[int]) -> None:
        import torch

        try:
            numpy_dtype = torch.zeros(0, dtype=dtype).numpy().dtype
        except TypeError as error:
            raise ValueError(
                f"dtype: {dtype} has no NumPy counterpart ({error}); use another dtype"
            ) from None
        super().__init__(numpy_dtype, shape)
        self.torch_dtype = dtype

    @classmethod
    def _from_type(cls, dtype: np.dtype, shape: tuple[int, ...]) -> TorchTensorField:
        import torch

        try:
            torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
        except TypeError as error:
            raise ValueError(f"{dtype} has no torch counterpart ({error})") from None
        return cls(torch_dtype, shape)

    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        if not hasattr(value, "detach"):
            raise TypeError(f"expected a torch tensor, got {type(value).__name__}")
        super().encode(destination, value.detach().cpu().numpy(), malloc)

    def decode(self, metadata_row: Any, payload: bytes) -> torch.Tensor:
        import torch

        return torch.from_numpy(super().decode(metadata_row, payload))


def _parse_type(raw: bytes) -> np.dtype:
    """The dtype of a descriptor text such as [["", "<f4"]]. Raises ValueError for anything but one
    plain type.
    """
    try:
        ((_, text),) = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"got array type {raw[:64]!r}, expected one plain type") from None
    if not isinstance(text, str) or not _TYPE_TEXT.fullmatch(text):
        raise ValueError(f"got array type {text!r:.64}, expected one plain type")
    try:
        return np.dtype(text)
    except TypeError:
        raise ValueError(f"got array type {text!r}, expected one plain type") from None
