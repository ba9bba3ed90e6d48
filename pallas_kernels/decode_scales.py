"""From the rows of scales and offsets to factors of wgmma operands, in registers.

A word of a row holds the values of channels r and r + 8 of a warp; what is made of it is the pair
of both, which is spread to a pair of one channel where it is used.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.decode_codes import BYTE, LIFT, fused, is_bf16
from pallas_kernels.record import CHANNELS, E8M0, Record
from pallas_kernels.registers import Bits, constants, splat


def row_scales(bits: Bits, record: Record, rows: list[ir.Value]) -> list[ir.Value]:
    """Return the f32 scales of a thread's channels r and r + 8."""
    f32 = ir.F32Type.get()
    if record.scale_dtype == "float32":
        return [arith.bitcast(f32, row) for row in rows]
    (word,) = rows
    if record.scale_dtype == "bfloat16":
        high = arith.andi(word, bits.const(0xFFFF0000))
        return [arith.bitcast(f32, bits.left(word, 16)), arith.bitcast(f32, high)]
    pair = bits.as_vector(word, ir.F16Type.get())
    return [arith.extf(f32, vector.extract(pair, [], [half])) for half in range(2)]


def as_row(scales: list[ir.Value], unit: float) -> Any:
    """Return the f32 row vector of a thread's two channel scales, in codes of `unit`."""
    f32 = ir.F32Type.get()
    out = np.empty(fa.WGMMA_ROW_LAYOUT.registers_shape((CHANNELS,)), dtype=object)
    for half, scale in enumerate(scales):
        if unit != 1.0:
            scale = arith.mulf(scale, arith.constant(f32, ir.FloatAttr.get(f32, unit)))
        out.flat[half] = vector.broadcast(ir.VectorType.get((1,), f32), scale)
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_ROW_LAYOUT, _is_signed=None)


def _converted(pair: ir.Value, element: ir.Type) -> ir.Value:
    """Round a pair of floats to another type of 16 bits."""
    if ir.VectorType(pair.type).element_type == element:
        return pair
    wide = ir.VectorType.get((2,), ir.F32Type.get())
    pair = pair if pair.type == wide else arith.extf(wide, pair)
    return arith.truncf(ir.VectorType.get((2,), element), pair)


def _lifted(pair: ir.Value, power: int, element: ir.Type) -> ir.Value:
    """Multiply by a power of two in steps that the type can express."""
    most = 127 if is_bf16(element) else 15
    while power:
        step = min(power, most)
        pair, power = arith.mulf(pair, splat(element, 2.0**step)), power - step
    return pair


def _float8_pair(
    bits: Bits, record: Record, word: ir.Value, odd: int, element: ir.Type
) -> ir.Value:
    # The bits of the scale become the low exponent and high mantissa bits: its value but for a
    # power of two, which is multiplied in together with the one that e2m1 codes lack.
    power = 0
    if record.is_e2m1:
        power = LIFT["bf16" if is_bf16(element) else "f16"]
        power -= int(math.log2(record.unit(jnp.bfloat16 if is_bf16(element) else jnp.float16)))
    if record.scale_dtype == E8M0:
        moved = bits.rotate_left(word, -8 * odd)
        return _lifted(bits.as_vector(bits.pick(moved, 0x7F807F80), element), power, element)
    if is_bf16(element):
        body = bits.pick(bits.rotate_left(word, -8 * odd), 0x07F007F0)
        return _lifted(bits.as_vector(body, element), power + 120, element)
    body = bits.pick(bits.rotate_left(word, 3 - 8 * odd), 0x3F803F80)
    return _lifted(bits.as_vector(body, element), power + 8, element)


def _integer_body(bits: Bits, word: ir.Value, odd: int) -> ir.Value:
    """Return the low 7 bits of integer scales as the low end of the mantissa of the bf16 128."""
    return bits.as_vector(
        bits.pick(bits.right(word, 8 * odd), 0x007F007F, 0x43004300), ir.BF16Type.get()
    )


