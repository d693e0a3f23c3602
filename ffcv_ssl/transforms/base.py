"""What an image op is: settings, how its parameters are drawn, how they are applied. One op a file.

To add an op, write one file beside its neighbours (solarization.py is a short one): a subclass of
`ImageOp` with its compiled functions `draw` and `apply`. It is found by itself, gets its place in
the kernels by itself, and is set from YAML and captioned by what it declares below. Then write its
NumPy twin in tests/reference.py and its test. docs/adding_an_op.md has a complete example, also of
an op in a repository of your own.

A view is rendered one sample at a time in a float32 array (3, H, W) in [0, 1]. The first op of a
segment *starts* it: it has `start` instead of `apply`, which reads the stored bytes, and it mirrors
while it writes if a flip stands right behind it. Crops and the whole image do that; all other ops
*apply*, in place. N samples, K columns, H W pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba.core.dispatcher import Dispatcher

from ffcv_ssl.errors import UserError
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms

NUM_CONSTANTS = 8  # numbers that an op may hand to its compiled functions
_APPLY_ARGUMENTS = ("view", "constants", "raw", "scratch")
# The compiled functions of an op, and what each is called with.
FUNCTION_ARGUMENTS = {
    "draw": ("key", "epoch", "sample", "occurrence", "constants", "height", "width", "raw"),
    "apply": _APPLY_ARGUMENTS,
    "start": (*_APPLY_ARGUMENTS, "pixels", "at", "height", "width", "factor", "flip"),
}


@dataclass(frozen=True)
class Setting:
    """One setting of an op in view recipes, as YAML and the command line name it.

    key: its name there. argument: its name in the op's constructor. type, default, help: as in a
    dataclass. low, high: between which values a number, or both numbers of a pair, must lie.
    choices: the allowed texts. is_valid, expected: a check beyond that, and what it expects.
    """

    key: str
    argument: str
    type: Any
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    is_valid: Callable[[Any], bool] | None = None
    expected: str = ""


def probability(key: str, argument: str, help: str, default: float = 0.0) -> Setting:
    """The setting that every op which acts by chance has."""
    return Setting(key, argument, float, default, help, 0, 1)


class ImageOp:
    """A per-sample op. A subclass sets `columns`, `draw` and `apply`, and may override the rest.

    columns: ((name, dtype), ...), what users find in `batch.params[view]`.
    num_raw_columns: float64 numbers that `draw` writes; default: one a column.
    random: False for an op that draws nothing by chance, so that link and seed make no sense.

    Compiled functions (`device` of kernels/compile.py, or `numba.njit`), as static methods:
    draw(key, epoch, sample, occurrence, constants, height, width, raw): write this op's
        num_raw_columns numbers to `raw`, a pure function of the other arguments. The first four
        are for `uniforms`; height and width are of the stored image. Needed unless
        num_raw_columns is 0.
    apply(view, constants, raw, scratch): change the view, in place; its values stay in [0, 1].
        scratch: float32, the `scratch_floats` that the op asks for.
    start(view, constants, raw, scratch, pixels, at, height, width, factor, flip): of the first op
        of a segment, instead of apply: fill the view from the image at byte `at` of `pixels`,
        mirrored if `flip`. factor: the image was decoded at 1/factor of the size that `raw` means.

    Declarations for view recipes (pipelines/), of built-in ops:
    view_name: the op's name in `View.linked`. settings: its settings there. place: where it stands
    among the ops of a view, ascending.

    link: name of another view of the same field whose same op's draw is reused, or None. seed:
    starts a random stream of this op instead of the loader's seed, or None.
    """

    columns: ClassVar[tuple[tuple[str, Any], ...]] = ()
    num_raw_columns: ClassVar[int] = 0
    random: ClassVar[bool] = True
    draw: ClassVar[Any] = None
    apply: ClassVar[Any] = None
    start: ClassVar[Any] = None
    view_name: ClassVar[str] = ""
    settings: ClassVar[tuple[Setting, ...]] = ()
    place: ClassVar[int] = 0
    source_digest: ClassVar[str] = ""  # of the file of a class outside the library
    link: str | None = None
    seed: int | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "columns" in vars(cls) and "num_raw_columns" not in vars(cls):
            cls.num_raw_columns = len(cls.columns)
        # Taken now, while this is the source that is being imported: see kernels/compile.py.
        if not cls.__module__.startswith("ffcv_ssl."):
            module = sys.modules.get(cls.__module__)
            cls.source_digest = _digest_of_file(getattr(module, "__file__", None))

    def __init__(self, link: str | None = None, seed: int | None = None) -> None:
        self.link = link
        self.seed = seed

    def constants(self) -> tuple[float, ...]:
        """Up to NUM_CONSTANTS floats for the compiled functions, from settings checked anew: they
        may have been changed.

        Raises ValueError for settings out of range.
        """
        return ()

    def scratch_floats(self, view_shape: tuple[int, int]) -> int:
        """Numbers of float32 scratch that `apply` needs for a view of (H, W), beside the view."""
        return 0

    def describe(self, raw: np.ndarray, out: dict[str, np.ndarray]) -> None:
        """Turn raw draws (N, K) into the user's columns: out[name] for every name in `columns`."""
        for i, (name, dtype) in enumerate(self.columns):
            out[name] = raw[:, i].astype(dtype)

    @classmethod
    def caption(cls, row: Any) -> str:
        """What the op did to one view, in a word or two; empty: nothing. row: its columns by name.

        A text that starts and ends with a line break gets a line of its own.
        """
        shown = []
        for name, dtype in cls.columns:
            kind = np.dtype(dtype)
            if kind.names is None and not kind.shape and row[name]:
                shown.append(name if kind.kind == "b" else f"{name} {row[name]:.2f}")
        return ", ".join(shown)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], size_px: int) -> ImageOp | None:
        """The op that a view recipe's settings (by key) ask for, or None where it never acts: where
        a probability is 0. size_px: side of the view."""
        arguments = {setting.argument: settings[setting.key] for setting in cls.settings}
        chances = [s.key for s in cls.settings if s.key.endswith("_prob")]
        return cls(**arguments) if all(settings[key] > 0 for key in chances) else None

    def __repr__(self) -> str:
        given = vars(self).items()
        settings = {k: v for k, v in given if k not in ("link", "seed") or v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _digest_of_file(path: str | None) -> str:
    """Empty for code without a file, as in an interactive session."""
    if path is None or not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def check_op(op: ImageOp) -> None:
    """UserError of one line if the op's class lacks what a pipeline needs or contradicts itself."""
    cls, name = type(op), type(op).__name__
    try:
        names = [str(column) for column, dtype in cls.columns if np.dtype(dtype) is not None]
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: columns is {cls.columns!r}, expected ((name, dtype), ...)"
        ) from None
    for column in names:
        if names.count(column) > 1:
            raise UserError(f"{name}: column '{column}' is declared twice; give each its own name")
    if cls.describe is ImageOp.describe and len(names) > cls.num_raw_columns:
        raise UserError(
            f"{name}: got {len(names)} columns, expected at most num_raw_columns "
            f"({cls.num_raw_columns}); raise num_raw_columns or override describe"
        )
    if cls.apply is None and cls.start is None:
        raise UserError(
            f"{name}: has no compiled function apply({', '.join(FUNCTION_ARGUMENTS['apply'])})"
        )
    if cls.draw is None and cls.num_raw_columns:
        raise UserError(
            f"{name}: num_raw_columns is {cls.num_raw_columns}, but there is no compiled function "
            f"draw({', '.join(FUNCTION_ARGUMENTS['draw'])})"
        )
    for kind, arguments in FUNCTION_ARGUMENTS.items():
        _check_function(f"{name}.{kind}", getattr(cls, kind), arguments)


