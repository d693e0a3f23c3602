"""A view's ops as tables of numbers, and the two kernels that run them: draw, then render.

One compiled pair serves every pipeline of built-in ops, at every resolution, probability and range:
changing them changes table entries and never compiles. Pipelines with ops of users' own get a pair
that holds the ops they use, cached on disk under a digest of the users' code. The chains of `if` in
the kernels are made from the ops' compiled functions.

Table `ops`, int64 (ops, 4): code of the function | first raw column | linked (1: the draw is copied
from another view) | flip column of a first op that also mirrors (-1: none). Table `constants`,
float64 (ops, 8): the op's settings. `keys`, uint64 (ops,). N samples, K raw columns, H W pixels of
the view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numba.core.errors import NumbaError

from ffcv_ssl.errors import UserError
from ffcv_ssl.kernels.compile import Kernel, device, inlined
from ffcv_ssl.kernels.resample import pack
from ffcv_ssl.pipeline.code_digest import digest_of
from ffcv_ssl.transforms import BUILT_IN_OPS, ImageOp, SimpleRGBImageDecoder
from ffcv_ssl.transforms.base import FUNCTION_ARGUMENTS

NOTHING = -1  # code of an op that has nothing to do here, as a flip that the crop before it does
# Types of the arguments of the ops' functions, for messages about functions that do not compile.
_APPLY_TYPES = "float32[:, :, ::1], float64[::1], float64[::1], float32[::1]"
_TYPES = {
    "draw": "uint64, uint64, uint64, uint64, float64[::1], int64, int64, float64[::1]",
    "apply": _APPLY_TYPES,
    "start": f"{_APPLY_TYPES}, uint8[::1], int64, int64, int64, int64, boolean",
}


def _by_code(functions: Iterable[Any], kind: str) -> Any:
    """A compiled function `(code, ...)` that calls functions[code]; other codes do nothing.

    Its source is written here, `if code == 0: ... elif code == 1: ...`. A chain of closures, each
    with its function and the rest of the chain, compiles twice as long. Inlining the chains of
    `draw` and `start` makes kernels 10 to 40 % faster on small images; inlining that of `apply`
    gains nothing and compiles a quarter longer (docs/log.md, 2026-11-22).
    """
    arguments = ", ".join(FUNCTION_ARGUMENTS[kind])
    lines = [f"def call(code, {arguments}):", "    if code < 0:", "        return"]
    namespace = {"__name__": __name__}
    for code, function in enumerate(functions):
        lines += [f"    elif code == {code}:", f"        {kind}_{code}({arguments})"]
        namespace[f"{kind}_{code}"] = function
    exec("\n".join(lines), namespace)
    return (device if kind == "apply" else inlined)(namespace["call"])


class _OpsKernel(Kernel):
    """A kernel with ops' functions in it; `origins` names them: {function: (op, kind)}."""

    def __init__(self, py_func: Any, signature: str, name: str, origins: dict) -> None:
        py_func.__qualname__ = name  # of the files in the cache, too
        super().__init__(py_func, signature)
        self.origins = origins

    def load(self) -> bool:
        try:
            return super().load()
        except NumbaError as error:
            raise UserError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        """The first of the functions that does not compile alone, and why, in one line."""
        where = "the ops' kernel"
        for function, (op, kind) in self.origins.items():
            try:
                function.compile(f"({_TYPES[kind]})")
            except NumbaError as own_error:
                where, error = f"{op.__name__}.{kind}", own_error
                break
        reason = " ".join(str(error).split())
        return f"{where} does not compile: {reason[:600]}"


def _draw_kernel(draws: list, name: str, origins: dict) -> Kernel:
    draw = _by_code(draws, "draw")

    def draw_view(ops, constants, keys, epoch, samples, occurrences, heights, widths, raw):
        """Fill raw (N, K) with the parameters of samples (N,) in images of heights x widths."""
        for n in range(samples.size):
            sample, turn = np.uint64(samples[n]), np.uint64(occurrences[n])
            for i in range(ops.shape[0]):
                if ops[i, 2]:
                    continue
                code, key, settings, row = ops[i, 0], keys[i], constants[i], raw[n, ops[i, 1] :]
                draw(code, key, epoch, sample, turn, settings, heights[n], widths[n], row)

    signature = (
        "void(int64[:, ::1], float64[:, ::1], uint64[::1], uint64, int64[::1], int64[::1], "
        "int64[::1], int64[::1], float64[:, ::1])"
    )
    return _OpsKernel(draw_view, signature, name, origins)


