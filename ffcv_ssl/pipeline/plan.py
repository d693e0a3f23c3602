"""A view's list of ops -> an executable plan: segments of image ops, whole-batch code between them,
callables behind.

Guarantees: a draw's key depends on (seed, index of the view among its field's views, class of the
op, its occurrence in the view) and on nothing else of the pipeline, so adding a view or an op
changes no other draw. N samples, K raw columns, H W pixels.
"""

import numpy as np

from ffcv_ssl.kernels import resample
from ffcv_ssl.pipeline.dispatch import FLIP, FOLDED, OPCODES, draw_view, render_view
from ffcv_ssl.pipeline.operation import CompiledOperation, Operation, State
from ffcv_ssl.seeding import derive_key
from ffcv_ssl.transforms import Crop, ImageOp, SimpleRGBImageDecoder, ToTorchImage
from ffcv_ssl.transforms.base import NUM_CONSTANTS
from ffcv_ssl.transforms.normalize import NormalizeImage


class PlacedOp:
    """An image op at its place in a view: its key, its raw columns and where a linked draw comes
    from."""

    def __init__(self, op, occurrence, first_column, seed, view_index):
        self.op, self.occurrence, self.first_column = op, occurrence, first_column
        own_seed = seed if op.seed is None else op.seed
        name = type(op).__name__
        self.key = derive_key(own_seed, "view", view_index, name, occurrence)
        self.source = None  # (ViewPlan, PlacedOp) of the op that this one is linked to

    @property
    def columns(self):
        return slice(self.first_column, self.first_column + self.op.num_raw_columns)


class Segment:
    """Image ops that run one sample at a time, from uint8 images to uint8 (N, H, W, 3)."""

    def __init__(self, placed, input_shape, view_name):
        self.placed = placed
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

    def _make_tables(self):
        """The program's tables; a flip right behind the first op is carried out by it, while it
        writes the view."""
        placed = self.placed
        self.ops = np.zeros((len(placed), 4), np.int64)
        self.constants = np.zeros((len(placed), NUM_CONSTANTS), np.float64)
        self.keys = np.array([p.key for p in placed], np.uint64)
        for i, p in enumerate(placed):
            constants = p.op.constants()
            if p.op.opcode not in OPCODES:
                got = f"{type(p.op).__name__}: opcode {p.op.opcode} has no branch"
                raise ValueError(f"{got} in pipeline/program.py; transforms/base.py tells how")
            self.constants[i, : len(constants)] = constants
            self.ops[i] = (p.op.opcode, p.first_column, p.op.link is not None, -1)
        self.render_ops = self.ops.copy()
        if len(placed) > 1 and placed[1].op.opcode == FLIP:
            self.render_ops[0, 3] = placed[1].first_column
            self.render_ops[1, 0] = FOLDED

    def scratch_floats(self, max_shape):
        """Numbers of float32 scratch that `render` needs for images of up to max_shape (H, W)."""
        height, width = self.input_shape or max_shape
        first = self.placed[0].op
        needs = [p.op.scratch_floats(self.shape) for p in self.placed]
        if isinstance(first, Crop):
            needs.append(resample.scratch_floats(height, width, *self.shape, first.is_cubic))
        return 3 * self.shape[0] * self.shape[1] + max(needs)

    def draw(self, epoch, samples, occurrences, heights, widths, raw):
        """Fill this segment's columns of raw (N, K), linked ones aside."""
        if self.input_shape is not None:
            heights = np.full(len(samples), self.input_shape[0])
            widths = np.full(len(samples), self.input_shape[1])
        tables = (self.ops, self.constants, self.keys)
        draw_view(*tables, epoch, samples, occurrences, heights, widths, raw)

    def render(self, raw, images, scratch, out, begin, stop):
        """Rows begin .. stop - 1 of out (N, H, W, 3) = their views by raw (N, K).

        images: (flat pixels, offsets, heights, widths, factors), see `render_view`.
        """
        render_view(self.render_ops, self.constants, raw, *images, scratch, out, begin, stop)

    def render_batch(self, raw, images, scratch, out):
        """The same from a batch of images (N, H, W, 3) of one size, as a per-batch op between
        segments leaves them."""
        count = len(images)
        height, width = self.input_shape
        offsets = np.arange(count) * (height * width * 3)
        sizes = np.full(count, height), np.full(count, width)
        ones = np.ones(count, np.int64)
        self.render(raw, (images.reshape(-1), offsets, *sizes, ones), scratch, out, 0, count)


class BatchCall:
    """Whole-batch code between two segments: any callable, uint8 (N, H, W, 3) in and out."""

    def __init__(self, call):
        self.call = call

    def run(self, batch, indices):
        return np.ascontiguousarray(np.asarray(self.call(batch)))


