"""The record: how weights lie in memory for the kernels that decode them in registers.

A `Record` is all that is needed to use 64 output channels by 128 values of k, stored contiguously,
so that one TMA copy brings it.  It has

  * the codes, in the order of the wgmma fragment: a thread's words lie so that it reads them with
    conflict-free 16 byte loads and unpacks them in registers without any shuffle;
  * scale rows for every group along k: one 16 or 32 bit scale per channel;
  * a zero point row for every group, if there are zero points: 128 + zero in bf16, which is what
    the unpacking subtracts.

This module has the format and its reading and writing in jax.numpy; `decode` reads it in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHANNELS = 64  # output channels of a record: the rows of a wgmma
DEPTH = 128  # values of k in a record
WORDS = 32  # 32 bit words in a row of a record

# Zero points are stored as the bf16 number 128 + zero: these bits, with the zero at the low end.
ZERO_BITS = 0x4300


@dataclasses.dataclass(frozen=True)
class Record:
    """The format of one record.

    Attributes:
        code: "uint4", "int8" or "float8_e4m3fn".
        operand: bits of the wgmma operand that codes become: 16 (bf16, f16) or 8 (int8, e4m3).
        group: values of k that share a scale: 32, 64 or 128.
        scale_dtype: "bfloat16", "float16" or "float32".
        zero: whether zero points are stored; without them the uint4 code u stands for u - 8.
    """

    code: str
    operand: int
    group: int
    scale_dtype: str
    zero: bool

    @property
    def fields(self) -> tuple[int, int, int]:
        """Words of a thread, and (far, near) extents of the k values in one word.

        Thread 4 r + t of warp w holds channels 16 w + 8 half + r.  A word holds both halves and
        the values k = (word, far, t, near), slow to fast.
        """
        if self.code != "uint4":
            return 16, 1, 2
        return (8, 2, 2) if self.operand == 16 else (8, 1, 4)

    @property
    def shifts(self) -> jax.Array:
        """Bit positions of the codes of a word, [half, far, near] uint32."""
        _, far, near = self.fields
        width = 4 if self.code == "uint4" else 8
        shape = (2, far, near)
        # Made of iotas, since a kernel body cannot capture an array.
        half, outer, inner = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(3))
        return width * (half + 2 * outer) + 32 // near * inner

    @property
    def code_rows(self) -> int:
        """Rows that hold codes."""
        return self.fields[0] * 4

    @property
    def groups(self) -> int:
        """Scale groups along k."""
        return DEPTH // self.group

    @property
    def scale_rows(self) -> int:
        """Rows that hold the scales of one group."""
        return 2 if self.scale_dtype == "float32" else 1

    @property
    def rows(self) -> int:
        """All rows."""
        return self.code_rows + self.groups * (self.scale_rows + self.zero)


def read_codes(record: Record, words: jax.Array) -> jax.Array:
    """Return the codes of records, [..., 64, 128] uint8, from their words [..., rows, 32]."""
    lead = words.shape[:-2]
    count = record.fields[0]
    words = lax.bitcast_convert_type(words[..., : record.code_rows, :], jnp.uint32)
    words = words.reshape(-1, count // 4, 4, 8, 4, 4)  # word / 4, warp, r, t, word % 4
    codes = words[..., None, None, None] >> record.shifts  # ..., half, far, near
    codes = codes & (15 if record.code == "uint4" else 255)
    codes = codes.transpose(0, 2, 6, 3, 1, 5, 7, 4, 8)
    return codes.reshape(*lead, CHANNELS, DEPTH).astype(jnp.uint8)


def write_codes(record: Record, codes: jax.Array) -> jax.Array:
    """Return the code rows [..., code_rows, 32] int32 of codes [..., 64, 128] uint8."""
    lead = codes.shape[:-2]
    count, far, near = record.fields
    fields = codes.reshape(-1, 4, 2, 8, count // 4, 4, far, 4, near).astype(jnp.uint32)
    fields = fields.transpose(0, 4, 1, 3, 7, 5, 2, 6, 8) << record.shifts
    words = fields.sum((-3, -2, -1), dtype=jnp.uint32)
    words = lax.bitcast_convert_type(words, jnp.int32)
    return words.reshape(*lead, record.code_rows, WORDS)


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


def _scale_slice(record: Record, group: int) -> slice:
    start = record.code_rows + group * record.scale_rows
    return slice(start, start + record.scale_rows)


def read_scales(record: Record, words: jax.Array) -> jax.Array:
    """Return the scales of records, [..., 64, groups], from their words [..., rows, 32]."""
    dtype = jnp.dtype(record.scale_dtype)
    rows = [words[..., _scale_slice(record, group), :] for group in range(record.groups)]
    return jnp.stack([read_row_values(row, dtype) for row in rows], -1)


def read_zeros(record: Record, words: jax.Array) -> jax.Array:
    """Return the zero points of records, [..., 64, groups] uint8, from words [..., rows, 32]."""
    start = record.code_rows + record.groups * record.scale_rows
    rows = [words[..., start + group : start + group + 1, :] for group in range(record.groups)]
    bits = jnp.stack([read_row_values(row, jnp.uint16) for row in rows], -1)
    return (bits ^ ZERO_BITS).astype(jnp.uint8)


def code_values(record: Record, codes: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """Return the numbers that codes [..., 64, 128] stand for before scaling, as f32."""
    if record.code == "float8_e4m3fn":
        return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    if record.code == "int8":
        return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
    zero = 8 if zeros is None else jnp.repeat(zeros.astype(jnp.int32), record.group, axis=-1)
    return (codes.astype(jnp.int32) - zero).astype(jnp.float32)
