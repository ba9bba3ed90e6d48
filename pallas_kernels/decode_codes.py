"""From the words of codes to wgmma operands, in registers."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.record import CODES, E2M1, E2M1_BITS, E4M3, Record
from pallas_kernels.registers import Bits, splat

# By how many powers of two a decoded pair is too small: e2m1 codes stay subnormal numbers, and the
# scale that multiplies them lifts them.
LIFT = {"bf16": 126, "f16": 14}

# A bf16 number with nothing but an integer below 256 in its low bits is that times 2**-133: from
# 128 on it is no subnormal number any more, but its last place counts the same.
BYTE = 133


def is_bf16(element: ir.Type) -> bool:
    """Return whether an element type is bf16 (else it is f16)."""
    return element == ir.BF16Type.get()


def fused(pair: ir.Value, factor: ir.Value, addend: ir.Value | None) -> ir.Value:
    """Return pair * factor + addend, rounded once."""
    return arith.mulf(pair, factor) if addend is None else llvm.intr_fma(pair, factor, addend)


def _unsigned_to_pairs(
    bits: Bits,
    record: Record,
    words: tuple[ir.Value, ir.Value | None, int],
    half: int,
    far: int,
    zero: ir.Value | None,
    element: ir.Type,
) -> ir.Value:
    joined, second, index = words
    if second is not None:
        moved = bits.rotate_left(second, -record.rotation * index)
        joined = bits.select(0xF0F0F0F0 if half else 0x0F0F0F0F, joined, moved)
    width, place = sum(CODES[record.code].planes), record.place(half)
    mask = 0x00010001 * ((1 << width) - 1)
    if is_bf16(element):
        y = bits.as_vector(bits.pick(bits.right(joined, 8 * far), mask << place), element)
        # Exact: a sum of less than 8 bits.
        return y if record.fused else fused(y, splat(element, 2.0 ** (127 - place)), zero)
    # The code becomes the low end of the mantissa of 1024: exact.
    y = bits.pick(bits.right(joined, 8 * far + place), mask, 0x64006400)
    assert zero is not None
    return arith.subf(bits.as_vector(y, element), zero)


def _e2m1_to_pairs(bits: Bits, word: ir.Value, pair: int, element: ir.Type) -> ir.Value:
    """Place sign, exponent and mantissa; the result is 2**-LIFT of the code's value."""
    mantissa, _, _, sign = E2M1_BITS[pair]
    target = 6 if is_bf16(element) else 9
    body = 0x01C001C0 if is_bf16(element) else 0x0E000E00
    if target - mantissa == 15 - sign:  # one shift places both
        return bits.as_vector(bits.pick(bits.left(word, 15 - sign), body | 0x80008000), element)
    if is_bf16(element) and target > mantissa:
        # A product with two powers of two shifts twice, and the summands have no bit in common.
        kept = bits.pick(word, 0x00010001 * (7 << mantissa | 1 << sign))
        both = arith.muli(kept, bits.mask((1 << target - mantissa) + (1 << 15 - sign)))
        return bits.as_vector(bits.pick(both, body | 0x80008000), element)
    shift = target - mantissa
    moved = bits.left(word, shift) if shift >= 0 else bits.right(word, -shift)
    signed = bits.pick(bits.left(word, 15 - sign), 0x80008000, bits.pick(moved, body))
    return bits.as_vector(signed, element)


def _int8_to_pairs(bits: Bits, word: ir.Value, half: int, element: ir.Type) -> ir.Value:
    y = bits.right(word, 8 * half)
    if is_bf16(element):
        # With its sign bit flipped the code is 128 too large, which the lifted byte can bear.
        biased = arith.xori(arith.andi(y, bits.mask(0x00FF00FF)), bits.const(0x00800080))
        lift = splat(element, 2.0**127)
        return fused(bits.as_vector(biased, element), lift, splat(element, -128 * 2.0**-6))
    biased = arith.xori(arith.andi(y, bits.mask(0x00FF00FF)), bits.const(0x64806480))
    return arith.subf(bits.as_vector(biased, element), splat(element, 1024.0 + 128.0))


def _e4m3_to_pairs(bits: Bits, word: ir.Value, half: int, element: ir.Type) -> ir.Value:
    # Move exponent and mantissa to their places and correct the exponent bias by a product,
    # which also normalises subnormal codes: exact.
    bf16 = is_bf16(element)
    y = word if half else bits.left(word, 8)
    body = bits.right(y, 4 if bf16 else 1)
    body = arith.andi(body, bits.mask(0x07F007F0 if bf16 else 0x3F803F80))
    joined = arith.ori(arith.andi(y, bits.mask(0x80008000)), body)
    bias = splat(element, 2.0**120 if bf16 else 2.0**8)
    return arith.mulf(bits.as_vector(joined, element), bias)