def _render_kernel(starts: list, applies: list, name: str, origins: dict) -> Kernel:
    start, apply = _by_code(starts, "start"), _by_code(applies, "apply")

    def render_view(
        ops, constants, raw, pixels, offsets, heights, widths, factors, scratch, out, begin, stop
    ):
        """For n in begin .. stop - 1: out[n] (H, W, 3) uint8 = the view of the image at byte
        offsets[n] of `pixels`, for the parameters raw[n].

        heights, widths (N,): of the decoded image, rows of width * 3 bytes. factors (N,): 1, or 2,
        4, 8 where the image was decoded at a fraction of the size that raw's boxes refer to.
        scratch: 3 H W floats for the view in work, then what the ops need.
        """
        height, width = out.shape[1], out.shape[2]
        view = scratch[: 3 * height * width].reshape((3, height, width))
        scratch = scratch[3 * height * width :]
        for n in range(begin, stop):
            row, flip_column = raw[n], ops[0, 3]
            flip = flip_column >= 0 and row[max(flip_column, 0)] != 0.0
            start(
                ops[0, 0],
                view,
                constants[0],
                row[ops[0, 1] :],
                scratch,
                pixels,
                offsets[n],
                heights[n],
                widths[n],
                factors[n],
                flip,
            )
            for i in range(1, ops.shape[0]):
                apply(ops[i, 0], view, constants[i], row[ops[i, 1] :], scratch)
            pack(view, out[n])

    signature = (
        "void(int64[:, ::1], float64[:, ::1], float64[:, ::1], uint8[::1], int64[::1], int64[::1], "
        "int64[::1], int64[::1], float32[::1], uint8[:, :, :, ::1], int64, int64)"
    )
    return _OpsKernel(render_view, signature, name, origins)


class Dispatch:
    """The kernels for a set of ops, and the codes by which tables name the ops' functions.

    base: another Dispatch, whose draw kernel serves if it knows all these ops' draws. suffix: of
    the kernels' names.
    """

    def __init__(
        self, ops: Iterable[type[ImageOp]], base: Dispatch | None = None, suffix: str = ""
    ) -> None:
        origins = {f: (op, k) for op in ops for k in _TYPES if (f := getattr(op, k)) is not None}
        self._functions: dict[str, list[Any]] = {
            kind: [f for f, (_, its_kind) in origins.items() if its_kind == kind] for kind in _TYPES
        }
        draws, starts, applies = (self._functions[kind] for kind in ("draw", "start", "apply"))
        if base is not None and set(draws) <= set(base._functions["draw"]):
            self._functions["draw"] = base._functions["draw"]
            self.draw_view: Kernel = base.draw_view
        else:
            self.draw_view = _draw_kernel(draws, f"draw_view{suffix}", origins)
        self.render_view = _render_kernel(starts, applies, f"render_view{suffix}", origins)

    def code(self, op: ImageOp, kind: str) -> int:
        """The code of the op's function `kind`, NOTHING where it has none."""
        function = getattr(type(op), kind)
        return NOTHING if function is None else self._functions[kind].index(function)

    def knows(self, op: type[ImageOp]) -> bool:
        functions = ((getattr(op, kind), known) for kind, known in self._functions.items())
        return all(function is None or function in known for function, known in functions)


BUILT_IN = Dispatch(BUILT_IN_OPS)
_EXTENDED: dict[tuple[type[ImageOp], ...], Dispatch] = {}


def dispatch_for(ops: Iterable[ImageOp], neighbours: Iterable[ImageOp] = ()) -> Dispatch:
    """The kernels that run `ops`: BUILT_IN if it knows them all, else kernels for them and
    `neighbours`, the other views' ops, so that one compilation serves all views."""
    classes = {type(op) for op in ops}
    if all(map(BUILT_IN.knows, classes)):
        return BUILT_IN
    classes |= {SimpleRGBImageDecoder, *(type(op) for op in neighbours)}
    # The order numbers the functions in kernels on disk: it must be the same in every process.
    ordered = tuple(sorted(classes, key=lambda op: (_name_of(op), id(op))))
    if ordered not in _EXTENDED:
        digest = hashlib.sha256("\0".join(map(_name_of, ordered)).encode()).hexdigest()[:16]
        _EXTENDED[ordered] = Dispatch(ordered, BUILT_IN, f"_{digest}")
    return _EXTENDED[ordered]


def _name_of(op: type[ImageOp]) -> str:
    """Which code an op is: its digest and its name."""
    return f"{digest_of(op)} {op.__module__}.{op.__qualname__}"
