"""How samples of one field reach a batch: read, check, decode once, and render every view.

`process(job, begin, stop, scratch)` fills rows begin..stop of a batch. It returns {row: BetonError}
for rows that it cannot fill. N samples, H W pixels.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from ffcv_ssl.errors import BetonError, UserError
from ffcv_ssl.fields.base import Decoder
from ffcv_ssl.fields.image_codec import check_jpeg
from ffcv_ssl.kernels.io import ALTERED, OK, TRUNCATED, read_samples
from ffcv_ssl.kernels.jpeg import MARGIN, is_fast_here, work_bytes
from ffcv_ssl.loader.workers import Scratch
from ffcv_ssl.pipeline.plan import ViewPlan
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import Crop

RAW_MODE = 1  # value of `mode` in an image's metadata
_ALIGN = 64
_NO_CHECKSUMS = np.zeros(0, np.uint64)


class PayloadReader:
    """Reads payloads of one field of an open file into scratch memory, with one system call per
    sample."""

    def __init__(self, reader: Reader, field_name: str) -> None:
        self.reader, self.field_name = reader, field_name
        extents = reader.extents(field_name)
        assert extents is not None, f"field '{field_name}' has no payloads"
        self.pointers, self.sizes = extents.pointer, extents.size
        self.checksums = extents.checksum
        self.verify = extents.checksum is not None

    def read(
        self, samples: np.ndarray, scratch: Scratch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, BetonError]]:
        """(buffer, offsets (N,), sizes (N,), {position: BetonError})."""
        sizes, pointers = self.sizes[samples], self.pointers[samples]
        checksums = _NO_CHECKSUMS if self.checksums is None else self.checksums[samples]
        room = (sizes.astype(np.int64) + (_ALIGN - 1)) & -_ALIGN
        stops = np.cumsum(room)
        offsets = stops - room
        try:
            buffer = scratch.take("encoded", stops[-1], np.uint8)
        except MemoryError:
            raise self._too_large(samples, int(stops[-1])) from None
        status = np.empty(len(samples), np.int64)
        fd = self.reader.fd
        read_samples(fd, pointers, sizes, checksums, self.verify, offsets, buffer, status)
        if not status.any():
            return buffer, offsets, sizes, {}
        bad = {int(i): self._error(samples[i], status[i]) for i in np.flatnonzero(status != OK)}
        return buffer, offsets, sizes, bad

    def _error(self, sample: int, status: int) -> BetonError:
        if status == TRUNCATED:
            return self.error(sample, "the file ends inside this sample", "copy the file anew")
        if status == ALTERED:
            return self.error(sample, "checksum does not match")
        return self.error(sample, self._system_error(sample), "check the disk")

    def _system_error(self, sample: int) -> str:
        try:
            os.pread(self.reader.fd, 1, int(self.pointers[sample]))
            return "reading failed"
        except OSError as error:
            return f"reading failed ({error.strerror})"

    def _too_large(self, samples: np.ndarray, num_bytes: int) -> UserError:
        largest = int(samples[self.sizes[samples].argmax()])
        return UserError(
            f"{self.reader.path}: field '{self.field_name}': no memory for {num_bytes} bytes of "
            f"{len(samples)} samples, the largest of which is sample {largest}, "
            f"{self.sizes[largest]} bytes; use smaller batches, or leave the field out"
        )

    def error(self, sample: int, what: str, remedy: str = "re-write it") -> BetonError:
        where = f"{self.reader.path}: sample {int(sample)}, field '{self.field_name}'"
        return BetonError(f"{where}: {what}; {remedy}, or load with on_error='replace'")


class ImageShapes(NamedTuple):
    """Of a field's images: heights, widths, uint16 (N,); is_raw, bool (N,); the largest (H, W)."""

    heights: np.ndarray
    widths: np.ndarray
    is_raw: np.ndarray
    largest: tuple[int, int]

    @property
    def common(self) -> tuple[int, int] | None:
        """(H, W) of all images, or None where they differ."""
        is_common = (self.heights == self.largest[0]).all() and (
            self.widths == self.largest[1]
        ).all()
        return self.largest if is_common else None


def image_shapes(reader: Reader, field_name: str) -> ImageShapes:
    """The shapes of a field's images, worked out once a file."""

    def find() -> ImageShapes:
        metadata = reader.field_metadata(field_name)
        heights = np.ascontiguousarray(metadata["height"])
        widths = np.ascontiguousarray(metadata["width"])
        largest = int(heights.max(initial=1)), int(widths.max(initial=1))
        return ImageShapes(heights, widths, metadata["mode"] == RAW_MODE, largest)

    return reader.once(f"shapes of {field_name}", find)


