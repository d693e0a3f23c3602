"""A view's list of ops -> an executable plan: segments of image ops, whole-batch code between them,
callables for the consumer at the end.

Guarantees: a draw's key depends on (seed, index of the view among its field's views, class of the
op, its occurrence in the view) and on nothing else of the pipeline, so adding a view or an op
changes no other draw. N samples, K raw columns, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ffcv_ssl.errors import UserError
from ffcv_ssl.kernels import resample
from ffcv_ssl.kernels.compile import Kernel
from ffcv_ssl.pipeline.dispatch import NOTHING, Dispatch, dispatch_for
from ffcv_ssl.pipeline.operation import CompiledOperation, Operation, State
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.transforms import (
    Crop,
    ImageOp,
    RandomHorizontalFlip,
    SimpleRGBImageDecoder,
    ToTorchImage,
)
from ffcv_ssl.transforms.base import NUM_CONSTANTS, check_op
from ffcv_ssl.transforms.normalize import NormalizeImage


class PlacedOp:
    """An image op at its place in a view: its key, its raw columns and where a linked draw comes
    from."""

    def __init__(
        self, op: ImageOp, occurrence: int, first_column: int, seed: int, view_index: int
    ) -> None:
        self.op, self.occurrence, self.first_column = op, occurrence, first_column
        seed = seed if op.seed is None else op.seed
        self.key = derive_key(seed, "view", view_index, type(op).__name__, occurrence)
        self.source: tuple[ViewPlan, PlacedOp] | None = None  # of the op that this is linked to

    @property
    def columns(self) -> slice:
        return slice(self.first_column, self.first_column + self.op.num_raw_columns)

    def constants(self) -> np.ndarray:
        """The op's constants, float64 (NUM_CONSTANTS,), zeros behind them."""
        given = np.asarray(self.op.constants(), np.float64).reshape(-1)
        if len(given) > NUM_CONSTANTS:
            raise UserError(
                f"{type(self.op).__name__}: constants() gives {len(given)} numbers, expected at "
                f"most {NUM_CONSTANTS}"
            )
        return np.pad(given, (0, NUM_CONSTANTS - len(given)))


class Segment:
    """Image ops that run one sample at a time, from uint8 images to uint8 (N, H, W, 3)."""

    def __init__(
        self,
        placed: list[PlacedOp],
        input_shape: tuple[int, int] | None,
        view_name: str,
        dispatch: Dispatch,
    ) -> None:
        self.placed, self.view_name, self.dispatch = placed, view_name, dispatch
        self.input_shape = input_shape  # (H, W) of all inputs, or None where images differ
        first = placed[0].op
        if isinstance(first, Crop):
            self.shape = first.output_size
        elif input_shape is None:
            raise ValueError(
                f"view '{view_name}': the images differ in size, so the first op must be a crop "
                f"(RandomResizedCrop, CenterCrop), got {first!r}"
            )
        else:
            self.shape = input_shape
        self._make_tables()

    def _make_tables(self) -> None:
        """The kernels' tables. A flip right behind the first op is left to that op, which mirrors
        while it writes the view."""
        placed, code = self.placed, self.dispatch.code
        kinds = ["start"] + ["apply"] * (len(placed) - 1)
        self.constants = np.array([p.constants() for p in placed])
        self.keys = np.array([p.key for p in placed], np.uint64)
        places = [(p.first_column, p.op.link is not None, -1) for p in placed]
        draws = [code(p.op, "draw") for p in placed]
        renders = [code(p.op, kind) for p, kind in zip(placed, kinds)]
        self.ops = np.array([(c, *place) for c, place in zip(draws, places)], np.int64)
        self.render_ops = np.array([(c, *place) for c, place in zip(renders, places)], np.int64)
        if len(placed) > 1 and type(placed[1].op).apply is RandomHorizontalFlip.apply:
            self.render_ops[0, 3] = placed[1].first_column
            self.render_ops[1, 0] = NOTHING

    def scratch_floats(self, max_shape: tuple[int, int]) -> int:
        """Numbers of float32 scratch that `render` needs for images of up to max_shape (H, W)."""
        height, width = self.input_shape or max_shape
        first = self.placed[0].op
        needs = [p.op.scratch_floats(self.shape) for p in self.placed]
        if isinstance(first, Crop):
            needs.append(resample.scratch_floats(height, width, *self.shape, first.is_cubic))
        return 3 * self.shape[0] * self.shape[1] + max(needs)

    def draw(
        self,
        epoch: int,
        samples: np.ndarray,
        occurrences: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        raw: np.ndarray,
    ) -> None:
        """Fill this segment's columns of raw (N, K), linked ones aside."""
        if self.input_shape is not None:
            heights = np.full(len(samples), self.input_shape[0])
            widths = np.full(len(samples), self.input_shape[1])
        tables = (self.ops, self.constants, self.keys)
        arguments = (*tables, epoch, samples, occurrences, heights, widths, raw)
        self._run(self.dispatch.draw_view, arguments)

    def render(
        self,
        raw: np.ndarray,
        images: tuple,
        scratch: np.ndarray,
        out: np.ndarray,
        begin: int,
        stop: int,
    ) -> None:
        """Rows begin .. stop - 1 of out (N, H, W, 3) = their views by raw (N, K).

        images: (flat pixels, offsets, heights, widths, factors), see `render_view`.
        """
        arguments = (self.render_ops, self.constants, raw, *images, scratch, out, begin, stop)
        self._run(self.dispatch.render_view, arguments)

    def _run(self, kernel: Kernel, arguments: tuple) -> None:
        """Call a kernel; an exception in it comes from a user's op, and is told with its place."""
        try:
            kernel(*arguments)
        except UserError:
            raise
        except Exception as error:
            names = ", ".join(type(p.op).__name__ for p in self.placed)
            what = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise RuntimeError(f"view '{self.view_name}', ops {names}: {what}") from error

    def render_batch(
        self, raw: np.ndarray, images: np.ndarray, scratch: np.ndarray, out: np.ndarray
    ) -> None:
        """The same from a batch of images (N, H, W, 3) of one size, as a per-batch op between
        segments leaves them."""
        assert self.input_shape is not None
        count = len(images)
        height, width = self.input_shape
        offsets = np.arange(count) * (height * width * 3)
        sizes = np.full(count, height), np.full(count, width)
        ones = np.ones(count, np.int64)
        self.render(raw, (images.reshape(-1), offsets, *sizes, ones), scratch, out, 0, count)


