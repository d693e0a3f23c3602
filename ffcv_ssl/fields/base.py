"""What a field and a decoder are: how one kind of value is written, and read back.

Names and meanings follow FFCV (`metadata_type`, `to_binary`, `from_binary`, `encode`,
`get_decoder_class`), so a custom field made for FFCV needs only its import line changed. What FFCV
has no word for is added with working defaults.
"""

from abc import ABC, abstractmethod

import numpy as np

from ffcv_ssl.beton import ARG_TYPE, CUSTOM_TYPE_ID

ANY_SIZE = np.uint64(2**64 - 1)  # an expected size that says nothing

__all__ = ["ANY_SIZE", "ARG_TYPE", "Decoder", "Field"]


class Field(ABC):
    """One column of a dataset.

    A sample's value is a fixed-size metadata item, plus at most one payload: a run of bytes in the
    data region to which the metadata points.
    """

    TYPE_ID = (
        CUSTOM_TYPE_ID  # a custom field's; readers must be told its class through `custom_fields`
    )

    @property
    @abstractmethod
    def metadata_type(self) -> np.dtype:
        """dtype of the metadata item; fixed for the whole file."""

    @staticmethod
    @abstractmethod
    def from_binary(binary) -> "Field":
        """The field described by 1024 bytes (uint8 array) of a descriptor. ValueError if they make
        no sense.
        """

    def to_binary(self):
        """The descriptor's arguments, an ARG_TYPE item. Fields without settings keep the zeros."""
        return np.zeros(1, dtype=ARG_TYPE)[0]

    @abstractmethod
    def encode(self, destination, value, malloc):
        """Write `value`.

        destination: metadata_type array (1,), to be filled. malloc(num_bytes) -> (pointer, uint8
        buffer): reserves the payload; called at most once. ValueError or TypeError for a value that
        does not fit the field.
        """

    def decode(self, metadata_row, payload: bytes):
        """The value again, from its metadata item and payload (b"" if it has none).

        ValueError if they disagree. Needed by `Reader.decode` only, so a field made for FFCV, which
        knows no such method, still loads through its decoder.
        """
        raise TypeError(f"{type(self).__name__} does not say how to decode a sample; define decode")

    @abstractmethod
    def get_decoder_class(self):
        """The op that starts this field's pipeline when the user names none."""

    def pointers(self, column):
        """Payload pointers in a metadata column: a writable uint64 view (N,), or None without
        payloads.

        The default finds FFCV's usual names, `ptr` and `data_ptr`; a custom field that calls it
        otherwise overrides this.
        """
        names = column.dtype.names or ()
        for name in ("data_ptr", "ptr"):
            if name in names:
                return column[name]
        return None

    def expected_sizes(self, column):
        """uint64 (N,) payload sizes that the metadata promises (ANY_SIZE: no promise), or None for
        no promise.
        """
        return None

    def find_bad_sample(self, column, sizes):
        """Sanity of all samples at once: (index, reason) of the first bad one, or None. sizes:
        uint64 (N,) or None.
        """
        return None

    def take_counts(self) -> dict:
        """What `encode` did since the last call, as {text: count}; resets the counts. Summed into
        the file's history.
        """
        return {}


class Decoder:
    """Turns samples of a non-image field into rows of a batch."""

    def output_spec(self, field, reader, name):
        """(shape without the batch dimension, dtype) of this decoder's output for that field of
        that file.
        """
        raise TypeError(f"{type(self).__name__} does not say what it puts out; define output_spec")

    def decode_batch(self, field, metadata_column, payloads, out):
        """Fill out[i] from metadata_column[i] and payloads[i] for every i.

        payloads: list of bytes, already checked against size and checksum, or None for fields
        without payload. out: array (len(metadata_column), *shape) of output_spec's dtype; every
        element is written.
        """
        raise TypeError(f"{type(self).__name__} does not decode batches; define decode_batch")


def first_true(mask):
    """Index of the first True as an int, or None."""
    index = int(np.argmax(mask)) if len(mask) else 0
    return index if len(mask) and mask[index] else None
