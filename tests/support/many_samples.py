"""Files of millions of samples, written in seconds: the payloads are holes.

The file is sparse and opens like any other: header, metadata, allocation table and checksums are
real, and every payload is a raw black image that takes no room on the disk.
"""

from __future__ import annotations

import os

import numpy as np

from ffcv_ssl import beton
from ffcv_ssl.fields import IntField, RGBImageField
from ffcv_ssl.kernels.hash import xxh3_64


def write_many(
    path, num_samples, side_px=1, num_classes=1000, has_checksums=True, labels=None, images=None
):
    """Write a `.beton` of `num_samples` black images, fields image and label; returns its path.

    side_px: of the square images, which lie one after another. labels: int64 (N,); default: classes
    in random order. has_checksums: False leaves the integrity section out, as FFCV does. images:
    {sample: uint8 (side, side, 3)} of those that are not black.
    """
    images = images or {}
    fields = {"image": RGBImageField(), "label": IntField()}
    image_bytes = 3 * side_px * side_px
    metadata = np.zeros(num_samples, beton.metadata_type(fields.values()))
    regions = beton.layout(len(fields), num_samples, metadata.dtype.itemsize)
    data = -(-regions.locator_end // beton.MIN_PAGE_BYTES) * beton.MIN_PAGE_BYTES
    pointer = data + np.arange(num_samples, dtype=np.uint64) * np.uint64(image_bytes)
    image = metadata["f0"]
    image["mode"], image["width"], image["height"] = beton.IMAGE_MODE_RAW, side_px, side_px
    image["data_ptr"] = pointer
    if labels is None:
        labels = np.random.default_rng(0).integers(0, num_classes, num_samples)
    metadata["f1"] = labels
    table = np.zeros(num_samples, beton.ALLOC_ROW_TYPE)
    table["sample_id"], table["ptr"] = np.arange(num_samples), pointer
    table["size"] = image_bytes
    end = data + num_samples * image_bytes
    text = beton.pack_text({}, {"by": "many_samples"})
    section_bytes = beton.section_bytes(text, num_samples) if has_checksums else 0
    header = beton.pack_header(
        len(fields), beton.MIN_PAGE_BYTES, num_samples, table_offset=end + section_bytes
    )
    descriptors = b"".join(
        beton.pack_descriptor(field.TYPE_ID, name, field.to_binary())
        for name, field in fields.items()
    )
    pieces = [(0, header), (regions.descriptors, descriptors), (regions.metadata, metadata)]
    pieces.append((end + section_bytes, table))
    pieces += [(int(pointer[sample]), pixels.tobytes()) for sample, pixels in images.items()]
    if has_checksums:
        checksums = np.full(num_samples, xxh3_64(bytes(image_bytes)), np.uint64)
        for sample, pixels in images.items():
            checksums[sample] = xxh3_64(pixels.tobytes())
        parts = {"header": header, "descriptors": descriptors}
        parts |= {"metadata": metadata.view(np.uint8), "table": table.view(np.uint8)}
        locator, section = beton.pack_integrity(
            regions, end, end + section_bytes, text, checksums, parts
        )
        pieces += [(regions.metadata_end, locator), (end, section)]
    with open(path, "wb") as file:
        for offset, piece in pieces:
            file.seek(offset)
            file.write(piece)
    return os.fspath(path)
