"""FFCV's `Compiler`, as far as `generate_code` functions use it."""

from numba import prange


class Compiler:
    """`Compiler.get_iterator()` is what generated code loops with."""

    @staticmethod
    def get_iterator() -> type:
        """numba's prange: an ordinary range here, because the loader's workers are already
        parallel."""
        return prange
