"""JSON objects: text with a null byte at its end, as FFCV stores them."""

import json

import numpy as np

from ffcv_ssl.fields.bytes import BytesDecoder, BytesField

_END = b"\0"


class JSONDecoder(BytesDecoder):
    """uint8 (B, longest in the file), the JSON texts padded with zeros; `JSONField.unpack` makes
    objects of them.
    """


class JSONField(BytesField):
    """Anything `json.dumps` takes."""

    TYPE_ID = 5

    @staticmethod
    def from_binary(binary):
        return JSONField()

    def encode(self, destination, value, malloc):
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"not serialisable as JSON: {error}") from None
        super().encode(destination, text.encode("ascii") + _END, malloc)

    def decode(self, metadata_row, payload):
        return _parse(payload)

    def get_decoder_class(self):
        return JSONDecoder

    @staticmethod
    def unpack(batch):
        """Objects from the loader's output: a list for a batch (B, L), one object for a single row
        (L,).

        batch: uint8 tensor or array. ValueError if a row holds no complete JSON text.
        """
        rows = np.asarray(batch.cpu() if hasattr(batch, "cpu") else batch, dtype=np.uint8)
        if rows.ndim == 1:
            return _parse(rows.tobytes())
        return [_parse(row.tobytes()) for row in rows]


def _parse(payload):
    text, end, _ = bytes(payload).partition(_END)
    if not end:
        raise ValueError("JSON text has no end mark")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON text is nested too deeply") from None
