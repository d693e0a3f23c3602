"""Short names for LLVM's vector instructions at raw addresses. LLVM lowers them to the CPU's."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


class Lanes:
    """Builds vector code. Vectors are IR values; addresses are IR integers."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, address: Any, count: int, element: Any, offset: int = 0) -> Any:
        """`count` numbers from address + offset (bytes)."""
        value = self.builder.load(self._pointer(address, ir.VectorType(element, count), offset))
        value.align = 1
        return value

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        """All lanes, to address + offset (bytes)."""
        self.builder.store(value, self._pointer(address, value.type, offset)).align = 1

    def _pointer(self, address, kind, offset):
        if offset:
            address = self.builder.add(address, ir.Constant(I64, offset))
        return self.builder.inttoptr(address, kind.as_pointer())

    def same(self, number: int, like: Any) -> Any:
        """A number in every lane."""
        return ir.Constant(like.type, [number] * like.type.count)

    def add(self, a: Any, b: Any) -> Any:
        """a + b; b may be a number."""
        return self.builder.add(a, self.same(b, a) if isinstance(b, int) else b)

    def sub(self, a: Any, b: Any) -> Any:
        """a - b; b may be a number."""
        return self.builder.sub(a, self.same(b, a) if isinstance(b, int) else b)

    def scale(self, a: Any, number: int) -> Any:
        """A number times each lane."""
        return self.builder.mul(a, self.same(number, a))

    def up(self, a: Any, bits: int) -> Any:
        """Each lane shifted left."""
        return self.builder.shl(a, self.same(bits, a))

    def down(self, a: Any, bits: int) -> Any:
        """Each signed lane shifted right: rounded towards minus infinity."""
        return self.builder.ashr(a, self.same(bits, a))

    def down_unsigned(self, a: Any, bits: int) -> Any:
        """Each unsigned lane shifted right."""
        return self.builder.lshr(a, self.same(bits, a))

    def size(self, a: Any) -> Any:
        """Absolute values."""
        kind = ir.FunctionType(a.type, [a.type, ir.IntType(1)])
        name = f"llvm.abs.v{a.type.count}i{a.type.element.width}"
        code = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(code, [a, ir.Constant(ir.IntType(1), 0)])

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of two signed lanes."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def as_bytes(self, a: Any) -> Any:
        """Signed lanes cut to 0..255, as bytes."""
        low, high = self.same(0, a), self.same(255, a)
        a = self.larger(a, low)
        a = self.builder.select(self.builder.icmp_signed(">", a, high), high, a)
        return self.narrow(a, I8)

    def narrow(self, a: Any, element: Any) -> Any:
        """The low bits of each lane."""
        return self.builder.trunc(a, ir.VectorType(element, a.type.count))

    def widen(self, a: Any, element: Any) -> Any:
        """Signed lanes in more bits."""
        return self.builder.sext(a, ir.VectorType(element, a.type.count))

    def widen_unsigned(self, a: Any, element: Any) -> Any:
        """Unsigned lanes in more bits."""
        return self.builder.zext(a, ir.VectorType(element, a.type.count))

    def shuffle(self, a: Any, b: Any, order: Sequence[int]) -> Any:
        """Lanes of a, and behind them of b, in a new order."""
        mask = ir.Constant(ir.VectorType(I32, len(order)), list(order))
        return self.builder.shuffle_vector(a, b, mask)

    def as_lanes(self, a: Any, count: int, element: Any) -> Any:
        """The same bits as other lanes."""
        return self.builder.bitcast(a, ir.VectorType(element, count))