class BatchCall:
    """Whole-batch code between two segments: any callable, uint8 (N, H, W, 3) in and out."""

    def __init__(self, call: Callable) -> None:
        self.call = call

    def run(self, batch: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self.call(batch)))


class ViewPlan:
    """One view of one image field, ready to run.

    segments: the first starts at the decoded image, the others at the batch before them. between:
    for each segment the whole-batch code behind it. tail: callables for the consumer.
    num_columns: K. params_dtype: of the user's structured array. neighbours: image ops of the
    other views, compiled together with this view's where they are users' own.
    """

    def __init__(
        self,
        name: str,
        field_name: str,
        view_index: int,
        ops: list,
        seed: int,
        image_shape: tuple[int, int] | None,
        neighbours: Iterable[ImageOp] = (),
    ) -> None:
        self.name, self.field_name, self.view_index = name, field_name, view_index
        head, self.tail = self._split(ops)
        self._check(head)
        image_ops = [op for op in head if isinstance(op, ImageOp)]
        self.dispatch = dispatch_for(image_ops, neighbours)
        self.placed: list[PlacedOp] = []
        self.segments, self.between = self._make_segments(head, seed, view_index, image_shape)
        self.num_columns = sum(p.op.num_raw_columns for p in self.placed)
        self.params_dtype, self._column_names = self._make_params_dtype()
        self._bind_tail()

    def _split(self, ops: list) -> tuple[list, list]:
        """(what the workers run, what the consumer runs)."""
        is_image = [isinstance(op, ImageOp) for op in ops]
        stop = len(ops) - is_image[::-1].index(True) if any(is_image) else 0
        while stop < len(ops) and isinstance(ops[stop], Operation):
            stop += 1
        for op in ops[:stop]:
            if type(op).__module__ == "ffcv_ssl.transforms.tensor" or isinstance(
                op, NormalizeImage
            ):
                raise ValueError(
                    f"view '{self.name}': {op!r} stands before an image op; "
                    "image ops come first, then tensor ops"
                )
        for op in ops:
            if not (isinstance(op, (ImageOp, Operation)) or callable(op)):
                raise ValueError(f"view '{self.name}': got {op!r}, expected an op or a callable")
        head = list(ops[:stop])
        if not head or not isinstance(head[0], ImageOp) or head[0].start is None:
            head.insert(0, SimpleRGBImageDecoder())
        return head, list(ops[stop:])

    def _check(self, head: list) -> None:
        """Draws are keyed by the name of an op's class, so one name must mean one class."""
        classes: dict[str, type] = {}
        for op in head:
            if not isinstance(op, ImageOp):
                continue
            try:
                check_op(op)
            except UserError as error:
                raise UserError(f"view '{self.name}': {error}") from None
            first = classes.setdefault(type(op).__name__, type(op))
            if first is not type(op):
                raise UserError(
                    f"view '{self.name}': two op classes are called {first.__name__}, of "
                    f"{first.__module__} and {type(op).__module__}; rename one: draws are keyed "
                    "by the name"
                )

    def _make_segments(
        self, head: list, seed: int, view_index: int, image_shape: tuple[int, int] | None
    ) -> tuple[list[Segment], list[list]]:
        """Segments, and for each the whole-batch code that follows it (a list, often empty)."""
        segments: list[Segment] = []
        between: list[list] = []
        run: list[PlacedOp] = []
        counts: dict[str, int] = {}
        column, shape = 0, image_shape

        def close_run():
            nonlocal run, shape
            if run:
                segments.append(Segment(run, shape, self.name, self.dispatch))
                between.append([])
                shape, run = segments[-1].shape, []

        for op in head:
            if not isinstance(op, ImageOp):
                close_run()
                shape = self._add_call(op, shape, between[-1])
                continue
            starts = op.start is not None
            if starts:
                close_run()
            if not run and not starts:
                run.append(PlacedOp(SimpleRGBImageDecoder(), 0, column, seed, view_index))
            occurrence = counts.get(type(op).__name__, 0)
            counts[type(op).__name__] = occurrence + 1
            placed = PlacedOp(op, occurrence, column, seed, view_index)
            column += op.num_raw_columns
            self.placed.append(placed)
            run.append(placed)
        close_run()
        return segments, between

    def _add_call(self, op: Any, shape: Any, calls: list) -> tuple[int, int]:
        if not isinstance(op, Operation):
            calls.append(BatchCall(op))
            return shape
        state = State(True, "cpu", (*shape, 3), np.dtype(np.uint8))
        compiled = CompiledOperation(op, None, None, state)
        calls.append(compiled)
        out = compiled.state.shape
        return tuple(out[:2])

    def _make_params_dtype(self) -> tuple[np.dtype, list[dict[str, str]]]:
        """The user's dtype, and for each op {its column: the unique name}: crop, crop_1, ..."""
        fields, names, taken = [], [], set()
        for placed in self.placed:
            mine = {}
            for name, dtype in placed.op.columns:
                unique, number = name, 0
                while unique in taken:
                    number += 1
                    unique = f"{name}_{number}"
                taken.add(unique)
                mine[name] = unique
                fields.append((unique, dtype))
            names.append(mine)
        return np.dtype(fields), names

    def _bind_tail(self) -> None:
        channels_first = False
        for op in self.tail:
            channels_first |= isinstance(op, ToTorchImage)
            if isinstance(op, NormalizeImage):
                op.channels_first = channels_first

    def params_of(self, raw: np.ndarray) -> np.ndarray:
        """The user's structured array (N,) of raw draws (N, K)."""
        out = np.zeros(len(raw), self.params_dtype)
        for placed, names in zip(self.placed, self._column_names):
            if names:
                columns = {name: out[unique] for name, unique in names.items()}
                placed.op.describe(raw[:, placed.columns], _Columns(columns))
        return out

    def copy_links(self, raws: dict[str, np.ndarray]) -> None:
        """Take the linked ops' draws over; raws: raw arrays (N, K) by view name, all of them
        drawn."""
        for placed in self.placed:
            if placed.source is not None:
                view, source = placed.source
                raws[self.name][:, placed.columns] = raws[view.name][:, source.columns]


