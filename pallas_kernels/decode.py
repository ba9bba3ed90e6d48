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

from pallas_kernels.decode_codes import (
    fused,
    is_bf16,
    operand_bytes,
    operand_pair,
    progressive_terms,
    zero_operand,
)
from pallas_kernels.decode_scales import SpanFactors, as_row, row_scales
from pallas_kernels.record import CHANNELS, DEPTH, WORDS, Record
from pallas_kernels.record_values import code_values, offset_values, scale_values
from pallas_kernels.registers import Bits, words_of
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
        values, scales = code_values(record, words), scale_values(record, words)
        unit = record.unit(dtype)
        if scaled:
            # Like the device: scales rounded to the operand type, then one rounding.
            spread = jnp.repeat((scales / unit).astype(dtype), record.group, -1)
            values = values * spread.astype(jnp.float32)
            if record.offset and record.zero_rows:
                offsets = (offset_values(record, words) / unit).astype(dtype)
                offsets = jnp.repeat(offsets, record.group, -1)
                values = values - offsets.astype(jnp.float32)
            starts = range(index * span, (index + 1) * span, depth)
            return [Tile(values[:, k : k + depth].astype(dtype), None) for k in starts]
        tiles = []
        first = index * span // record.group
        for group in range(first, first + max(1, span // record.group)):
            k = max(group * record.group // depth * depth, index * span)
            mine = lax.broadcasted_iota(jnp.int32, values.shape, 1) // record.group == group
            operand = jnp.where(mine, values / unit, 0)[:, k : k + depth]
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


class _Rows(NamedTuple):
    """Where the rows of a span lie that are no codes, relative to the record."""

    scales: list[int]
    zeros: list[int]
    tops: list[int]

    @classmethod
    def of(cls, record: Record, index: int, span: int) -> _Rows:
        """Return the rows of span `index`."""

        def part(start: int, rows: int) -> list[int]:
            count = max(1, span // record.group) * rows // record.groups
            first = start + index * span // record.group * rows // record.groups
            return list(range(first, first + count))

        scales = record.code_rows
        zeros = scales + record.scale_rows
        tops = zeros + record.zero_rows
        return cls(
            part(scales, record.scale_rows),
            part(zeros, record.zero_rows),
            list(range(tops, tops + record.super_rows)),
        )


def device_decoder(record: Record, dtype: Any, depth: int, span: int, scaled: bool) -> Decoder:
    """Return the function that unpacks a record in registers.

    Args:
        record: format of the record.
        dtype: operand type: bf16 or f16, or int8 or e4m3 when `record.operand` is 8.
        depth: values of k in each tile.  Without `scaled` each tile has one group, and is zero
            in the rest of its depth if that is larger than a group.
        span: values of k decoded by one call, a multiple of `depth`; 64 or 128.
        scaled: multiply the operand by its scales (rounding to `dtype`, but for int8 ones of int8
            operands) instead of returning them.
    """
    dtype = jnp.dtype(dtype)
    narrow = record.operand == 8
    fragment = fa.WGMMA_LAYOUT_8BIT if narrow else fa.WGMMA_LAYOUT
    # What one step of a decoded 8-bit operand counts, in codes.
    unit = 512.0 if dtype == jnp.float8_e4m3fn else 1 / 16 if narrow and not record.zero else 1.0
    plane_rows = [rows * span // DEPTH for rows in record.plane_rows]
    plane_layouts = [
        plgpu.Layout.WG_STRIDED((rows, WORDS), vec_size=min(4, rows // 4)) for rows in plane_rows
    ]
    count, far_extent, _ = record.fields
    tile_words = count * depth // DEPTH
    group_words = count // record.groups
    groups = max(1, span // record.group)
    tiles = span // depth if scaled else groups
    rows = _Rows.of(record, 0, span)
    operand_type = plgpu.ShapeDtypeStruct(
        (CHANNELS, depth), dtype, layout=plgpu.Layout.WGMMA_8BIT if narrow else plgpu.Layout.WGMMA
    )
    scale_type = plgpu.ShapeDtypeStruct((CHANNELS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(
        arg_types=(*plane_layouts, *[_PAIR] * sum(map(len, rows))),
        return_type=(*[operand_type] * tiles, *([] if scaled else [scale_type] * tiles)),
    )
    def unpack(ctx: Any, *arrays: Any) -> tuple[Any, ...]:
        bits = Bits()
        element = mgpu.dtype_to_ir_type(dtype)
        planes = [words_of(array) for array in arrays[: len(plane_rows)]]
        row_words = [words_of(row)[0] for row in arrays[len(plane_rows) :]]
        scales, zeros, tops = (
            [row_words.pop(0) for _ in part] for part in (rows.scales, rows.zeros, rows.tops)
        )
        points = [None] * groups if record.offset or not zeros else zeros
        if record.progressive:
            subtract = [[progressive_terms(bits, scales[0], half) for half in range(2)]]
        else:
            subtract = [
                [zero_operand(bits, record, word, half, element) for half in range(2)]
                for word in points
            ]
        factors, addends = [], [[None, None]] * groups
        if scaled and not narrow:
            top = tops[0] if tops else None
            spans = SpanFactors(bits, record, scales, top, False, element)
            factors = [spans.spread(group) for group in range(groups)]
            if record.fused and record.excess and is_bf16(element):
                addends = [spans.excess(group) for group in range(groups)]
        if record.offset and not narrow:
            spans = SpanFactors(bits, record, zeros, tops[1], True, element)
            addends = [spans.spread(group) for group in range(groups)]

        def decode(index: int, half: int, far: int) -> ir.Value:
            group = index // group_words
            zero = subtract[group][half]
            if narrow:
                int8 = dtype == jnp.int8
                packed = operand_bytes(bits, record, planes[0][index], half, zero, int8)
                return bits.as_vector(packed, element)
            share = len(planes[0]) // len(planes[-1])  # low words to a word of the high plane
            high = planes[1][index // share] if len(planes) > 1 else None
            words = planes[0][index], high, index % share
            pair = operand_pair(bits, record, words, half, far, zero, element)
            return fused(pair, factors[group][half], addends[group][half]) if scaled else pair

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
        per_group = len(scales) // groups
        row_values = [
            as_row(row_scales(bits, record, scales[g * per_group : (g + 1) * per_group]), unit)
            for g in range(groups)
        ]
        return (*operands, *row_values)

    def decode_span(ref: Any, index: int) -> list[Tile]:
        planes, start = [], 0
        for span_rows, plane, layout in zip(
            plane_rows, record.plane_rows, plane_layouts, strict=True
        ):
            at = pl.ds(start + index * span_rows, span_rows)
            planes.append(load(ref.at[at], layout))
            start += plane
        at = [row for part in _Rows.of(record, index, span) for row in part]
        values = unpack(*planes, *[load(ref.at[row], _PAIR) for row in at])
        row_scale = [None] * tiles if scaled else values[tiles:]
        return [Tile(*pair) for pair in zip(values[:tiles], row_scale, strict=True)]

    return decode_span
