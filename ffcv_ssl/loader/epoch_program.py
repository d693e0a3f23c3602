"""The plans of all outputs of an epoch, compiled from the pipelines as they are at `iter()`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffcv_ssl.fields.base import Decoder
from ffcv_ssl.loader.decoding import ImageSource, ValueSource, image_shapes
from ffcv_ssl.loader.view_specs import is_image
from ffcv_ssl.pipeline.operation import CompiledOperation, Operation, State
from ffcv_ssl.pipeline.plan import ViewPlan, resolve_links
from ffcv_ssl.reader import Reader
from ffcv_ssl.transforms import ImageOp


class EpochProgram:
    """Plans for every output, ordered as in the batch.

    Attributes: names; images: [ImageSource]; values: [ValueSource]; plans: view name -> ViewPlan;
    tails: name -> callables for the consumer; specs: key -> (shape, dtype) of a slot's arrays.
    """

    def __init__(
        self,
        reader: Reader,
        resolved: list[tuple[str, str, list]],
        seed: int,
        scaled_decode: bool,
        decoder: str,
    ) -> None:
        self.reader = reader
        self.names = [name for name, _, _ in resolved]
        self.plans: dict[str, ViewPlan] = {}
        self.values: list[ValueSource] = []
        self.tails: dict[str, list] = {}
        view_counts: dict[str, int] = {}
        image_ops = [op for _, _, ops in resolved for op in ops if isinstance(op, ImageOp)]
        for name, field_name, ops in resolved:
            if is_image(reader, field_name):
                index = view_counts.get(field_name, 0)
                view_counts[field_name] = index + 1
                shape = image_shapes(reader, field_name).common
                plan = ViewPlan(name, field_name, index, ops, seed, shape, image_ops)
                self.plans[name], self.tails[name] = plan, plan.tail
            else:
                self._add_value(name, field_name, ops)
        resolve_links(list(self.plans.values()))
        self.images = [
            ImageSource(
                reader,
                field,
                [p for p in self.plans.values() if p.field_name == field],
                scaled_decode,
                decoder,
            )
            for field in view_counts
        ]
        self.num_stages = max((len(p.segments) for p in self.plans.values()), default=1)
        self.specs: dict[Any, tuple[tuple, Any]] = {
            (plan.name, number): ((*segment.shape, 3), np.uint8)
            for plan in self.plans.values()
            for number, segment in enumerate(plan.segments)
        }
        # Fields with payloads can fail, so they are read first. Where a sample is replaced, the
        # other fields are then read from the replacement.
        with_payload = [v for v in self.values if v.payloads is not None]
        self.checked_sources: list[ImageSource | ValueSource] = [*self.images, *with_payload]
        self.plain_sources = [v for v in self.values if v.payloads is None]

    def _add_value(self, name: str, field_name: str, ops: list) -> None:
        decoder, *rest = ops
        if not isinstance(decoder, Decoder):
            decoder, rest = self.reader.fields[field_name].get_decoder_class()(), ops
        source = ValueSource(self.reader, name, field_name, decoder)
        self.values.append(source)
        state = State(True, "cpu", tuple(source.shape), source.dtype)
        tail = []
        for op in rest:
            if isinstance(op, Operation):
                column = self.reader.field_metadata(field_name)
                compiled = CompiledOperation(op, source.field, column, state)
                state, op = compiled.state, compiled
            elif isinstance(op, ImageOp):
                raise ValueError(
                    f"pipeline '{name}': got {op!r}, which is for images; the field "
                    f"'{field_name}' is of type {type(source.field).__name__}"
                )
            elif not callable(op):
                raise ValueError(f"pipeline '{name}': got {op!r}, expected an op or a callable")
            tail.append(op)
        self.tails[name] = tail
