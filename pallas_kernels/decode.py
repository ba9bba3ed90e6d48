"""From weight codes to wgmma operands, inside a tile.

A decoder turns a record (see `record`) in shared memory into wgmma operands.  `device_decoder` does
it in registers; `reference_decoder` is the same function in jax.numpy, for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.record import (
    CHANNELS,
    DEPTH,
    WORDS,
    Record,
    code_values,
    read_codes,
    read_scales,
    read_zeros,
)
from pallas_kernels.tiles import ROW, load


class Tile(NamedTuple):
    """A decoded piece of a record: operand [64, depth], and scale [64] f32 if still to apply."""

    operand: jax.Array
    scale: jax.Array | None


# Of a record's ref in shared memory and the number of a span: the tiles of that span, along k.
Decoder = Callable[[Any, int], list[Tile]]


def reference_decoder(record: Record, dtype: Any, depth: int, span: int, scaled: bool) -> Decoder:
    """Return what `device_decoder` returns, in jax.numpy."""

    def decode(ref: Any, index: int) -> list[Tile]:
        words = ref[...]
        zeros = read_zeros(record, words) if record.zero else None
        values = code_values(record, read_codes(record, words), zeros)
        scales = read_scales(record, words).astype(jnp.float32)
        if scaled:
            values = values.astype(dtype) * jnp.repeat(scales, record.group, -1).astype(dtype)
        if scaled:
            starts = range(index * span, (index + 1) * span, depth)
            return [Tile(values[:, k : k + depth].astype(dtype), None) for k in starts]
        tiles = []
        first = index * span // record.group
        for group in range(first, first + max(1, span // record.group)):
            k = max(group * record.group // depth * depth, index * span)
            mine = lax.broadcasted_iota(jnp.int32, values.shape, 1) // record.group == group
            operand = jnp.where(mine, values, 0)[:, k : k + depth]
            tiles.append(Tile(operand.astype(dtype), scales[:, group]))
        return tiles

    return decode


# One word per channel pair (r, r + 8) of a warp, held by the four threads of row r.
_PAIR = plgpu.Layout.TILED(
    fa.Tiling(((32,), (8,), (1,))),
    warp_dims=(-3,),
    lane_dims=(-2, fa.Replicated(4)),
    vector_dim=-1,
)


class _Bits:
    """Arithmetic on the 32 bit words of a thread."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        # %nsmid >> 24 is zero, but neither LLVM nor ptxas can know.  Masks derived from it stay in
        # a register; as literals ptxas re-creates them over and over.
        asm = "{ .reg .b32 t; mov.u32 t, %nsmid; shr.u32 $0, t, 24; }"
        self._zero: Any = llvm.inline_asm(self.i32, [], asm, "=r")
        self._masks: dict[int, ir.Value] = {}

    def const(self, bits: int) -> ir.Value:
        signed = bits - (1 << 32) if bits >> 31 else bits
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, signed))

    def mask(self, bits: int) -> ir.Value:
        if bits not in self._masks:
            self._masks[bits] = arith.ori(self._zero, self.const(bits))
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


def _as_row(scales: list[ir.Value], unit: float) -> Any:
    """Return the f32 row vector of a thread's two channel scales, in codes of `unit`."""
    f32 = ir.F32Type.get()
    out = np.empty(fa.WGMMA_ROW_LAYOUT.registers_shape((CHANNELS,)), dtype=object)
    for half, scale in enumerate(scales):
        if unit != 1.0:
            scale = arith.mulf(scale, arith.constant(f32, ir.FloatAttr.get(f32, unit)))
        out.flat[half] = vector.broadcast(ir.VectorType.get((1,), f32), scale)
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_ROW_LAYOUT, _is_signed=None)


def _splat(element: ir.Type, value: float) -> ir.Value:
    pair = ir.VectorType.get((2,), element)
    return arith.constant(
        pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(element, value))
    )


def _words(array: Any) -> list[ir.Value]:
    """Return a thread's words of a fragmented array in order."""
    return [
        vector.extract(register, [], [i])
        for register in array.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def _row_scales(bits: _Bits, record: Record, rows: list[ir.Value]) -> list[ir.Value]:
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


def _pair_scales(
    bits: _Bits, record: Record, rows: list[ir.Value], element: ir.Type
) -> list[ir.Value]:
    """Return the scales of a thread's channels r and r + 8 as pairs of the operand type."""
    own = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}.get(record.scale_dtype)
    if own is not None and own.get() == element:
        return [bits.as_vector(bits.splat16(rows[0], half), element) for half in range(2)]
    pair = ir.VectorType.get((2,), element)
    return [
        vector.broadcast(pair, arith.truncf(element, scale))
        for scale in _row_scales(bits, record, rows)
    ]


