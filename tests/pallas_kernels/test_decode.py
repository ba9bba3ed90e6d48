"""The register arithmetic of the decoders, emulated in NumPy, against the values of a record.

The interpreter decodes with jax.numpy; here the very functions that emit instructions run, over
words in place of registers, for every code of a record.
"""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from a16_cases import FORMATS, Q5_K, TWO_LEVEL, Case

from pallas_kernels import decode_codes, decode_scales
from pallas_kernels.record import E4M3
from pallas_kernels.record_rows import read_scales, read_super, read_zeros
from pallas_kernels.record_values import code_values, values


class Float:
    """A 16-bit float type: how to round float64 to it, and to read it from bits."""

    def __init__(self, name: str):
        self.bf16 = name == "bfloat16"
        self.bits = (8, -133) if self.bf16 else (11, -24)

    def round(self, x: np.ndarray) -> np.ndarray:
        digits, least = self.bits
        unit = 2.0 ** np.maximum(np.frexp(x)[1] - digits, least)
        return np.rint(x / unit) * unit

    def read(self, halves: np.ndarray) -> np.ndarray:
        if self.bf16:
            return (halves << 16).astype(np.uint32).view(np.float32).astype(np.float64)
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)


class Pair(types.SimpleNamespace):
    """Two floats a thread: values [2, ...] float64 of a type."""


# Types of the functions under test are those of MLIR.
CODES: Any = decode_codes
SCALES: Any = decode_scales


def rounded(kind: Float, x: np.ndarray) -> Pair:
    return Pair(kind=kind, values=kind.round(x))


def fused(pair: Pair, factor: Pair, addend: Pair | None) -> Pair:
    # Exact in float64: 16 bits of a product, and an addend of at most 24 binary places more.
    return rounded(
        pair.kind, pair.values * factor.values + (0 if addend is None else addend.values)
    )


class Words:
    """What `registers.Bits` offers, over arrays of words."""

    def const(self, bits):
        return np.uint64(bits)

    mask = const

    def right(self, x, bits):
        return x >> np.uint64(bits)

    def left(self, x, bits):
        return x << np.uint64(bits) & np.uint64(0xFFFFFFFF)

    def rotate_left(self, x, bits):
        return self.left(x, bits % 32) | self.right(x, -bits % 32) if bits % 32 else x

    def splat16(self, x, half):
        part = x >> np.uint64(16 * half) & np.uint64(0xFFFF)
        return part | part << np.uint64(16)

    def as_vector(self, x, kind):
        x = np.asarray(x, np.uint64)
        return Pair(
            kind=kind, values=kind.read(np.stack([x & np.uint64(0xFFFF), x >> np.uint64(16)]))
        )

    def pick(self, x, mask, other=0):
        return x & np.uint64(mask) | np.uint64(other)

    def select(self, mask, x, other):
        return x & np.uint64(mask) | other & np.uint64(~mask & 0xFFFFFFFF)


def shuffle(pair, _, index):
    return Pair(kind=pair.kind, values=pair.values[np.array(index)])


def constants(kind, low, high):
    made = rounded(kind, np.array([low, high], np.float64).reshape(2, 1, 1, 1))
    np.testing.assert_array_equal(made.values.ravel(), [low, high])  # must be exact
    return made


@pytest.fixture
def emulated(monkeypatch):
    """Have decoders compute with arrays."""
    arith = types.SimpleNamespace(
        andi=lambda x, y: x & y,
        ori=lambda x, y: x | y,
        xori=lambda x, y: x ^ y,
        muli=lambda x, y: x * y & np.uint64(0xFFFFFFFF),
        mulf=lambda x, y: fused(x, y, None),
        subf=lambda x, y: rounded(x.kind, x.values - y.values),
        negf=lambda x: rounded(x.kind, -x.values),
    )
    llvm = types.SimpleNamespace(intr_fma=fused)
    vector = types.SimpleNamespace(shuffle=shuffle)
    for module in (decode_codes, decode_scales):
        monkeypatch.setattr(module, "arith", arith)
        monkeypatch.setattr(module, "vector", vector)
        monkeypatch.setattr(module, "splat", lambda kind, value: constants(kind, value, value))
        monkeypatch.setattr(module, "is_bf16", lambda kind: kind.bf16)
    monkeypatch.setattr(decode_codes, "llvm", llvm)
    monkeypatch.setattr(decode_scales, "constants", constants)
    monkeypatch.setattr(decode_scales, "_converted", lambda pair, kind: rounded(kind, pair.values))
    f16 = types.SimpleNamespace(get=lambda: Float("float16"))
    bf16 = types.SimpleNamespace(get=lambda: Float("bfloat16"))
    ir = types.SimpleNamespace(F16Type=f16, BF16Type=bf16)
    monkeypatch.setattr(decode_scales, "ir", ir)