class ViewPlan:
    """One view of one image field, ready to run.

    segments: the first starts at the decoded image, the others at the batch before them. between:
    for each segment the whole-batch code behind it. tail: callables for the consumer.
    num_columns: K. params_dtype: of the user's structured array.
    """

    def __init__(self, name, field_name, view_index, ops, seed, image_shape):
        self.name, self.field_name, self.view_index = name, field_name, view_index
        head, self.tail = self._split(ops)
        self.placed = []
        self.segments, self.between = self._make_segments(head, seed, view_index, image_shape)
        self.num_columns = sum(p.op.num_raw_columns for p in self.placed)
        self.params_dtype, self._column_names = self._make_params_dtype()
        self._bind_tail()

    def _split(self, ops):
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
                raise ValueError(f"view '{self.name}': {op!r} is neither an op nor callable")
        head = list(ops[:stop])
        if not head or not isinstance(head[0], (Crop, SimpleRGBImageDecoder)):
            head.insert(0, SimpleRGBImageDecoder())
        return head, list(ops[stop:])

    def _make_segments(self, head, seed, view_index, image_shape):
        """Segments, and for each the whole-batch code that follows it (a list, often empty)."""
        segments, between, run, calls = [], [], [], []
        counts, column, shape = {}, 0, image_shape

        def close_run():
            nonlocal run, shape
            if run:
                segments.append(Segment(run, shape, self.name))
                between.append([])
                shape, run = segments[-1].shape, []

        for op in head:
            if not isinstance(op, ImageOp):
                close_run()
                calls.append(op)
                shape = self._add_call(op, shape, between[-1])
                continue
            starts = isinstance(op, (Crop, SimpleRGBImageDecoder))
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

    def _add_call(self, op, shape, calls):
        if not isinstance(op, Operation):
            calls.append(BatchCall(op))
            return shape
        state = State(True, "cpu", (*shape, 3), np.dtype(np.uint8))
        compiled = CompiledOperation(op, None, None, state)
        calls.append(compiled)
        out = compiled.state.shape
        return tuple(out[:2])

    def _make_params_dtype(self):
        """The user's dtype, and for each op {its column: the unique name}: crop, crop_1, ..."""
        fields, names, counts = [], [], {}
        for placed in self.placed:
            mine = {}
            for name, dtype in placed.op.columns:
                number = counts[name] = counts.get(name, -1) + 1
                mine[name] = f"{name}_{number}" if number else name
                fields.append((mine[name], dtype))
            names.append(mine)
        return np.dtype(fields), names

    def _bind_tail(self):
        channels_first = False
        for op in self.tail:
            channels_first |= isinstance(op, ToTorchImage)
            if isinstance(op, NormalizeImage):
                op.channels_first = channels_first

    def params_of(self, raw):
        """The user's structured array (N,) of raw draws (N, K)."""
        out = np.zeros(len(raw), self.params_dtype)
        for placed, names in zip(self.placed, self._column_names):
            if names:
                columns = {name: out[unique] for name, unique in names.items()}
                placed.op.describe(raw[:, placed.columns], _Columns(columns))
        return out

    def copy_links(self, raws):
        """Take the linked ops' draws over; raws: raw arrays (N, K) by view name, all of them
        drawn."""
        for placed in self.placed:
            if placed.source is not None:
                view, source = placed.source
                raws[self.name][:, placed.columns] = raws[view.name][:, source.columns]


class _Columns(dict):
    """Columns by an op's own names; assignment writes into the structured array."""

    def __setitem__(self, name, values):
        self[name][...] = values


def resolve_links(plans):
    """Find, for every linked op, the op that really draws. ValueError for a link to nothing or in a
    circle."""
    by_name = {plan.name: plan for plan in plans}
    for plan in plans:
        for placed in plan.placed:
            if placed.op.link is not None:
                placed.source = _find_source(plan, placed, by_name)


def _find_source(plan, placed, by_name):
    start, seen = plan.name, {plan.name}
    while placed.op.link is not None:
        target = by_name.get(placed.op.link)
        where = f"view '{start}', {type(placed.op).__name__}(link='{placed.op.link}')"
        if target is None or target.field_name != plan.field_name:
            views = [p.name for p in by_name.values() if p.field_name == plan.field_name]
            raise ValueError(f"{where}: no such view of this field, expected one of {views}")
        if target.name in seen:
            raise ValueError(f"{where}: the links go in a circle")
        seen.add(target.name)
        kind = type(placed.op), placed.occurrence
        matches = [p for p in target.placed if (type(p.op), p.occurrence) == kind]
        if not matches:
            raise ValueError(f"{where}: view '{target.name}' has no such op")
        plan, placed = target, matches[0]
    return plan, placed