def _uint4_to_pairs(
    bits: _Bits, word: ir.Value, half: int, far: int, zero: ir.Value, element: ir.Type
) -> ir.Value:
    # The nibble becomes the low end of the mantissa of 128 (bf16) or 1024 (f16): exact.
    magic = 0x43004300 if element == ir.BF16Type.get() else 0x64006400
    y = bits.right(word, 4 * (half + 2 * far))
    y = arith.ori(arith.andi(y, bits.mask(0x000F000F)), bits.const(magic))
    return arith.subf(bits.as_vector(y, element), zero)


def _int8_to_pairs(bits: _Bits, word: ir.Value, half: int, element: ir.Type) -> ir.Value:
    y = bits.right(word, 8 * half)
    if element == ir.BF16Type.get():
        # 7 bits fit the mantissa of 128; the sign bit turns the 128 that is subtracted into 256.
        low = arith.ori(arith.andi(y, bits.mask(0x007F007F)), bits.const(0x43004300))
        sign = arith.ori(arith.andi(y, bits.mask(0x00800080)), bits.const(0x43004300))
        return arith.subf(bits.as_vector(low, element), bits.as_vector(sign, element))
    biased = arith.xori(arith.andi(y, bits.mask(0x00FF00FF)), bits.const(0x64806480))
    return arith.subf(bits.as_vector(biased, element), _splat(element, 1024.0 + 128.0))


def _e4m3_to_pairs(bits: _Bits, word: ir.Value, half: int, element: ir.Type) -> ir.Value:
    # Move exponent and mantissa to their places and correct the exponent bias by a product,
    # which also normalises subnormal codes: exact.
    bf16 = element == ir.BF16Type.get()
    y = word if half else bits.left(word, 8)
    body = bits.right(y, 4 if bf16 else 1)
    body = arith.andi(body, bits.mask(0x07F007F0 if bf16 else 0x3F803F80))
    joined = arith.ori(arith.andi(y, bits.mask(0x80008000)), body)
    bias = _splat(element, 2.0**120 if bf16 else 2.0**8)
    return arith.mulf(bits.as_vector(joined, element), bias)


def _uint4_to_int8(bits: _Bits, word: ir.Value, half: int, zero: ir.Value | None) -> ir.Value:
    if zero is None:  # 16 (u - 8): the flipped code is the high nibble
        y = word if half else bits.left(word, 4)
        return arith.xori(arith.andi(y, bits.mask(0xF0F0F0F0)), bits.const(0x80808080))
    # 128 + u - zero lies in 113 .. 143, so nothing is borrowed from a neighbour.
    y = arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    y = arith.subi(arith.ori(y, bits.mask(0x80808080)), zero)
    return arith.xori(y, bits.mask(0x80808080))


def _uint4_to_e4m3(bits: _Bits, word: ir.Value, half: int, zero: ir.Value | None) -> ir.Value:
    # The e4m3 bytes 0 .. 15 are exactly 0 .. 15 times 2**-9, the least subnormal.
    y = arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    eight = bits.mask(0x08080808) if zero is None else zero
    y = arith.subi(arith.ori(y, bits.mask(0x80808080)), eight)  # 128 + v
    negative = arith.andi(
        bits.right(arith.xori(y, bits.const(0xFFFFFFFF)), 7), bits.mask(0x01010101)
    )
    # v >= 0: clear the top bit.  v < 0: 256 - (128 + v) = sign bit and magnitude.
    flip = arith.addi(arith.muli(negative, bits.const(0x7F)), bits.mask(0x80808080))
    return arith.addi(arith.xori(y, flip), negative)


def _operand_pairs(
    bits: _Bits, record: Record, word: ir.Value, half: int, far: int, zero: Any, element: ir.Type
) -> ir.Value:
    """Decode two codes to a pair of bf16 or f16."""
    if record.code == "uint4":
        return _uint4_to_pairs(bits, word, half, far, zero, element)
    decode = _int8_to_pairs if record.code == "int8" else _e4m3_to_pairs
    return decode(bits, word, half, element)


def _zero_operand(
    bits: _Bits, record: Record, word: ir.Value | None, half: int, element: ir.Type
) -> ir.Value | None:
    """Return what the decoding of uint4 codes subtracts, from a word of the zero point row."""
    if record.operand == 8:
        return word and mgpu.prmt(word, word, bits.const(0x2222 if half else 0))
    bf16 = element == ir.BF16Type.get()
    if word is None:
        return _splat(element, 136.0 if bf16 else 1032.0)
    pair = bits.splat16(word, half)
    if not bf16:  # from the bits of the bf16 128 to those of the f16 1024
        pair = arith.xori(pair, bits.const(0x27002700))
    return bits.as_vector(pair, element)


