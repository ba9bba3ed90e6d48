"""Prepacking: from plain codes and scales to records, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prepack_parts import Levels, Parts, as_tuple, take_apart
from pallas_kernels.record import CHANNELS, CODES, DEPTH, WORDS, ZERO_BITS, Record
from pallas_kernels.record_rows import (
    read_codes,
    read_scales,
    read_super,
    read_zeros,
    write_codes,
    write_row_values,
    write_scale_rows,
)
from pallas_kernels.record_values import fold_signs
from pallas_kernels.tiles import cdiv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepacked:
    """A weight in the order in which the kernels of this package read it.

    A pytree, so it can be stacked, scanned over, donated and sharded along its leading dimensions.
    It has no other structural operations: slice and transpose before packing.

    Attributes:
        records: [*lead, n/64 * ceil(k/128), rows, 32] int32, records of one channel block together.
        n, k: output channels and contracted extent, in elements.
        group: values of k that share a scale, as given to `prepack`; k for whole rows.
        block: channels that share a scale, as given to `prepack`.
        record: format of the records.
        factor: [*lead, n] or [*lead, 1] float32 that multiplies a channel's result, or None.
        factor_block: channels that share a factor, as given to `prepack`.
        offset: [*lead, n] float32 that is subtracted from all weights of a channel, or None.
        given_dtype: type in which `prepack` was given factors and offsets.
    """

    records: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    record: Record = dataclasses.field(metadata={"static": True})
    factor: jax.Array | None = None
    factor_block: int = dataclasses.field(default=0, metadata={"static": True})
    offset: jax.Array | None = None
    given_dtype: str = dataclasses.field(default="float32", metadata={"static": True})


class Plain(NamedTuple):
    """A weight as `prepack` takes it and `unpack` returns it.

    Attributes:
        codes: [*lead, n, k/2] uint8 (4-bit codes, the even k in the low nibble), or
            [*lead, n, k] int8 or float8_e4m3fn; a tuple of bit planes for 5 and 6 bits.
        scales: [*lead, ceil(n/block), ceil(k/group)]; a tuple with the super-scales or factors.
        zeros: zero points of the scales' shape, uint8, offsets of the scales' build, or None.
    """

    codes: Levels
    scales: Levels
    zeros: Levels | None


def prepack(
    codes: Levels,
    scales: Levels,
    zeros: Levels | None = None,
    *,
    code: str | None = None,
    group: int | None = None,
    block: int = 1,
    factor_block: int = 1,
    operand: int = 16,
) -> Prepacked:
    """Bring a weight into the order of the kernels; a pure and invertible transform.

    It runs under `jax.jit` (donate the arguments, and the weight is never in memory twice) and on
    any device.  A 4-bit code means `(code - zero) * scale`; without zero points zero is 8.

    For 8-bit operands there are two more builds of 4-bit codes.  *Progressive* scales are int8 ones
    in groups of 128 (or a multiple) with zero points, and one more scale per channel: the products
    `(code - zero) * scale` must fit int8, since they are the operands; what does not, wraps around.
    *Offsets* are given in place of zero points, as one scale and one offset per channel.

    Args:
        codes: [*lead, n, k/2] uint8 pairs of 4-bit codes, the even k in the low nibble, or
            [*lead, n, k] int8 or float8_e4m3fn, or two planes of uint8, lowest bits first in a
            byte: [*lead, n, k/2] and [*lead, n, k/8] (5 bits) or [*lead, n, k/4] (6 bits).
            n and k are multiples of 64.
        scales: [*lead, ceil(n/block), ceil(k/group)] bf16, f16, f32, or e4m3 or e8m0 (finite), or
            uint8 (up to 127) or int8.  A second array multiplies: with integer scales
            [*lead, n, k/256] float16, else [*lead, ceil(n/factor_block), 1] float32; beside
            progressive scales [*lead, n, 1] of any of the three wider types.
        zeros: zero points 0 .. 15 of the scales' shape, uint8, only for 4-bit codes; or a pair of
            offsets and their super-scales, of the scales' types: a value is
            code * scale - offset; for 8-bit operands one array of the scales' type.
        code: what the codes are; None for uint4 (of uint8 codes) or their own type.
            "float4_e2m1fn", "uint5" and "uint6" must be named.
        group: values of k that share a scale: 32, 64, a multiple of 128, or None for all;
            16, 32 or 64 for 8-bit scales.
        block: channels that share a scale.
        factor_block: channels that share one of the float32 factors.
        operand: bits of the matmul operand that the codes will become: 16 for `matmul_a16`,
            8 for `matmul_w4a8`.

    Raises:
        KernelError: a shape, dtype or group that the format does not have.
    """
    parts, record, n, k, group = take_apart(
        codes, scales, zeros, code, group, block, factor_block, operand
    )
    lead = parts.planes[0].shape[:-2]
    factor, offset = parts.factor, parts.offset
    parts = parts._replace(factor=None, offset=None)
    pack = functools.partial(_pack, record, n, k, group, block)
    for _ in lead:
        pack = jax.vmap(pack)
    given = "float32" if factor is None else factor.dtype.name
    if factor is not None:
        factor = factor[..., 0].astype(jnp.float32)
        if factor_block < n:
            factor = jnp.repeat(factor, factor_block, -1)[..., :n]
    offset = None if offset is None else offset[..., 0].astype(jnp.float32)
    return Prepacked(pack(parts), n, k, group, block, record, factor, factor_block, offset, given)


def _per_record(values: jax.Array, n: int, k: int, group: int, block: int, small: int) -> jax.Array:
    """Spread values [ceil(n/block), ceil(k/group)] to [n/64, ceil(k/128), 64, groups]."""
    depth = cdiv(k, DEPTH) * DEPTH
    values = jnp.repeat(values, block, axis=0)[:n]
    values = jnp.repeat(values, cdiv(group, small), axis=1)[:, : cdiv(k, small)]
    values = jnp.pad(values, ((0, 0), (0, depth // small - values.shape[1])))
    values = values.reshape(n // CHANNELS, CHANNELS, depth // DEPTH, DEPTH // small)
    return values.swapaxes(1, 2)


def join_planes(planes: tuple[jax.Array, ...], widths: tuple[int, ...]) -> jax.Array:
    """Return the codes [n, k] uint8 of their planes."""
    if widths == (8,):
        return lax.bitcast_convert_type(planes[0], jnp.uint8)
    codes, low = jnp.uint8(0), 0
    for plane, bits in zip(planes, widths, strict=True):
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        part = (plane[..., None] >> shifts) & ((1 << bits) - 1)
        codes = codes | part.reshape(plane.shape[0], -1) << low
        low += bits
    assert isinstance(codes, jax.Array)
    return codes


def split_planes(codes: jax.Array, code: str) -> Levels:
    """Return the planes of codes [n, k] uint8, or the one array that holds them."""
    widths, low, planes = CODES[code].planes, 0, []
    if widths == (8,):
        return lax.bitcast_convert_type(codes, jnp.dtype(code))
    for bits in widths:
        part = (codes >> low & ((1 << bits) - 1)).reshape(codes.shape[0], -1, 8 // bits)
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        planes.append((part << shifts).sum(-1, dtype=jnp.uint8))
        low += bits
    return tuple(planes) if len(planes) > 1 else planes[0]


def _bytes(values: jax.Array) -> jax.Array:
    """Return 8-bit values as bytes, since jnp.repeat and jnp.pad do not take every float8."""
    return lax.bitcast_convert_type(values, jnp.uint8) if values.dtype.itemsize == 1 else values


def _pack(record: Record, n: int, k: int, group: int, block: int, parts: Parts) -> jax.Array:
    """Return the records [n/64 * ceil(k/128), rows, 32] of one weight."""
    depth = cdiv(k, DEPTH) * DEPTH
    codes = join_planes(parts.planes, CODES[record.code].planes)
    codes = jnp.pad(codes, ((0, 0), (0, depth - k)))
    blocks = codes.reshape(n // CHANNELS, CHANNELS, depth // DEPTH, DEPTH).swapaxes(1, 2)
    spread = functools.partial(_per_record, n=n, k=k, group=group, block=block, small=record.group)
    wide = functools.partial(_per_record, n=n, k=k, group=2 * DEPTH, block=1, small=DEPTH)
    if parts.scale is None:
        return write_codes(record, blocks).reshape(-1, record.rows, WORDS)
    if record.progressive:
        assert parts.zero is not None
        both = jnp.concatenate([spread(_bytes(parts.scale)), spread(parts.zero)], -1)
        rows = [write_codes(record, blocks), write_scale_rows(both)]
        return jnp.concatenate(rows, axis=2).reshape(-1, record.rows, WORDS)
    own = jnp.dtype(record.scale_dtype)

    def scale_like(values: jax.Array) -> jax.Array:
        values = spread(_bytes(values))
        return lax.bitcast_convert_type(values, own) if own.itemsize == 1 else values

    scales = scale_like(parts.scale)
    rows = [write_codes(record, fold_signs(record, blocks, scales)), write_scale_rows(scales)]
    if record.offset:
        assert parts.zero is not None
        rows.append(write_scale_rows(scale_like(parts.zero)))
    elif parts.zero is not None:
        rows.append(write_scale_rows(spread(parts.zero).astype(jnp.uint16) | ZERO_BITS))
    for level in (parts.super_scale, parts.super_zero):
        if level is not None:
            rows.append(write_row_values(wide(level)[..., 0]))
    return jnp.concatenate(rows, axis=2).reshape(-1, record.rows, WORDS)


def unpack(weight: Prepacked) -> Plain:
    """Return exactly what was given to `prepack`."""
    restore = functools.partial(_unpack, weight)
    for _ in weight.records.shape[:-3]:
        restore = jax.vmap(restore)
    plain = restore(weight.records)
    if weight.factor is None:
        return plain
    step = weight.factor_block if weight.factor_block < weight.n else 1
    factor = weight.factor[..., ::step, None].astype(weight.given_dtype)
    if weight.offset is not None:
        offset = weight.offset[..., None].astype(weight.given_dtype)
        return plain._replace(scales=factor, zeros=offset)
    return plain._replace(scales=(*as_tuple(plain.scales), factor))


def _unpack(weight: Prepacked, records: jax.Array) -> Plain:
    record, n, k = weight.record, weight.n, weight.k
    records = records.reshape(n // CHANNELS, -1, record.rows, records.shape[-1])

    def gather(values: jax.Array) -> jax.Array:  # [n/64, k/128, 64, groups] -> [rows, groups]
        values = values.swapaxes(1, 2).reshape(n, -1)[:: weight.block]
        step = cdiv(weight.group, record.group)
        return values[:, : cdiv(k, record.group) : step]

    def wide(which: int) -> jax.Array:  # super-scales [n, k/256]
        return read_super(record, records, which).swapaxes(1, 2).reshape(n, -1)[:, ::2]

    codes = read_codes(record, records)
    scales = read_scales(record, records) if record.scale_bits else None
    codes = codes if scales is None else fold_signs(record, codes, scales)
    codes = codes.swapaxes(1, 2).reshape(n, -1)[:, :k]
    if scales is None:
        return Plain(split_planes(codes, record.code), (), None)
    zeros = gather(read_zeros(record, records)) if record.zero or record.zero_rows else None
    if not record.product:
        return Plain(split_planes(codes, record.code), gather(scales), zeros)
    if zeros is not None:
        zeros = (zeros, wide(1))
    return Plain(split_planes(codes, record.code), (gather(scales), wide(0)), zeros)


def store_zeros(weight: Prepacked) -> Prepacked | None:
    """Return a weight of 4-bit codes with the zero points stored that it implies, 8 everywhere.

    Codes, scales and values stay; `drop_zeros` is the exact inverse.  None for a weight of another
    build, also for one whose zero points are stored.
    """
    record = weight.record
    plain = record.code == "uint4" and record.operand == 16 and record.scale_bits in (16, 32)
    more = record.zero or record.offset or record.product or weight.factor is not None
    if not plain or more:
        return None
    record = dataclasses.replace(record, zero=True)
    lead = weight.records.shape[:-2]
    zeros = jnp.full((*lead, CHANNELS, record.groups), weight.record.excess, jnp.uint16)
    rows = write_scale_rows(zeros | ZERO_BITS)
    records = jnp.concatenate([weight.records, rows], axis=-2)
    return dataclasses.replace(weight, records=records, record=record)


def drop_zeros(weight: Prepacked) -> Prepacked:
    """Exact inverse of `store_zeros`."""
    record = dataclasses.replace(weight.record, zero=False)
    records = weight.records[..., : record.rows, :]
    return dataclasses.replace(weight, records=records, record=record)


def factor_name(weight: Prepacked) -> str:
    """Return how the factors of a weight run: "", "one" or "n"."""
    if weight.factor is None:
        return ""
    return "n" if weight.factor.shape[-1] == weight.n else "one"