def row_words(words: np.ndarray, row: int) -> np.ndarray:
    """Return the word of each thread [warp, r, t] in a row of scales."""
    return np.broadcast_to(words[row].reshape(4, 8, 1), (4, 8, 4)).astype(np.uint64)


def decoded(record, words: np.ndarray, scaled: bool, kind: Float) -> np.ndarray:
    """Return the operands [64, 128] in codes, by the functions that emit instructions."""
    bits, (count, far_extent, near_extent) = Words(), record.fields
    first, *more = record.plane_rows
    low = words[:first].reshape(count // 4, 4, 8, 4, 4).astype(np.uint64)
    high = words[first : first + sum(more)].reshape(2, 4, 8, 4, -1).astype(np.uint64)
    at = record.code_rows
    scales = [row_words(words, at + i) for i in range(record.scale_rows)]
    at += record.scale_rows
    zeros = [row_words(words, at + i) for i in range(record.zero_rows)]
    tops = [row_words(words, at + record.zero_rows + i) for i in range(record.super_rows)]
    result = np.zeros((4, 2, 8, count, far_extent, 4, near_extent))
    factors = offsets = None
    if scaled:
        top = tops[0] if tops else None
        factors = SCALES.SpanFactors(bits, record, scales, top, False, kind)
    if record.offset:
        offsets = SCALES.SpanFactors(bits, record, zeros, tops[1], True, kind)
    for word, far, half in np.ndindex(count, far_extent, 2):
        group = word * record.groups // count
        point = zeros[group] if zeros and not record.offset else None
        zero = None
        if record.code not in ("int8", "float8_e4m3fn", "float4_e2m1fn"):
            zero = CODES.zero_operand(bits, record, point, half, kind)
        share = 4 // (high.shape[-1]) if more else 1
        second = high[word // 4, ..., word % 4 // share] if more else None
        given = low[word // 4, ..., word % 4], second, word % share
        pair = CODES.operand_pair(bits, record, given, half, far, zero, kind)
        if factors is not None:
            addend = offsets.spread(group) if offsets else [None, None]
            if record.fused and record.excess and kind.bf16:
                addend = factors.excess(group)
            pair = fused(pair, factors.spread(group)[half], addend[half])
        result[:, half, :, word, far] = np.moveaxis(pair.values, 0, -1)
    return result.reshape(64, 128) * record.unit(jnp.bfloat16 if kind.bf16 else jnp.float16)


def of_case(case: Case):
    """Return the format, the words of one record as NumPy and as JAX arrays."""
    packed = case.pack(case.plain())
    words = packed.records[:1]
    return packed.record, np.asarray(words[0]).view(np.uint32), words


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_codes_alone_are_exact(emulated, case):
    record, words, packed = of_case(case)
    got = decoded(record, words, False, Float(case.x))
    np.testing.assert_array_equal(got, np.asarray(code_values(record, packed))[0])


@pytest.mark.parametrize(
    "case", [case for case in (*FORMATS, *TWO_LEVEL) if case.scale != "float32"], ids=str
)
def test_scaled_codes_are_rounded_once(emulated, case):
    record, words, packed = of_case(case)
    kind = Float(case.x)

    def factors(read, which):
        found = np.asarray(read(record, packed), np.float64)[0]
        if record.product:  # the super-scale is rounded, and so is the product
            top = np.asarray(read_super(record, packed, which), np.float64)[0]
            found = found * kind.round(top)[:, None]
        return np.repeat(kind.round(found), record.group, -1)

    want = np.asarray(code_values(record, packed), np.float64)[0] * factors(read_scales, 0)
    want = want - factors(read_zeros, 1) if record.offset else want
    got = decoded(record, words, True, kind)
    if record.is_e2m1 and record.scale_dtype == E4M3:
        want = np.abs(want) * np.sign(np.asarray(values(record, packed))[0])
    np.testing.assert_array_equal(got, kind.round(want))


def test_a_wrong_bit_changes_one_code(emulated):
    record, words, _ = of_case(Q5_K)
    right = decoded(record, words, True, Float("bfloat16"))
    for row in (0, record.plane_rows[0]):
        wrong = words.copy()
        wrong[row, 5] ^= 1
        assert (decoded(record, wrong, True, Float("bfloat16")) != right).sum() == 1
