"""Reading and writing the rows of records in jax.numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.record import (
    CHANNELS,
    CODES,
    DEPTH,
    E2M1_BITS,
    ROTATION,
    WORDS,
    ZERO_BITS,
    Record,
)


def _plane_shape(record: Record, plane: int) -> tuple[int, ...]:
    """Shape of a second plane's words: (span, warp, r, t, word of a thread in a span)."""
    words = DEPTH * CHANNELS * CODES[record.code].planes[plane] // 32 // 128
    return 2, 4, 8, 4, words // 2


def _permuted(words: jax.Array, inverse: bool) -> jax.Array:
    """Move the bits of plain nibbles to their places in `E2M1_BITS`, or back."""
    result = jnp.zeros_like(words)
    for pair, places in enumerate(E2M1_BITS):
        for bit, place in enumerate(places):
            plain = 4 * pair + bit
            source, target = (place, plain) if inverse else (plain, place)
            result = result | ((words >> source) & 0x00010001) << target
    return result


def read_codes(record: Record, words: jax.Array) -> jax.Array:
    """Return the codes of records, [..., 64, 128] uint8, from their words [..., rows, 32]."""
    lead = words.shape[:-2]
    count = record.fields[0]
    first = record.plane_rows[0]
    all_words = lax.bitcast_convert_type(words[..., : record.code_rows, :], jnp.uint32)
    words = all_words[..., :first, :]
    words = _permuted(words, inverse=True) if record.is_e2m1 else words
    words = words.reshape(-1, count // 4, 4, 8, 4, 4)  # word / 4, warp, r, t, word % 4
    codes = words[..., None, None, None] >> record.shifts  # ..., half, far, near
    codes = codes & (255 if CODES[record.code].planes[0] == 8 else 15)
    if len(record.plane_rows) > 1:
        width = CODES[record.code].planes[1]
        second = _read_second(record, all_words[..., first:, :])
        codes = _by_half(codes | second << 4, codes << width | second)
    codes = codes.transpose(0, 2, 6, 3, 1, 5, 7, 4, 8)
    return codes.reshape(*lead, CHANNELS, DEPTH).astype(jnp.uint8)


def write_codes(record: Record, codes: jax.Array) -> jax.Array:
    """Return the code rows [..., code_rows, 32] int32 of codes [..., 64, 128] uint8."""
    lead = codes.shape[:-2]
    count, far, near = record.fields
    fields = codes.reshape(-1, 4, 2, 8, count // 4, 4, far, 4, near).astype(jnp.uint32)
    fields = fields.transpose(0, 4, 1, 3, 7, 5, 2, 6, 8)
    if len(record.plane_rows) == 1:
        first, seconds = fields, []
    else:
        width = CODES[record.code].planes[1]
        first = _by_half(fields & 15, fields >> width)
        second = _write_second(record, _by_half(fields >> 4, fields & ((1 << width) - 1)))
        seconds = [second.reshape(*lead, record.plane_rows[1], WORDS)]
    words = (first << record.shifts).sum((-3, -2, -1), dtype=jnp.uint32)
    words = _permuted(words, inverse=False) if record.is_e2m1 else words
    rows = [words.reshape(*lead, record.plane_rows[0], WORDS), *seconds]
    return lax.bitcast_convert_type(jnp.concatenate(rows, -2), jnp.int32)


def _by_half(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Take half 0 of one array and half 1 of another, [..., half, far, near]."""
    half = lax.broadcasted_iota(jnp.int32, even.shape, even.ndim - 3)
    return jnp.where(half == 0, even, odd)


def _second_shifts(record: Record) -> tuple[tuple[int, ...], jax.Array]:
    """Fields and bit positions of a second plane's word, [low word, half, far, near].

    A rotation brings what belongs to a word of the first plane to both its halves: the high bits of
    the codes of half 0 above the first plane's low ones, the low bits of those of half 1 below the
    first plane's high ones.
    """
    width = CODES[record.code].planes[1]
    shape = (2 * 2 // width, 2, 2, 2)
    word, half, far, near = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(4))
    place = jnp.where(half == 0, 4, 4 - width).astype(jnp.uint32) + 8 * far + 16 * near
    return shape, (place + record.rotation * word) % 32


def _read_second(record: Record, words: jax.Array) -> jax.Array:
    """Return the second plane as [n, word / 4, warp, r, t, word % 4, half, far, near]."""
    shape, shifts = _second_shifts(record)
    words = words.reshape(-1, *_plane_shape(record, 1))
    bits = words[..., None, None, None, None] >> shifts
    bits = bits & ((1 << CODES[record.code].planes[1]) - 1)
    return bits.reshape(*words.shape[:-1], 4, *shape[1:])


def _write_second(record: Record, fields: jax.Array) -> jax.Array:
    """Return the words of the second plane, given as `_read_second` returns it."""
    shape, shifts = _second_shifts(record)
    fields = fields.reshape(*fields.shape[:5], -1, *shape)
    return (fields << shifts).sum((-4, -3, -2, -1), dtype=jnp.uint32)


def read_row_values(words: jax.Array, dtype: Any) -> jax.Array:
    """Return one value per channel, [..., 64], from their 1 or 2 rows [..., rows, 32]."""
    lead = words.shape[:-2]
    if words.shape[-2] == 2:
        values = lax.bitcast_convert_type(words, dtype).reshape(*lead, 2, 4, 8)
        return jnp.swapaxes(values, -3, -2).reshape(*lead, CHANNELS)
    values = lax.bitcast_convert_type(words, dtype).reshape(*lead, 4, 8, 2)
    return jnp.swapaxes(values, -2, -1).reshape(*lead, CHANNELS)


def write_row_values(values: jax.Array) -> jax.Array:
    """Return the 1 or 2 rows [..., rows, 32] int32 of 16 or 32 bit values [..., 64]."""
    lead = values.shape[:-1]
    halves = values.reshape(*lead, 4, 2, 8)
    if values.dtype.itemsize == 4:
        halves = jnp.swapaxes(halves, -3, -2).reshape(*lead, 2, WORDS)
        return lax.bitcast_convert_type(halves, jnp.int32)
    pairs = jnp.swapaxes(halves, -2, -1).reshape(*lead, 1, WORDS, 2)
    return lax.bitcast_convert_type(pairs, jnp.int32)


def _rotated(words: jax.Array, bits: int) -> jax.Array:
    words = lax.bitcast_convert_type(words, jnp.uint32)
    words = words if bits % 32 == 0 else (words << bits % 32) | (words >> -bits % 32)
    return lax.bitcast_convert_type(words, jnp.int32)


def write_scale_rows(values: jax.Array) -> jax.Array:
    """Return the rows [..., rows, 32] int32 of scales or offsets [..., 64, groups]."""
    *lead, _, groups = values.shape
    if values.dtype.itemsize > 1:
        rows = write_row_values(jnp.swapaxes(values, -2, -1))
        return rows.reshape(*lead, -1, WORDS)
    name = values.dtype.name
    values = lax.bitcast_convert_type(values, jnp.uint8)
    values = values.reshape(*lead, 4, 2, 8, groups // 2, 2)  # warp, half, r, row, group
    values = jnp.moveaxis(values, (-2, -5, -3, -4), (-5, -4, -3, -2))
    words = lax.bitcast_convert_type(values.reshape(*lead, groups // 2, WORDS, 4), jnp.int32)
    return _rotated(words, ROTATION[name])


def read_scale_rows(words: jax.Array, dtype: Any, groups: int) -> jax.Array:
    """Return the scales or offsets [..., 64, groups] of their rows [..., rows, 32]."""
    *lead, rows, _ = words.shape
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1:
        values = read_row_values(words.reshape(*lead, groups, rows // groups, WORDS), dtype)
        return jnp.swapaxes(values, -2, -1)
    values = lax.bitcast_convert_type(_rotated(words, -ROTATION[dtype.name]), jnp.uint8)
    values = values.reshape(*lead, groups // 2, 4, 8, 2, 2)  # row, warp, r, half, group
    values = jnp.moveaxis(values, (-5, -4, -3, -2), (-2, -5, -3, -4))
    return lax.bitcast_convert_type(values.reshape(*lead, CHANNELS, groups), dtype)


def read_scales(record: Record, words: jax.Array) -> jax.Array:
    """Return the scales of records, [..., 64, groups], from their words [..., rows, 32]."""
    rows = words[..., record.code_rows : record.code_rows + record.scale_rows, :]
    if record.progressive:
        scale = read_scale_rows(rows, jnp.uint8, 2)[..., :1]
        return lax.bitcast_convert_type(scale, jnp.dtype(record.scale_dtype))
    return read_scale_rows(rows, record.scale_dtype, record.groups)


def read_zeros(record: Record, words: jax.Array) -> jax.Array:
    """Return the zero points (uint8) or offsets of records, [..., 64, groups]."""
    start = record.code_rows + record.scale_rows
    if record.progressive:
        return read_scale_rows(words[..., start - 1 : start, :], jnp.uint8, 2)[..., 1:]
    rows = words[..., start : start + record.zero_rows, :]
    if record.offset:
        return read_scale_rows(rows, record.scale_dtype, record.groups)
    return (read_scale_rows(rows, jnp.uint16, record.groups) ^ ZERO_BITS).astype(jnp.uint8)


def read_super(record: Record, words: jax.Array, which: int) -> jax.Array:
    """Return the super-scales of records, [..., 64] float16: of scales (0) or offsets (1)."""
    at = record.rows - record.super_rows + which
    return read_row_values(words[..., at : at + 1, :], jnp.float16)
