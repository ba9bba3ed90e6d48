"""Codes: the value alphabets that weights and scales are written in.

A code says how many bits one element has and which number each bit pattern stands for.  Codes of
at most 7 bits are kept packed in ``uint8``, least significant bits first; widths that do not divide
8 are kept as *bit planes* whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1), low plane first, so that every plane has an integer number of elements in a byte.

Signed integer codes of at most 7 bits are stored in excess form, ``stored = value + 2**(bits-1)``:
packed checkpoints (compressed-tensors) and int4 kernels both use that form.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_dtypes
import numpy as np

from jaxquant.errors import LayoutError

E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
IQ4_VALUES = tuple(
    map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
)


@dataclasses.dataclass(frozen=True)
class Code:
    """One value alphabet.

    Attributes:
        name: "int4", "uint4", "e4m3", "bf16" ...
        bits: bits of one element.
        kind: "float" (a native ml_dtypes/NumPy dtype), "int" or "uint" (integers, packed when
            ``bits < 8``) or "table" (packed indices into ``table``).
        dtype: NumPy dtype name of the unpacked stored element.
        table: the value of each index, for ``kind == "table"``.
    """

    name: str
    bits: int
    kind: Literal["float", "int", "uint", "table"]
    dtype: str
    table: tuple[float, ...] = ()

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes in bits, low plane first."""
        if self.bits >= 8:
            return (self.bits,)
        return tuple(1 << i for i in reversed(range(3)) if self.bits >> i & 1)

    @property
    def packed(self) -> bool:
        """Whether elements are narrower than a byte."""
        return self.bits < 8

    @property
    def storage(self) -> np.dtype:
        """NumPy dtype of a data leaf."""
        return (
            np.dtype(np.uint8)
            if self.packed
            else np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        )

    @property
    def bias(self) -> int:
        """By how much the stored unsigned pattern exceeds the value (excess form)."""
        return 1 << (self.bits - 1) if self.kind == "int" and self.packed else 0

    @property
    def zero_pattern(self) -> int:
        """The stored pattern whose value is zero; LayoutError when there is none."""
        if self.kind != "table":
            return self.bias
        if 0.0 not in self.table:
            raise LayoutError(self.name, "no pattern stands for zero", "padding needs one")
        return self.table.index(0.0)

    @property
    def min(self) -> float:
        """Smallest finite value."""
        if self.kind == "table":
            return min(self.table)
        if self.kind == "float":
            return float(ml_dtypes.finfo(self.storage).min)
        return -(1 << (self.bits - 1)) if self.kind == "int" else 0

    @property
    def max(self) -> float:
        """Largest finite value."""
        if self.kind == "table":
            return max(self.table)
        if self.kind == "float":
            return float(ml_dtypes.finfo(self.storage).max)
        return (1 << (self.bits - 1)) - 1 if self.kind == "int" else (1 << self.bits) - 1

    def __repr__(self) -> str:
        return self.name


def _integer(kind: Literal["int", "uint"], bits: int) -> Code:
    return Code(f"{kind}{bits}", bits, kind, "uint8" if bits < 8 else f"{kind}{bits}")


CODES: dict[str, Code] = {
    code.name: code
    for code in (
        Code("f32", 32, "float", "float32"),
        Code("f16", 16, "float", "float16"),
        Code("bf16", 16, "float", "bfloat16"),
        Code("e4m3", 8, "float", "float8_e4m3fn"),
        Code("e5m2", 8, "float", "float8_e5m2"),
        Code("e2m1", 4, "table", "uint8", E2M1_VALUES),
        Code("iq4", 4, "table", "uint8", IQ4_VALUES),
        Code("ternary", 2, "table", "uint8", (-1.0, 0.0, 1.0, 2.0)),
        *(_integer("int", bits) for bits in range(2, 9)),
        *(_integer("uint", bits) for bits in range(1, 9)),
    )
}
DENSE_CODES = ("f32", "f16", "bf16")
