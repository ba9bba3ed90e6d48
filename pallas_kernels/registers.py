"""Arithmetic on the 32 bit words of a thread, for decoding weights in registers."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


class Bits:
    """Arithmetic on the 32 bit words of a thread."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        # %nsmid >> 24 is zero, but neither LLVM nor ptxas can know.  Masks derived from it stay in
        # a register; as literals ptxas re-creates them over and over.  They are sums, since ptxas
        # would merge a logical operation into their uses, and split those that take a constant.
        asm = "{ .reg .b32 t; mov.u32 t, %nsmid; shr.u32 $0, t, 24; }"
        self._zero: Any = llvm.inline_asm(self.i32, [], asm, "=r")
        self._masks: dict[int, ir.Value] = {}

    def const(self, bits: int) -> ir.Value:
        signed = bits - (1 << 32) if bits >> 31 else bits
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, signed))

    def mask(self, bits: int) -> ir.Value:
        if bits not in self._masks:
            self._masks[bits] = arith.addi(self._zero, self.const(bits))
        return self._masks[bits]

    def right(self, x: ir.Value, bits: int) -> ir.Value:
        return arith.shrui(x, self.const(bits)) if bits else x

    def left(self, x: ir.Value, bits: int) -> ir.Value:
        return arith.shli(x, self.const(bits)) if bits else x

    def splat16(self, x: ir.Value, half: int) -> ir.Value:
        """Repeat a 16 bit half of a word."""
        return mgpu.prmt(x, x, self.const(0x3232 if half else 0x1010))

    def as_vector(self, x: ir.Value, element: Any) -> ir.Value:
        """View a word as a vector of narrow elements."""
        count = 32 // element.width
        word = vector.broadcast(ir.VectorType.get((1,), self.i32), x)
        return vector.bitcast(ir.VectorType.get((count,), element), word)

    def rotate_left(self, x: ir.Value, bits: int) -> ir.Value:
        """Rotate a word; a shift where it can be told that the other bits are masked off."""
        if bits % 32 == 0:
            return x
        return llvm.intr_fshl(x, x, self.const(bits % 32))

    def pick(self, x: ir.Value, mask: int, other: int | ir.Value = 0) -> ir.Value:
        """Return the masked bits of a word joined with other bits: one instruction."""
        if isinstance(other, int):
            if other == 0:
                return arith.andi(x, self.mask(mask))
            other = self.const(other)
        # As assembly, since LLVM would reorder a chain of these into more instructions.
        operands: list[Any] = [x, self.mask(mask), other]
        joined: Any = llvm.inline_asm(
            self.i32, operands, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r"
        )
        return joined

    def select(self, mask: int, x: ir.Value, other: ir.Value) -> ir.Value:
        """Return the masked bits of a word and the other bits of another: one instruction."""
        operands: list[Any] = [self.mask(mask), x, other]
        joined: Any = llvm.inline_asm(
            self.i32, operands, "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r"
        )
        return joined


def splat(element: ir.Type, value: float) -> ir.Value:
    """Return a pair of one constant."""
    return constants(element, value, value)


def constants(element: ir.Type, low: float, high: float) -> ir.Value:
    """Return a pair of constants."""
    pair = ir.VectorType.get((2,), element)
    values = [ir.FloatAttr.get(element, value) for value in (low, high)]
    return arith.constant(pair, ir.DenseElementsAttr.get(values, pair))


def words_of(array: Any) -> list[ir.Value]:
    """Return a thread's words of a fragmented array in order."""
    return [
        vector.extract(register, [], [i])
        for register in array.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]
