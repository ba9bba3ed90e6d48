"""The record: how weights lie in memory for the kernels that decode them in registers.

A `Record` is all that is needed to use 64 output channels by 128 values of k, stored contiguously,
so that one TMA copy brings it.  It has

  * the codes, in the order of the wgmma fragment: a thread's words lie so that it reads them with
    conflict-free 16 byte loads and unpacks them in registers without any shuffle;
  * scale rows for every group along k: a scale per channel, of 16 or 32 bits, or of 8 bits with two
    groups in a row;
  * a zero point row for every group, if there are zero points: 128 + zero in bf16, which is what
    the unpacking subtracts; or offset rows of the scales' build; for 8-bit operands with integer
    scales, one row of both, a byte each;
  * a row of float16 super-scales, if scales are products (and one for the offsets).

This module has the format and its reading and writing in jax.numpy; `decode` reads it in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHANNELS = 64  # output channels of a record: the rows of a wgmma
DEPTH = 128  # values of k in a record
WORDS = 32  # 32 bit words in a row of a record

# Zero points are stored as the bf16 number 128 + zero: these bits, with the zero at the low end.
ZERO_BITS = 0x4300

E2M1 = "float4_e2m1fn"
E4M3 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"


class CodeKind(NamedTuple):
    """Where the bits of a code lie.

    Attributes:
        planes: bits of each plane of a code, low plane first.
        excess: what a code without zero point and offset exceeds its value by.
    """

    planes: tuple[int, ...]
    excess: int = 0


CODES: dict[str, CodeKind] = {
    "uint4": CodeKind((4,), 8),
    "uint5": CodeKind((4, 1), 16),
    "uint6": CodeKind((4, 2), 32),
    "int8": CodeKind((8,)),
    E2M1: CodeKind((4,)),
    E4M3: CodeKind((8,)),
}

# Where a 16 bit half of a word holds the bits (mantissa, exponent low, exponent high, sign) of its
# four e2m1 codes.  Shifted by a multiple of 3, the mantissa and exponent of a code come to bits 6,
# 7 and 8, their place in a bf16 number; of two codes the sign arrives at bit 15 by the same shift.
E2M1_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 14), (9, 10, 11, 13))

# By how much a word of four 8-bit scales is rotated left, so that the scales of the even group have
# their exponent where bf16 has it.
ROTATION = {E4M3: 4, E8M0: 7, "uint8": 0, "int8": 0}


@dataclasses.dataclass(frozen=True)
class Record:
    """The format of one record.

    Attributes:
        code: a key of `CODES`: "uint4" to "uint6", "int8", "float8_e4m3fn" or "float4_e2m1fn".
        operand: bits of the wgmma operand that codes become: 16 (bf16, f16) or 8 (int8, e4m3).
        group: values of k that share a scale: 32, 64 or 128; 16 or 32 with 8-bit scales.
        scale_dtype: "bfloat16", "float16" or "float32", or with 8 bits "float8_e4m3fn",
            "float8_e8m0fnu", "uint8" (up to 127) or "int8"; "" where no scales are stored, since
            one for each channel multiplies the result.
        zero: whether zero points are stored.
        offset: whether a value is code * scale - offset; offsets are stored as scales are.
        product: whether every scale (and offset) is multiplied by a float16 super-scale, one per
            channel for the record.

    Without zero points and offsets the unsigned code u stands for u - 2**(bits - 1).
    """

    code: str
    operand: int
    group: int
    scale_dtype: str
    zero: bool
    offset: bool = False
    product: bool = False

    @property
    def fields(self) -> tuple[int, int, int]:
        """Words of a thread, and (far, near) extents of the k values in one word.

        Thread 4 r + t of warp w holds channels 16 w + 8 half + r.  A word holds both halves and
        the values k = (word, far, t, near), slow to fast.
        """
        if CODES[self.code].planes[0] == 8:
            return 16, 1, 2
        return (8, 2, 2) if self.operand == 16 else (8, 1, 4)

    @property
    def shifts(self) -> jax.Array:
        """Bit positions of the codes of a word, [half, far, near] uint32."""
        _, far, near = self.fields
        width = CODES[self.code].planes[0]
        shape = (2, far, near)
        # Made of iotas, since a kernel body cannot capture an array.
        half, outer, inner = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(3))
        return width * (half + 2 * outer) + 32 // near * inner

    @property
    def excess(self) -> int:
        """What codes exceed their values by, where no zero point says it."""
        return 0 if self.zero or self.offset else CODES[self.code].excess

    @property
    def plane_rows(self) -> tuple[int, ...]:
        """Rows of each plane of the codes."""
        return tuple(CHANNELS * DEPTH * bits // 32 // WORDS for bits in CODES[self.code].planes)

    @property
    def code_rows(self) -> int:
        """Rows that hold codes."""
        return sum(self.plane_rows)

    @property
    def groups(self) -> int:
        """Scale groups along k."""
        return DEPTH // self.group

    @property
    def scale_bits(self) -> int:
        """Width of a scale; 0 if none are stored."""
        return 8 * jnp.dtype(self.scale_dtype).itemsize if self.scale_dtype else 0

    @property
    def progressive(self) -> bool:
        """Whether codes become 8-bit operands by their zero point and an integer scale."""
        return self.operand == 8 and self.scale_bits == 8

    @property
    def scale_rows(self) -> int:
        """Rows that hold the scales of all groups; progressive ones lie beside zero points."""
        return 1 if self.progressive else self.groups * self.scale_bits // 16

    @property
    def zero_rows(self) -> int:
        """Rows that hold the zero points or offsets of all groups."""
        if self.progressive:
            return 0
        return self.scale_rows if self.offset else self.groups * self.zero

    @property
    def super_rows(self) -> int:
        """Rows that hold super-scales."""
        return self.product * (1 + self.offset)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.code_rows + self.scale_rows + self.zero_rows + self.super_rows

    @property
    def rounded(self) -> bool:
        """Whether scales can only be applied to the operand, rounding it to the operand type.

        Then one sum runs over all of k, and so it does where no scales are stored.
        """
        return self.scale_bits in (0, 8) or self.offset

    @property
    def unit(self) -> float:
        """What one of a decoded operand with rounded scales counts.

        Other than 1 for e2m1, so that its scales, which also lift the codes from the subnormal
        numbers, stay finite: e4m3 scales in any case, e8m0 scales up to 2**33.
        """
        return {E4M3: 2.0**9, E8M0: 2.0**32}.get(self.scale_dtype, 1.0) if self.is_e2m1 else 1.0

    @property
    def is_e2m1(self) -> bool:
        """Whether codes are 4-bit floats."""
        return self.code == E2M1


def _plane_shape(record: Record, plane: int) -> tuple[int, ...]:
    """Shape of a high plane's words: (span, warp, r, t, word of a thread in a span)."""
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
        codes = codes | _read_high(record, all_words[..., first:, :]) << 4
    codes = codes.transpose(0, 2, 6, 3, 1, 5, 7, 4, 8)
    return codes.reshape(*lead, CHANNELS, DEPTH).astype(jnp.uint8)


