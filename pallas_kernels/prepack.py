"""Prepacking: from plain codes and scales to records, and back, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import KernelError
from pallas_kernels.record import (
    CHANNELS,
    DEPTH,
    ZERO_BITS,
    Record,
    read_codes,
    read_scales,
    read_zeros,
    write_codes,
    write_row_values,
)
from pallas_kernels.tiles import cdiv

_SCALE_DTYPES = ("bfloat16", "float16", "float32")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepacked:
    """A weight in the order in which the kernels of this package read it.

    A pytree with one array, so it can be stacked, scanned over, donated and sharded along its
    leading dimensions.  It has no other structural operations: slice and transpose before packing.

    Attributes:
        records: [*lead, n/64 * ceil(k/128), rows, 32] int32, records of one channel block together.
        n, k: output channels and contracted extent, in elements.
        group: values of k that share a scale, as given to `prepack`; k for whole rows.
        block: channels that share a scale, as given to `prepack`.
        record: format of the records.
    """

    records: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    record: Record = dataclasses.field(metadata={"static": True})


class Plain(NamedTuple):
    """A weight as `prepack` takes it and `unpack` returns it.

    Attributes:
        codes: [*lead, n, k/2] uint8 (4-bit codes, the even k in the low nibble), or
            [*lead, n, k] int8 or float8_e4m3fn.
        scales: [*lead, ceil(n/block), ceil(k/group)].
        zeros: of the scales' shape, uint8, or None.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None


def _check(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    n: int,
    k: int,
    group: int,
    block: int,
    operand: int,
) -> None:
    def refuse(found: str, rule: str) -> None:
        raise KernelError(f"prepack: {found}; {rule}")

    if str(codes.dtype) not in ("uint8", "int8", "float8_e4m3fn"):
        refuse(
            f"codes are {codes.dtype}", "take uint8 (pairs of 4-bit codes), int8 or float8_e4m3fn"
        )
    if n % CHANNELS or k % 64 or not n or not k:
        refuse(f"the weight is {n} x {k}", "n and k must be multiples of 64; pad them first")
    if group not in (32, 64) and group % DEPTH and group < k:
        refuse(f"group {group}", "groups of 32, 64, multiples of 128 and whole rows are packed")
    if str(scales.dtype) not in _SCALE_DTYPES:
        refuse(f"scales are {scales.dtype}", f"take {', '.join(_SCALE_DTYPES)}")
    expected = (*codes.shape[:-2], cdiv(n, block), cdiv(k, group))
    if scales.shape != expected:
        refuse(
            f"scales {scales.shape}",
            f"codes {codes.shape}, group {group} and block {block} need {expected}",
        )
    if operand not in (8, 16) or (operand == 8 and codes.dtype != jnp.uint8):
        refuse(f"{operand}-bit operand of {codes.dtype} codes", "16, or 8 for 4-bit codes")
    if zeros is None:
        return
    if codes.dtype != jnp.uint8:
        refuse(f"zero points with {codes.dtype} codes", "only 4-bit codes have zero points")
    if zeros.shape != expected or zeros.dtype != jnp.uint8:
        refuse(f"zeros {zeros.shape} {zeros.dtype}", f"need {expected} uint8")