def _uint4_to_int8(bits: Bits, word: ir.Value, half: int, zero: ir.Value | None) -> ir.Value:
    if zero is None:  # 16 (u - 8): the flipped code is the high nibble
        y = word if half else bits.left(word, 4)
        return arith.xori(arith.andi(y, bits.mask(0xF0F0F0F0)), bits.const(0x80808080))
    # 128 + u - zero lies in 113 .. 143, so nothing is borrowed from a neighbour.
    y = arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    y = arith.subi(arith.ori(y, bits.mask(0x80808080)), zero)
    return arith.xori(y, bits.mask(0x80808080))


def _uint4_by_scale(bits: Bits, word: ir.Value, half: int, factor: ir.Value, addend: ir.Value):
    # The four codes are the digits of a number in base 256, and so are the results: digits in
    # 0 .. 255 stand for themselves, whatever was carried on the way to them.
    y = arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    y = arith.addi(arith.muli(y, factor), addend)  # 128 + (u - zero) * scale
    return arith.xori(y, bits.mask(0x80808080))


def _uint4_to_e4m3(bits: Bits, word: ir.Value, half: int, zero: ir.Value | None) -> ir.Value:
    # The e4m3 bytes 0 .. 15 are exactly 0 .. 15 times 2**-9, the least subnormal.
    y = arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    eight = bits.mask(0x08080808) if zero is None else zero
    y = arith.subi(arith.ori(y, bits.mask(0x80808080)), eight)  # 128 + v
    negative = arith.andi(
        bits.right(arith.xori(y, bits.const(0xFFFFFFFF)), 7), bits.mask(0x01010101)
    )
    # v >= 0: clear the top bit.  v < 0: 256 - (128 + v) = sign bit and magnitude.
    flip = arith.addi(arith.muli(negative, bits.const(0x7F)), bits.mask(0x80808080))
    return arith.addi(arith.xori(y, flip), negative)


def operand_pair(
    bits: Bits,
    record: Record,
    words: tuple[ir.Value, ir.Value | None, int],
    half: int,
    far: int,
    zero: Any,
    element: ir.Type,
) -> ir.Value:
    """Decode two codes to a pair of bf16 or f16, in units of `Record.unit`.

    Fused records: to the codes as they lie, times 2**-133.

    Args:
        bits: the arithmetic.
        record: format.
        words: the word of the first plane, that of the second or None, and which of the words
            that share the latter it is.
        half: which half of the fragment, as in `Record.fields`.
        far: which codes of the low word, as in `Record.fields`.
        zero: the pair that `zero_operand` made.
        element: bf16 or f16.
    """
    if record.code == E2M1:
        return _e2m1_to_pairs(bits, words[0], half + 2 * far, element)
    if record.code == E4M3:
        return _e4m3_to_pairs(bits, words[0], half, element)
    if record.code == "int8":
        return _int8_to_pairs(bits, words[0], half, element)
    return _unsigned_to_pairs(bits, record, words, half, far, zero, element)


def progressive_terms(bits: Bits, word: ir.Value, half: int) -> tuple[ir.Value, ir.Value]:
    """Return the int8 scale of a channel and the word that is added to scaled codes.

    A word of the row has the bytes (scale, zero point) of channel r, then those of channel r + 8.
    """
    none = bits.const(0)
    scale = mgpu.prmt(word, none, bits.const(0xAAA2 if half else 0x8880))  # repeats the sign
    zeros = mgpu.prmt(word, none, bits.const(0x3333 if half else 0x1111))
    return scale, arith.subi(bits.const(0x80808080), arith.muli(zeros, scale))


def operand_bytes(
    bits: Bits, record: Record, word: ir.Value, half: int, zero: Any, int8: bool
) -> ir.Value:
    """Decode four uint4 codes to int8 or e4m3.

    Args:
        bits: the arithmetic.
        record: format.
        word: the codes of both halves.
        half: which half of the fragment, as in `Record.fields`.
        zero: what `zero_operand` or, for progressive scales, `progressive_terms` made.
        int8: whether the operand is int8.
    """
    if record.progressive:
        return _uint4_by_scale(bits, word, half, *zero)
    if record.offset:
        return arith.andi(bits.right(word, 4 * half), bits.mask(0x0F0F0F0F))
    return (_uint4_to_int8 if int8 else _uint4_to_e4m3)(bits, word, half, zero)


def zero_operand(
    bits: Bits, record: Record, word: ir.Value | None, half: int, element: ir.Type
) -> ir.Value | None:
    """Return what decoding unsigned codes subtracts (bf16: adds), from a word of the zero points.

    None if nothing: fused records leave it to the addend of the scale.
    """
    if record.operand == 8:
        return word and mgpu.prmt(word, word, bits.const(0x2222 if half else 0))
    if is_bf16(element):
        if record.fused:
            return None
        if word is None:
            return splat(element, -record.excess * 2.0**-6)
        # (128 + zero) / -64 + 2
        pair = bits.as_vector(word, element)
        pair = fused(pair, splat(element, -(2.0**-6)), splat(element, 2.0))
        return vector.shuffle(pair, pair, [half, half])
    if word is None:
        return splat(element, 1024.0 + record.excess)
    # From the bits of the bf16 128 to those of the f16 1024.
    return bits.as_vector(arith.xori(bits.splat16(word, half), bits.const(0x27002700)), element)