class ImageSource:
    """An image field and all its views: one read and one decode per sample, for any number of
    views."""

    def __init__(
        self,
        reader: Reader,
        field_name: str,
        plans: list[ViewPlan],
        scaled_decode: bool,
        decoder: str,
    ) -> None:
        self.payloads = PayloadReader(reader, field_name)
        self.plans, self.scaled_decode = plans, scaled_decode
        self.decodes = decoder == "auto" and is_fast_here()
        self.shapes = image_shapes(reader, field_name)
        max_shape = self.shapes.largest
        self.num_floats = max(s.scratch_floats(max_shape) for p in plans for s in p.segments)

    def process(self, job: Any, begin: int, stop: int, scratch: Scratch) -> dict[int, BetonError]:
        samples, count = job.indices[begin:stop], stop - begin
        started = time.perf_counter()
        buffer, offsets, sizes, bad = self.payloads.read(samples, scratch)
        scratch.seconds["read"] += time.perf_counter() - started
        heights = self.shapes.heights[samples].astype(np.int64)
        widths = self.shapes.widths[samples].astype(np.int64)
        self._draw(job, begin, stop, heights, widths)
        floats = scratch.take("floats", self.num_floats, np.float32)
        renders = [
            (plan.segments[0], job.raws[plan.name][begin:stop], job.output(plan, 0)[begin:stop])
            for plan in self.plans
        ]
        images = (buffer, offsets, heights, widths, np.ones(count, np.int64))
        if self.shapes.is_raw[samples].all() and not bad:
            started = time.perf_counter()
            for segment, raw, out in renders:
                segment.render(raw, images, floats, out, 0, count)
            scratch.seconds["render"] += time.perf_counter() - started
        else:
            self._one_by_one(samples, images, sizes, renders, bad, floats, scratch)
        return {begin + i: error for i, error in bad.items()}

    def _draw(self, job, begin, stop, heights, widths):
        raws = {plan.name: job.raws[plan.name][begin:stop] for plan in self.plans}
        samples, occurrences = job.indices[begin:stop], job.occurrences[begin:stop]
        for plan in self.plans:
            for segment in plan.segments:
                segment.draw(job.epoch, samples, occurrences, heights, widths, raws[plan.name])
        for plan in self.plans:
            plan.copy_links(raws)

    def _one_by_one(self, samples, images, sizes, renders, bad, floats, scratch):
        """Image by image: decode it and render its views while it is in the CPU's cache."""
        buffer, offsets, heights, widths, factors = images
        nowhere = np.zeros(len(samples), np.int64)  # a decoded image has offset 0
        clock, decode_s, render_s = time.perf_counter, 0.0, 0.0
        boxes = self._hulls(renders, heights, widths)
        for i, is_raw in enumerate(self.shapes.is_raw[samples].tolist()):
            if i in bad:
                continue
            started, image = clock(), images
            if not is_raw:
                encoded = buffer[offsets[i] : offsets[i] + int(sizes[i])]
                if self.scaled_decode:
                    factors[i] = self._factor(renders, i)
                try:
                    shape = int(heights[i]), int(widths[i])
                    pixels, shape = self._decode(
                        encoded, *shape, int(factors[i]), boxes[i].tolist(), scratch
                    )
                except ValueError as error:
                    bad[i] = self.payloads.error(samples[i], f"corrupt JPEG ({error})")
                    continue
                heights[i], widths[i], _ = shape
                image = (pixels, nowhere, heights, widths, factors)
            decoded = clock()
            for segment, raw, out in renders:
                segment.render(raw, image, floats, out, i, i + 1)
            decode_s += decoded - started
            render_s += clock() - decoded
        scratch.seconds["decode"] += decode_s
        scratch.seconds["render"] += render_s

    @staticmethod
    def _hulls(renders, heights, widths):
        """(N, 4) int64: top, left, bottom, right of what all views together look at. A view whose
        first op is no crop, or reads pixels in a way of its own, looks at the whole image."""
        sides = np.stack([heights, widths], axis=1)
        firsts, lasts = sides - 1, 0 * sides + 1
        for segment, raw, _ in renders:
            placed = segment.placed[0]
            if not isinstance(placed.op, Crop) or type(placed.op).start is not Crop.start:
                return np.concatenate([0 * sides, sides], axis=1)
            # of a user's crop, too, whose boxes may be anything
            box = np.nan_to_num(raw[:, placed.first_column : placed.first_column + 4])
            corner, end = np.floor(box[:, :2]), np.ceil(box[:, :2] + box[:, 2:])
            firsts = np.minimum(firsts, np.clip(corner, 0, sides - 1).astype(np.int64))
            lasts = np.maximum(lasts, np.clip(end, 1, sides).astype(np.int64))
        return np.concatenate([firsts, lasts], axis=1)

    def _decode(self, encoded, height, width, factor, box, scratch):
        """(flat pixels, (H, W, 3)), of which those in the box count. ValueError for a corrupt JPEG
        or one of another size."""
        if self.decodes and factor == 1:
            pixels = scratch.take("decoded", height * width * 3 + MARGIN, np.uint8)
            work = scratch.take("jpeg", work_bytes(len(encoded), height, width), np.uint8)
            shape, to_end = (height, width), not self.payloads.verify
            if scratch.jpeg_decoder.decode(encoded, shape, box, to_end, pixels, work):
                scratch.decoded["ours"] += 1
                return pixels, (height, width, 3)
        scratch.decoded["simplejpeg"] += 1
        check_jpeg(encoded, height, width, is_trusted=self.payloads.verify)
        expected = (-(-height // factor), -(-width // factor), 3)
        buffer = scratch.take("decoded", expected[0] * expected[1] * 3, np.uint8)
        least = {"min_height": expected[0], "min_width": expected[1]} if factor > 1 else {}
        image = simplejpeg.decode_jpeg(encoded, "RGB", buffer=buffer, strict=True, **least)
        if image.shape != expected:
            raise ValueError(f"decoded to {image.shape}, expected {expected}")
        return buffer, image.shape

    @staticmethod
    def _factor(renders, i):
        """The largest of 8, 4, 2, 1 by which the decoder may shrink image i, so that no view has to
        be enlarged."""
        factor = 8
        for segment, raw, _ in renders:
            if not isinstance(segment.placed[0].op, Crop):
                return 1
            box = raw[i, segment.placed[0].columns]
            ratio = min(box[2] / segment.shape[0], box[3] / segment.shape[1])
            while factor > 1 and ratio < factor:
                factor //= 2
        return factor

    def process_later(
        self, job: Any, number: int, begin: int, stop: int, scratch: Scratch
    ) -> dict[int, BetonError]:
        """Render segment `number` (1, 2, ...) of each view that has it, rows begin..stop. Its input
        is the batch after the previous segment."""
        floats = scratch.take("floats", self.num_floats, np.float32)
        for plan in self.plans:
            if number < len(plan.segments):
                raw, out = job.raws[plan.name][begin:stop], job.output(plan, number)[begin:stop]
                images = job.between[plan.name][begin:stop]
                plan.segments[number].render_batch(raw, images, floats, out)
        return {}


class ValueSource:
    """A field without images: its decoder fills rows of an array."""

    def __init__(self, reader: Reader, name: str, field_name: str, decoder: Decoder) -> None:
        self.reader, self.name, self.field_name, self.decoder = reader, name, field_name, decoder
        self.field = reader.fields[field_name]
        self.column = reader.field_metadata(field_name)
        self.shape, self.dtype = decoder.output_spec(self.field, reader, field_name)
        has_payload = reader.extents(field_name) is not None
        self.payloads = PayloadReader(reader, field_name) if has_payload else None

    def allocate(self, count: int) -> np.ndarray:
        """An array for the values of a batch. A row has room for the longest value of a field of
        bytes, so one long value may ask for more memory than there is."""
        try:
            return np.empty((count, *self.shape), self.dtype)
        except (MemoryError, ValueError):  # ValueError: more bytes than NumPy can count
            if self.payloads is None:
                raise
            longest = int(self.payloads.sizes.argmax())
            raise UserError(
                f"{self.reader.path}: field '{self.field_name}': no memory for {count} rows of "
                f"{self.payloads.sizes[longest]} bytes, which sample {longest} has; use smaller "
                "batches, or leave the field out"
            ) from None

    def process(self, job: Any, begin: int, stop: int, scratch: Scratch) -> dict[int, BetonError]:
        samples, out = job.indices[begin:stop], job.values[self.name][begin:stop]
        if self.payloads is None:
            self.decoder.decode_batch(self.field, self.column[samples], None, out)
            return {}
        buffer, offsets, sizes, bad = self.payloads.read(samples, scratch)
        for i, sample in enumerate(samples):
            if i in bad:
                continue
            payload = buffer[offsets[i] : offsets[i] + int(sizes[i])].tobytes()
            column = self.column[sample : sample + 1]
            try:
                self.decoder.decode_batch(self.field, column, [payload], out[i : i + 1])
            except ValueError as error:
                bad[i] = self.payloads.error(sample, str(error))
        return {begin + i: error for i, error in bad.items()}