def _check_function(where: str, function: Any, arguments: tuple[str, ...]) -> None:
    if function is None:
        return
    if not isinstance(function, Dispatcher):
        raise UserError(
            f"{where}: got {type(function).__name__}, expected a compiled function; "
            "put @staticmethod and @device (ffcv_ssl.kernels.compile), or @numba.njit, above it"
        )
    own = inspect.signature(function.py_func).parameters
    if len(own) != len(arguments):
        raise UserError(f"{where}: takes ({', '.join(own)}), expected ({', '.join(arguments)})")


@device
def draw_switch(key, epoch, sample, occurrence, constants, height, width, raw):
    """raw[0] = 1 with probability constants[0], else 0: `draw` of ops that are only on or off."""
    u, _, _, _ = uniforms(key, epoch, sample, occurrence, 0)
    raw[0] = 1.0 if u < constants[0] else 0.0


def check_number(
    op: ImageOp, name: str, value: Any, low: float, high: float, what: str = ""
) -> float:
    """value as a float in [low, high], else ValueError; `what` completes "must be ..."."""
    if not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        what = what or f"in [{low:g}, {high:g}]"
        raise ValueError(f"{type(op).__name__}: {name} is {value!r}, must be {what}")
    return float(value)


def check_probability(op: ImageOp, name: str, value: Any) -> float:
    """value as a float in [0, 1], else ValueError."""
    return check_number(op, name, value, 0, 1, "a probability in [0, 1]")


def check_range(op: ImageOp, name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """value as (min, max) floats with low <= min <= max <= high, else ValueError."""
    try:
        first, last = (float(v) for v in value)
    except (TypeError, ValueError):
        first, last = 1.0, 0.0
    if not low <= first <= last <= high:
        raise ValueError(
            f"{type(op).__name__}: {name} is {value!r}, "
            f"must be (min, max) with {low} <= min <= max <= {high}"
        )
    return first, last


def check_size(op: ImageOp, value: Any) -> tuple[int, int]:
    """An output size as (height, width): an int is a square. ValueError unless both are 1 to
    65535."""
    size = (value, value) if isinstance(value, (int, np.integer)) else value
    try:
        height, width = (0 if isinstance(v, bool) else operator.index(v) for v in size)
    except (TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= 65535 and 1 <= width <= 65535):
        raise ValueError(
            f"{type(op).__name__}: output_size is {value!r}, "
            "must be pixels or (height, width), 1 to 65535"
        )
    return height, width