def prepack(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    group: int | None = None,
    block: int = 1,
    operand: int = 16,
) -> Prepacked:
    """Bring a weight into the order of the kernels; a pure and invertible transform.

    It runs under `jax.jit` (donate the arguments, and the weight is never in memory twice) and on
    any device.  A 4-bit code means `(code - zero) * scale`; without zero points zero is 8.

    Args:
        codes: [*lead, n, k/2] uint8 pairs of 4-bit codes, the even k in the low nibble, or
            [*lead, n, k] int8 or float8_e4m3fn.  n and k are multiples of 64.
        scales: [*lead, ceil(n/block), ceil(k/group)] bf16, f16 or f32.
        zeros: zero points 0 .. 15 of the scales' shape, uint8; only for 4-bit codes.
        group: values of k that share a scale: 32, 64, a multiple of 128, or None for all.
        block: channels that share a scale.
        operand: bits of the matmul operand that the codes will become: 16 for `matmul_a16`,
            8 for `matmul_w4a8`.

    Raises:
        KernelError: a shape, dtype or group that the format does not have.
    """
    *lead, n, k = codes.shape
    k = 2 * k if codes.dtype == jnp.uint8 else k
    group = k if group is None else group
    _check(codes, scales, zeros, n, k, group, block, operand)
    code = "uint4" if codes.dtype == jnp.uint8 else str(codes.dtype)
    small = group if group in (32, 64) else DEPTH
    record = Record(code, operand, small, str(scales.dtype), zeros is not None)
    pack = functools.partial(_pack, record, n, k, group, block)
    for _ in lead:
        pack = jax.vmap(pack)
    return Prepacked(pack(codes, scales, zeros), n, k, group, block, record)


def _per_record(values: jax.Array, n: int, k: int, group: int, block: int, small: int) -> jax.Array:
    """Spread values [ceil(n/block), ceil(k/group)] to [n/64, ceil(k/128), groups, 64]."""
    depth = cdiv(k, DEPTH) * DEPTH
    values = jnp.repeat(values, block, axis=0)[:n]
    values = jnp.repeat(values, cdiv(group, small), axis=1)[:, : cdiv(k, small)]
    values = jnp.pad(values, ((0, 0), (0, depth // small - values.shape[1])))
    values = values.reshape(n // CHANNELS, CHANNELS, depth // DEPTH, DEPTH // small)
    return values.transpose(0, 2, 3, 1)


def _pack(
    record: Record,
    n: int,
    k: int,
    group: int,
    block: int,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
) -> jax.Array:
    """Return the records [n/64 * ceil(k/128), rows, 32] of one weight."""
    depth = cdiv(k, DEPTH) * DEPTH
    if record.code == "uint4":
        codes = jnp.stack([codes & 15, codes >> 4], -1).reshape(n, k)
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
    codes = jnp.pad(codes, ((0, 0), (0, depth - k)))
    blocks = codes.reshape(n // CHANNELS, CHANNELS, depth // DEPTH, DEPTH).swapaxes(1, 2)
    spread = functools.partial(_per_record, n=n, k=k, group=group, block=block, small=record.group)
    rows = [write_codes(record, blocks)]
    scale_rows = write_row_values(spread(scales))
    rows.append(scale_rows.reshape(*blocks.shape[:2], -1, scale_rows.shape[-1]))
    if zeros is not None:
        bits = spread(zeros).astype(jnp.uint16) | ZERO_BITS
        rows.append(write_row_values(bits)[..., 0, :])
    return jnp.concatenate(rows, axis=2).reshape(-1, record.rows, rows[0].shape[-1])


def unpack(weight: Prepacked) -> Plain:
    """Return exactly what was given to `prepack`."""
    restore = functools.partial(_unpack, weight)
    for _ in weight.records.shape[:-3]:
        restore = jax.vmap(restore)
    return restore(weight.records)


def _unpack(weight: Prepacked, records: jax.Array) -> Plain:
    record, n, k = weight.record, weight.n, weight.k
    records = records.reshape(n // CHANNELS, -1, record.rows, records.shape[-1])

    def gather(values: jax.Array) -> jax.Array:  # [n/64, k/128, 64, groups] -> [rows, groups]
        values = values.swapaxes(1, 2).reshape(n, -1)[:: weight.block]
        step = cdiv(weight.group, record.group)
        return values[:, : cdiv(k, record.group) : step]

    codes = read_codes(record, records).swapaxes(1, 2).reshape(n, -1)[:, :k]
    if record.code == "uint4":
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    else:
        codes = lax.bitcast_convert_type(codes, jnp.dtype(record.code))
    zeros = gather(read_zeros(record, records)) if record.zero else None
    return Plain(codes, gather(read_scales(record, records)), zeros)
