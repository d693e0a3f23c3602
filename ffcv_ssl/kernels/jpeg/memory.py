"""Numbers at raw addresses, without NumPy's arrays: those handed to a device function cost atomic
reference counts, which took half of the time of entropy decoding.

Addresses, positions and shifts are all uint64: numba turns uint64 and int64 together into float64.
Nothing is checked.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

U = np.uint64
ADDRESS = types.uintp
_WORD = ir.IntType(64)


def _pointer(builder: Any, address: Any, bits: int) -> Any:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _load(bits: int) -> Any:
    @intrinsic
    def load(context, address):
        """The little-endian number at an address, as uint64."""

        def codegen(context, builder, signature, args):
            value = builder.load(_pointer(builder, args[0], bits))
            value.align = 1
            return value if bits == 64 else builder.zext(value, _WORD)

        return types.uint64(ADDRESS), codegen

    return load


def _store(bits: int) -> Any:
    @intrinsic
    def store(context, address, value):
        """The low bits of a uint64 to an address."""

        def codegen(context, builder, signature, args):
            value = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store(value, _pointer(builder, args[0], bits)).align = 1
            return context.get_dummy_value()

        return types.void(ADDRESS, types.uint64), codegen

    return store


load8, load32, load64 = _load(8), _load(32), _load(64)
load16 = _load(16)
store8, store16, store64 = _store(8), _store(16), _store(64)


@intrinsic
def swap_bytes(context, value):
    """A uint64 with its bytes in reverse order."""

    def codegen(context, builder, signature, args):
        return builder.bswap(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def signed16(context, value):
    """The low 16 bits of a uint64 as a signed number, int64."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.trunc(args[0], ir.IntType(16)), _WORD)

    return types.int64(types.uint64), codegen