class _Columns(dict):
    """Columns by an op's own names; assignment writes into the structured array."""

    def __setitem__(self, name: str, values: Any) -> None:
        self[name][...] = values


def resolve_links(plans: list[ViewPlan]) -> None:
    """Find, for every linked op, the op that really draws. ValueError for a link to nothing or in a
    circle."""
    by_name = {plan.name: plan for plan in plans}
    for plan in plans:
        for placed in plan.placed:
            if placed.op.link is not None:
                placed.source = _find_source(plan, placed, by_name)


def _find_source(
    plan: ViewPlan, placed: PlacedOp, by_name: dict[str, ViewPlan]
) -> tuple[ViewPlan, PlacedOp]:
    first = _in_words(plan, placed)
    seen = {plan.name}
    while placed.op.link is not None:
        where = _in_words(plan, placed)
        target = by_name.get(placed.op.link)
        if target is None or target.field_name != plan.field_name:
            views = [p.name for p in by_name.values() if p.field_name == plan.field_name]
            raise ValueError(f"{where}: no such view of this field, expected one of {views}")
        if target.name in seen:
            raise ValueError(f"{first}: the links go in a circle; leave out one of them")
        seen.add(target.name)
        kind = type(placed.op), placed.occurrence
        matches = [p for p in target.placed if (type(p.op), p.occurrence) == kind]
        if not matches:
            raise ValueError(f"{where}: view '{target.name}' has no such op; give it one")
        plan, placed = target, matches[0]
    return plan, placed


def _in_words(plan: ViewPlan, placed: PlacedOp) -> str:
    return f"view '{plan.name}', {type(placed.op).__name__}(link='{placed.op.link}')"