def _integer_pair(
    bits: Bits, record: Record, word: ir.Value, odd: int, element: ir.Type
) -> ir.Value:
    # As with codes: the integer is the low end of the mantissa of a power of two.
    moved = bits.right(word, 8 * odd)
    signed = record.scale_dtype == "int8"
    if not is_bf16(element):
        # Of a signed byte the flipped sign bit makes it unsigned, 128 more.
        body = bits.pick(moved, 0x00FF00FF)
        body = arith.xori(body, bits.const(0x64806480 if signed else 0x64006400))
        return arith.subf(
            bits.as_vector(body, element), splat(element, 1152.0 if signed else 1024.0)
        )
    body = _integer_body(bits, word, odd)
    if not signed:
        return arith.subf(body, splat(element, 128.0))
    sign = bits.pick(moved, 0x00800080, 0x43004300)  # turns the 128 to subtract into 256
    return arith.subf(body, bits.as_vector(sign, element))


class SpanFactors:
    """The factors of one span of a record, from the words of its rows.

    Args:
        bits: the arithmetic.
        record: format.
        rows: words of the rows of all groups of the span, of scales or of offsets.
        top: the word of the super-scale row, or None.
        addend: whether these are offsets, which are to be subtracted.
        element: bf16 or f16.
    """

    def __init__(
        self,
        bits: Bits,
        record: Record,
        rows: list[ir.Value],
        top: ir.Value | None,
        addend: bool,
        element: ir.Type,
    ) -> None:
        self.bits, self.record, self.rows, self.element = bits, record, rows, element
        self.top = self.base = None
        if top is None:
            return
        self.top = _converted(bits.as_vector(top, ir.F16Type.get()), element)
        if record.fused and is_bf16(element):
            unit = record.unit(jnp.bfloat16)
            lifts = [2.0 ** (BYTE - record.place(half)) / unit for half in range(2)]
            lifts = [-1 / unit] * 2 if addend else lifts
            self.top = arith.mulf(self.top, constants(element, *lifts))
            # (128 + scale) * top - 128 * top is rounded once, and 128 * top not at all.
            self.base = arith.mulf(self.top, splat(element, -128.0))
        elif addend:
            self.top = arith.negf(self.top)

    def pair(self, group: int) -> ir.Value:
        """Return the factors of channels r and r + 8 for a group."""
        bits, record, element = self.bits, self.record, self.element
        if record.scale_bits == 8:
            word, odd = self.rows[group // 2], group % 2
            if self.top is None:
                return _float8_pair(bits, record, word, odd, element)
            if self.base is not None and record.scale_dtype == "uint8":
                return fused(_integer_body(bits, word, odd), self.top, self.base)
            return arith.mulf(_integer_pair(bits, record, word, odd, element), self.top)
        if record.scale_bits == 32:
            wide = ir.VectorType.get((2,), ir.F32Type.get())
            both = row_scales(bits, record, self.rows[2 * group : 2 * group + 2])
            return _converted(vector.from_elements(wide, both), element)
        own = ir.BF16Type.get() if record.scale_dtype == "bfloat16" else ir.F16Type.get()
        return _converted(bits.as_vector(self.rows[group], own), element)

    def spread(self, group: int) -> list[ir.Value]:
        """Return the factor of channel r, and that of channel r + 8, each twice."""
        return _spread(self.pair(group))

    def excess(self, group: int) -> list[ir.Value]:
        """Return what the factor makes of the excess of fused codes, negated and spread."""
        excess, places = self.record.excess, [self.record.place(half) for half in range(2)]
        lifted = [-excess * 2.0 ** (place - BYTE) for place in places]
        return _spread(arith.mulf(self.pair(group), constants(self.element, *lifted)))


def _spread(pair: ir.Value) -> list[ir.Value]:
    """Return the low value of a pair twice, and the high one twice."""
    return [vector.shuffle(pair, pair, [half, half]) for half in range(2)]
