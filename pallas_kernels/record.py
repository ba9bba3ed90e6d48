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

This module has the format; `record_rows` reads and writes it in jax.numpy, `decode` in registers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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
        """Bit positions of the first plane in a word, [half, far, near] uint32."""
        _, far, near = self.fields
        width = CODES[self.code].planes[0]
        shape = (2, far, near)
        # Made of iotas, since a kernel body cannot capture an array.
        half, outer, inner = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(3))
        return width * (half + 2 * outer) + 32 // near * inner

    def place(self, half: int) -> int:
        """Return by how much codes of a half lie left of the low end of the byte that holds them.

        Only for codes of less than 8 bits and 16-bit operands.
        """
        return half * (4 - sum(CODES[self.code].planes[1:]))

    @property
    def rotation(self) -> int:
        """Bits by which a word of the second plane is rotated right from one low word to the next.

        Of codes of two planes, half 0 has its low 4 bits in the first plane, half 1 its high 4; so
        a 16 bit half of a word holds both, next to their other bits, in bits 0 .. 7.
        """
        return 2 * CODES[self.code].planes[-1]

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
    def fused(self) -> bool:
        """Whether one multiply-add of 16-bit floats can scale an unsigned code and offset it.

        A zero point times its scale would have to be rounded first; the excess, a power of two,
        need not be.
        """
        return self.product and not self.zero and self.code in ("uint4", "uint5", "uint6")

    def unit(self, dtype: jax.typing.DTypeLike) -> float:
        """Return what one of a decoded 16-bit operand counts.

        Codes lie in the subnormal numbers at first, from which a multiplication lifts them.  It
        lifts e2m1 codes together with their scale, and so that scales stay finite: e4m3 ones in any
        case, e8m0 ones up to 2**33.  In bf16 it lifts integer codes too, alone by all that one
        multiplication can, or with a product of scales, which then is finite in any case.
        """
        if self.is_e2m1:
            return {E4M3: 2.0**9, E8M0: 2.0**32}.get(self.scale_dtype, 1.0)
        if self.operand == 8 or self.code == E4M3 or dtype != jnp.bfloat16:
            return 1.0
        return 2.0**32 if self.fused else 2.0**6

    @property
    def is_e2m1(self) -> bool:
        """Whether codes are 4-bit floats."""
        return self.code == E2M1
