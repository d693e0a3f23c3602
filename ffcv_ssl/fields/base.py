"""What a field and a decoder are: how one kind of value is written, and read back.

Names and meanings follow FFCV (`metadata_type`, `to_binary`, `from_binary`, `encode`,
`get_decoder_class`), so a custom field made for FFCV needs only its import line changed. Methods
that FFCV does not have come with defaults that work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ssl.beton import ARG_TYPE, CUSTOM_TYPE_ID

if TYPE_CHECKING:
    from ffcv_ssl.transforms.base import ImageOp

ANY_SIZE = np.uint64(2**64 - 1)  # an expected size that promises nothing

# malloc(num_bytes) -> (pointer, uint8 buffer (num_bytes,)): reserves a sample's payload
Malloc = Callable[[int], tuple[int, np.ndarray]]

__all__ = ["ANY_SIZE", "ARG_TYPE", "Decoder", "Field", "Malloc"]


class Field(ABC):
    """One column of a dataset.

    A sample's value is a fixed-size metadata item, plus at most one payload: a run of bytes in the
    data region to which the metadata points.
    """

    # Of a custom field; a reader is given the class of such a field in `custom_fields`.
    TYPE_ID: int = CUSTOM_TYPE_ID

    @property
    @abstractmethod
    def metadata_type(self) -> np.dtype:
        """dtype of the metadata item; fixed for the whole file."""

    @staticmethod
    @abstractmethod
    def from_binary(binary: np.ndarray) -> Field:
        """The field that the 1024 bytes (uint8) of a descriptor describe. Raises ValueError if they
        describe none.
        """

    def to_binary(self) -> np.void:
        """The descriptor's arguments, an ARG_TYPE item; all zeros for a field without settings."""
        return np.zeros(1, dtype=ARG_TYPE)[0]

    @abstractmethod
    def encode(self, destination: np.ndarray, value: Any, malloc: Malloc) -> None:
        """Write `value`.

        destination: metadata_type array (1,), to be filled. malloc: to be called at most once.
        Raises ValueError or TypeError for a value that does not fit the field.
        """

    def decode(self, metadata_row: Any, payload: bytes) -> Any:
        """The value, from its metadata item and payload (b"" if it has none).

        Raises ValueError if they disagree. Only `Reader.decode` calls it. FFCV's fields have no
        such method; they still load through their decoder.
        """
        raise TypeError(f"{type(self).__name__} has no method decode; define one to read samples")

    @abstractmethod
    def get_decoder_class(self) -> type[Decoder] | type[ImageOp]:
        """The op that starts this field's pipeline when the user names none."""

    def pointers(self, column: np.ndarray) -> np.ndarray | None:
        """The payload pointers in a metadata column: a view uint64 (N,), writable if `column` is;
        None for a field without payloads.

        The default finds FFCV's usual names, `ptr` and `data_ptr`; a custom field with another name
        overrides this.
        """
        names = column.dtype.names or ()
        for name in ("data_ptr", "ptr"):
            if name in names:
                return column[name]
        return None

    def expected_sizes(self, column: np.ndarray) -> np.ndarray | None:
        """The payload sizes that the metadata promises, uint64 (N,), ANY_SIZE where it promises
        none; None if it never promises any.
        """
        return None

    def find_bad_sample(
        self, column: np.ndarray, sizes: np.ndarray | None
    ) -> tuple[int, str] | None:
        """Check the metadata of all samples at once: (index, reason) of the first bad sample, or
        None. sizes: of the payloads, uint64 (N,), or None for a field without payloads.
        """
        return None

    def take_counts(self) -> dict[str, int]:
        """What `encode` did since the last call, as {text: count}; resets the counts. The file's
        history holds their sums.
        """
        return {}


class Decoder:
    """Turns samples of a non-image field into rows of a batch."""

    def output_spec(self, field: Any, reader: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape without the batch dimension, dtype) of this decoder's output for a field of a
        file."""
        raise TypeError(f"{type(self).__name__} has no method output_spec; define one")

    def decode_batch(
        self,
        field: Any,
        metadata_column: np.ndarray,
        payloads: Any,
        out: np.ndarray,
    ) -> None:
        """Fill out[i] from metadata_column[i] and payloads[i] for every i.

        payloads: list of bytes whose sizes and checksums are right, or None for a field without
        payloads. out: array (len(metadata_column), *shape) of output_spec's dtype; every element
        must be written.
        """
        raise TypeError(f"{type(self).__name__} has no method decode_batch; define one")


def first_true(mask: np.ndarray) -> int | None:
    """Index of the first True, or None."""
    index = int(np.argmax(mask)) if len(mask) else 0
    return index if len(mask) and mask[index] else None