def write_codes(record: Record, codes: jax.Array) -> jax.Array:
    """Return the code rows [..., code_rows, 32] int32 of codes [..., 64, 128] uint8."""
    lead = codes.shape[:-2]
    count, far, near = record.fields
    fields = codes.reshape(-1, 4, 2, 8, count // 4, 4, far, 4, near).astype(jnp.uint32)
    fields = fields.transpose(0, 4, 1, 3, 7, 5, 2, 6, 8)
    low = fields if CODES[record.code].planes[0] == 8 else fields & 15
    words = (low << record.shifts).sum((-3, -2, -1), dtype=jnp.uint32)
    words = _permuted(words, inverse=False) if record.is_e2m1 else words
    rows = [words.reshape(*lead, record.plane_rows[0], WORDS)]
    if len(record.plane_rows) > 1:
        rows.append(_write_high(record, fields >> 4).reshape(*lead, record.plane_rows[1], WORDS))
    return lax.bitcast_convert_type(jnp.concatenate(rows, -2), jnp.int32)


def _high_shifts(record: Record) -> tuple[tuple[int, ...], jax.Array]:
    """Fields and bit positions of a high plane's word, [low word, half, far, near].

    The four low words of a span share the words of its high plane; each 16 bit half holds the codes
    of one `near` in the order (low word, far, half), so that both halves are shifted alike.
    """
    width = CODES[record.code].planes[1]
    shape = (2 * 2 // width, 2, 2, 2)
    low, half, far, near = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(4))
    return shape, width * (4 * low + 2 * far + half) + 16 * near


def _read_high(record: Record, words: jax.Array) -> jax.Array:
    """Return the high bits as [n, word / 4, warp, r, t, word % 4, half, far, near]."""
    shape, shifts = _high_shifts(record)
    words = words.reshape(-1, *_plane_shape(record, 1))
    high = words[..., None, None, None, None] >> shifts
    high = high & ((1 << CODES[record.code].planes[1]) - 1)
    return high.reshape(*words.shape[:-1], 4, *shape[1:])


def _write_high(record: Record, fields: jax.Array) -> jax.Array:
    """Return the words of the high bits, given as `_read_high` returns them."""
    shape, shifts = _high_shifts(record)
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