def device_decoder(record: Record, dtype: Any, depth: int, span: int, scaled: bool) -> Decoder:
    """Return the function that unpacks a record in registers.

    Args:
        record: format of the record.
        dtype: operand type: bf16 or f16, or int8 or e4m3 when `record.operand` is 8.
        depth: values of k in each tile.  Without `scaled` each tile has one group, and is zero
            in the rest of its depth if that is larger than a group.
        span: values of k decoded by one call, a multiple of `depth`; 64 or 128.
        scaled: multiply the operand by its scales (rounding to `dtype`) instead of returning them.
    """
    dtype = jnp.dtype(dtype)
    narrow = record.operand == 8
    fragment = fa.WGMMA_LAYOUT_8BIT if narrow else fa.WGMMA_LAYOUT
    # What one step of a decoded 8-bit operand counts, in codes.
    unit = 512.0 if dtype == jnp.float8_e4m3fn else 1 / 16 if narrow and not record.zero else 1.0
    code_rows = record.code_rows * span // DEPTH
    code_layout = plgpu.Layout.WG_STRIDED((code_rows, WORDS), vec_size=4)
    count, far_extent, _ = record.fields
    tile_words = count * depth // DEPTH
    group_words = count // record.groups
    groups = max(1, span // record.group)
    tiles = span // depth if scaled else groups
    row_count = groups * (record.scale_rows + record.zero)
    operand_type = plgpu.ShapeDtypeStruct(
        (CHANNELS, depth), dtype, layout=plgpu.Layout.WGMMA_8BIT if narrow else plgpu.Layout.WGMMA
    )
    scale_type = plgpu.ShapeDtypeStruct((CHANNELS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(
        arg_types=(code_layout, *[_PAIR] * row_count),
        return_type=(*[operand_type] * tiles, *([] if scaled else [scale_type] * tiles)),
    )
    def unpack(ctx: Any, codes: Any, *rows: Any) -> tuple[Any, ...]:
        bits = _Bits()
        element = mgpu.dtype_to_ir_type(dtype)
        words = _words(codes)
        row_words = [_words(row)[0] for row in rows]
        per_group = record.scale_rows
        scales = [row_words[g * per_group : (g + 1) * per_group] for g in range(groups)]
        zeros = row_words[groups * per_group :] or [None] * groups
        subtract = [
            [_zero_operand(bits, record, word, half, element) for half in range(2)]
            for word in zeros
        ]
        factors = [_pair_scales(bits, record, rows, element) if scaled else [] for rows in scales]

        def decode(index: int, half: int, far: int) -> ir.Value:
            group = index // group_words
            zero = subtract[group][half]
            if narrow:
                to_bytes = _uint4_to_int8 if dtype == jnp.int8 else _uint4_to_e4m3
                return bits.as_vector(to_bytes(bits, words[index], half, zero), element)
            pair = _operand_pairs(bits, record, words[index], half, far, zero, element)
            return arith.mulf(pair, factors[group][half]) if scaled else pair

        nothing = bits.as_vector(bits.const(0), element)
        operands = []
        for tile in range(tiles):
            first = tile * span // tiles * count // DEPTH // tile_words * tile_words
            out = np.empty(fragment.registers_shape((CHANNELS, depth)), dtype=object)
            for i, far, half in np.ndindex(tile_words, far_extent, 2):
                index = first + i
                skipped = not scaled and index // group_words != tile
                out[0, far_extent * i + far, 0, 0, half, 0, 0, 0, 0] = (
                    nothing if skipped else decode(index, half, far)
                )
            signed = True if dtype == jnp.int8 else None
            operands.append(fa.FragmentedArray(_registers=out, _layout=fragment, _is_signed=signed))
        if scaled:
            return tuple(operands)
        row_scales = [_as_row(_row_scales(bits, record, rows), unit) for rows in scales]
        return (*operands, *row_scales)

    def decode_span(ref: Any, index: int) -> list[Tile]:
        first = index * span // record.group
        codes = load(ref.at[pl.ds(index * code_rows, code_rows)], code_layout)
        scales = record.code_rows + first * record.scale_rows
        zeros = record.code_rows + record.groups * record.scale_rows + first
        at = [*range(scales, scales + groups * record.scale_rows)]
        at += range(zeros, zeros + groups * record.zero)
        values = unpack(codes, *[load(ref.at[row], _PAIR) for row in at])
        row_scales = [None] * tiles if scaled else values[tiles:]
        return [Tile(*pair) for pair in zip(values[:tiles], row_scales, strict=True)]

    return decode_span
