"""What the codes, scales and offsets of records stand for, as f32 in jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.record import CHANNELS, E4M3, Record
from pallas_kernels.record_rows import read_codes, read_scales, read_super, read_zeros


def fold_signs(record: Record, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Turn the sign of e2m1 codes [..., k] whose e4m3 scale [..., groups] is negative.

    An involution; so decoding can take the magnitude of a scale, which saves it an instruction.
    """
    if not record.is_e2m1 or record.scale_dtype != E4M3:
        return codes
    sign = lax.bitcast_convert_type(scales, jnp.uint8) >> 7
    return codes ^ jnp.repeat(sign << 3, codes.shape[-1] // scales.shape[-1], -1)


def _e2m1_values(codes: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.int32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    quarters = jnp.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    magnitude = quarters.astype(jnp.float32) / 4
    return jnp.where(codes >> 3 == 1, -magnitude, magnitude)


def code_values(record: Record, words: jax.Array) -> jax.Array:
    """Return the numbers that codes stand for before scaling, [..., 64, 128] f32."""
    codes = read_codes(record, words)
    if record.is_e2m1:
        return _e2m1_values(fold_signs(record, codes, read_scales(record, words)))
    if record.code in (E4M3, "int8"):
        return lax.bitcast_convert_type(codes, jnp.dtype(record.code)).astype(jnp.float32)
    zero = record.excess
    if record.zero:
        zero = jnp.repeat(read_zeros(record, words).astype(jnp.int32), record.group, axis=-1)
    return (codes.astype(jnp.int32) - zero).astype(jnp.float32)


def _products(record: Record, words: jax.Array, values: jax.Array, which: int) -> jax.Array:
    values = values.astype(jnp.float32)
    if record.product:
        values = values * read_super(record, words, which).astype(jnp.float32)[..., None]
    return values


def scale_values(record: Record, words: jax.Array) -> jax.Array:
    """Return the scales [..., 64, groups] f32, super-scales included; ones if none are stored."""
    if not record.scale_bits:
        return jnp.ones((*words.shape[:-2], CHANNELS, record.groups), jnp.float32)
    return _products(record, words, read_scales(record, words), 0)


def offset_values(record: Record, words: jax.Array) -> jax.Array:
    """Return the offsets [..., 64, groups] f32, super-scales included."""
    return _products(record, words, read_zeros(record, words), 1)


def values(record: Record, words: jax.Array) -> jax.Array:
    """Return the weights [..., 64, 128] f32 of records, from their words [..., rows, 32]."""
    result = code_values(record, words) * jnp.repeat(scale_values(record, words), record.group, -1)
    if record.offset and record.zero_rows:
        result = result - jnp.repeat(offset_values(record, words), record.group, -1)
    return result
